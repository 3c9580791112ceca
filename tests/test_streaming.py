"""Images that are shown while they are drawn."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_generator

from mmvit.errors import UserError
from mmvit.sampling.decoding import PartlyDrawn, decode
from mmvit.sampling.generator import Generator

CAPTIONS = ["red apple", "pear"]
SETTINGS = {"guidance_scale": 2.0, "seed": 3}


@pytest.fixture(params=["raster", "any"])
def generator(request, tokenizer) -> Generator:
    return tiny_generator(tokenizer, request.param)


def same(left: list[Image.Image], right: list[Image.Image]) -> bool:
    return all(np.array_equal(*map(np.asarray, pair)) for pair in zip(left, right, strict=True))


def test_the_last_images_are_those_drawn_at_once(generator):
    *shown, last = generator.generate(CAPTIONS, 3, stream=True, share=math.inf, batch_size=2, **SETTINGS)
    assert same(last, generator.generate(CAPTIONS, 3, **SETTINGS))
    assert shown
    assert all(len(images) == 6 for images in shown)


def test_codes_appear_step_by_step_and_the_rest_is_grey(generator, monkeypatch):
    """All steps of both batches are shown when time does not matter, and each batch's images alone change."""
    monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: 1)
    steps = 6 if generator.transformer.config.order == "raster" else 2
    shown = [*generator.generate("pear", 4, stream=True, share=math.inf, batch_size=2, **SETTINGS)]
    assert len(shown) == 2 * steps + 1
    grey = generator.images(generator.encode([Image.new("RGB", (24, 16), (128, 128, 128))]))[0]
    for number, images in enumerate(shown[:-1]):
        assert same(images[2:], [grey, grey]) == (number < steps)
        assert same(images[:2], shown[-1][:2]) == (number >= steps - 1)
    assert not same(shown[0][:1], [grey])


@pytest.mark.parametrize("ahead", [1, 4])
def test_only_codes_that_are_known_are_shown(generator, monkeypatch, ahead):
    """Drafts, and whatever else a step leaves at other places, are grey."""
    monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: ahead)
    *_, codes = (part.codes for part in steps_of(generator))
    grey = generator.encode([Image.new("RGB", (24, 16), (128, 128, 128))]).flatten(1)
    expected = [
        generator.images(torch.where(known, codes, grey).unflatten(1, (2, 3)))
        for _, known in steps_of(generator)
    ]
    *shown, _ = generator.generate("pear", 2, stream=True, share=math.inf, **SETTINGS)
    assert all(same(*pair) for pair in zip(shown, expected, strict=True))


def steps_of(generator):
    how, _, inputs = generator.prepare("pear", 2, "", None, SETTINGS)
    for codes, known in decode(generator.transformer, *inputs, **how.decoding):
        yield PartlyDrawn(codes.clone(), known.clone())


def test_the_time_in_which_images_are_looked_at_does_not_count(generator, monkeypatch):
    """With a clock in which a step takes half a second, showing it as long, and looking at it 100 seconds."""
    clock = [0.0]

    def ticking() -> float:
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr("mmvit.sampling.streaming.time.perf_counter", ticking)
    monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: 1)
    frames = []
    for images in generator.generate("pear", 4, stream=True, share=0.25, batch_size=1, **SETTINGS):
        frames.append(images)
        clock[0] += 100
    steps = 4 * (6 if generator.transformer.config.order == "raster" else 2)
    assert len(frames) - 1 == steps // 4  # a quarter of the time


def test_parts_shrink_when_memory_runs_out_on_the_way(generator, monkeypatch):
    """With memory for the first step of any batch, but for the second of two images at most."""
    sizes = []

    def short(model, caption_ids, *how, **more):
        sizes.append(len(caption_ids))
        for number, step in enumerate(decode(model, caption_ids, *how, **more)):
            if number and len(caption_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield step

    monkeypatch.setattr("mmvit.sampling.streaming.decode", short)
    monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: 1)
    *shown, last = generator.generate("pear", 5, stream=True, share=math.inf, **SETTINGS)
    assert sizes == [5, 2, 2, 1]
    assert len(shown) == 1 + 3 * (6 if generator.transformer.config.order == "raster" else 2)
    for image, expected in zip(last, generator.generate("pear", 5, **SETTINGS), strict=True):
        assert abs(np.int16(image) - np.int16(expected)).max() <= 1  # rounding differs between batches


def test_too_little_memory_for_one_image_is_said(generator, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("mmvit.sampling.streaming.decode", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=r"out of memory with a single image"):
        next(generator.generate("pear", 3, stream=True))


def test_little_time_is_spent_on_what_is_shown(generator):
    assert len([*generator.generate("pear", stream=True, share=0.0)]) == 1  # the last


def test_given_codes_are_shown_from_the_start(generator):
    given = torch.full((1, 2, 3), -1)
    given[0, 0] = torch.tensor([3, 7, 5])
    *_shown, last = generator.generate("pear", stream=True, share=math.inf, given=given, **SETTINGS)
    assert same(last, generator.generate("pear", given=given, **SETTINGS))


def test_mistakes_are_told_before_anything_is_drawn(generator):
    with pytest.raises(UserError, match=r"candidates are compared when all are drawn"):
        generator.generate("pear", stream=True, candidates=2)
    with pytest.raises(UserError, match=r"no captions"):
        generator.generate([], stream=True)
    with pytest.raises(UserError, match=r"temprature"):
        generator.generate("pear", stream=True, temprature=1)
    with pytest.raises(UserError, match=r"num_images: expected"):
        generator.generate("pear", 0, stream=True)
