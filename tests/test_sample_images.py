"""Images and sheets that sample_images.py and edit_images.py draw, and what they refuse."""

from unittest import mock

import numpy as np
import torch
from generator_scripts import refused
from PIL import Image

from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import sheet_size


def test_sampling_writes_a_grid_and_single_images(generator_run, run_script, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("blue square\n\n赤リンゴ\n🍎\n", encoding="utf-8")
    with mock.patch.object(Generator, "draw", autospec=True, side_effect=Generator.draw) as draw:
        ran = run_script(
            "pipelines/sample_images.py", "--model", generator_run, "red square", "--captions-file", captions,
            "--num", 2, "--guidance-scale", 2, "--temperature", 0, "--top-k", 10, "--top-p", 0.95,
            "--seed", 5, "--negative", "green", "--out", tmp_path / "grid.png",
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert draw.call_args.kwargs == {
        "guidance_scale": 2, "temperature": 0, "top_k": 10, "top_p": 0.95, "seed": 5, "negative": "green",
        "candidates": 1, "scorer": None,
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [
        f"{i:03d}-{name}-seed{seed}.png"
        for i, name in enumerate(["red-square", "blue-square", "赤リンゴ", "1f34e"])
        for seed in (5, 6)
    ]
    assert Image.open(tmp_path / "grid.png").size == sheet_size(4, 2)


def test_images_drawn_in_parts_are_those_of_their_seeds(generator_run, run_script, tmp_path):
    drawn, draw = {}, Generator.draw

    def watched(*arguments, **settings):
        part = draw(*arguments, **settings)
        drawn.update(zip(part.seeds, part.codes, strict=True))
        return part

    out = tmp_path / "many.png"
    arguments = ("--model", generator_run, "red square", "--num", 66, "--seed", 3, "--out", out)
    with mock.patch.object(Generator, "draw", watched):
        ran = run_script("pipelines/sample_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "many").iterdir())) == 66
    generator = Generator.from_pretrained(generator_run)
    for seed in (3, 66, 67, 68):  # the second part begins at 67
        alone = generator.draw(["red square"], seed=seed).codes
        assert torch.equal(drawn[seed], alone[0])
        (expected,) = generator.images(alone)
        with Image.open(tmp_path / "many" / f"000-red-square-seed{seed}.png") as image:
            assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1  # of 255: rounding


def test_options_of_an_edit_reach_every_part_of_it(generator_run, run_script, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    parts = []

    def edit(generator, image, *what, num_images, seed, **settings):
        parts.append((*what, num_images, seed, settings))
        return [image] * num_images

    arguments = ("--keep", "left", "--num", 66, "--seed", 3, "--guidance-scale", 2, "--negative", "green")
    with mock.patch.object(Generator, "edit", edit):
        ran = run_script(
            "pipelines/edit_images.py", tmp_path / "image.png", "red square", "--model", generator_run,
            *arguments, "--out", tmp_path / "edited.png",
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    settings = {"guidance_scale": 2.0, "negative": "green", "candidates": 1, "scorer": None}
    assert parts == [("red square", "left", 64, 3, settings), ("red square", "left", 2, 67, settings)]


def test_mistakes_in_sampling_are_named(generator_run, run_script, tmp_path):
    def sample(model, *arguments):
        return run_script("pipelines/sample_images.py", "--model", model, *arguments)

    refused(sample(generator_run), "no captions")
    refused(sample(tmp_path, "a"), "holds no model")
    refused(sample(generator_run / "best" / "image_tokenizer", "a"), "holds a", "not a generator")
    refused(sample(generator_run, "a", "--out", tmp_path / "a.txt"), ".png")
    refused(
        sample(generator_run, "a", "--num", 200, "--out", "a.webp"),
        "a grid of 1 x 200 images would have",
        "at most 16,383 a side",
    )
    refused(sample(generator_run, "a", "--scorer", generator_run), "holds a generator, not a CLIP")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(sample(generator_run, "--captions-file", tmp_path / "latin.txt"), "not UTF-8")
    inside_a_file = tmp_path / "latin.txt" / "a.png"
    refused(sample(generator_run, "a", "--out", inside_a_file), f"--out {inside_a_file}: cannot be written")
    (tmp_path / "folder.png").mkdir()
    refused(sample(generator_run, "a", "--out", tmp_path / "folder.png"), "is a folder")
    (tmp_path / "taken").touch()
    refused(sample(generator_run, "a", "--out", tmp_path / "taken.png"), "cannot make the folder")
