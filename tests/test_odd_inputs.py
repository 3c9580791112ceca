"""Odd images, masks, captions and settings for drawing and editing: handled as one sees them, or refused."""

import contextlib
import io
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_generator

from mmvit.errors import UserError
from mmvit.sampling.editing import kept_codes
from mmvit.sampling.generator import Generator


@pytest.fixture(scope="module")
def generator(tokenizer) -> Generator:
    return tiny_generator(tokenizer)


def test_a_rotated_photo_is_edited_where_it_is_seen(generator):
    """Cameras store photos sideways and say so; a mask is drawn on what one sees."""
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 64, 32))
    turned = io.BytesIO()
    exif = image.getexif()
    exif[0x112] = 3  # upside down: red is seen above
    image.save(turned, "PNG", exif=exif)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 32, 64, 64))
    kept = []

    def generate(self, captions, number, given, **how) -> None:
        kept.append(given)

    with mock.patch.object(Generator, "generate", generate):
        with contextlib.suppress(TypeError):
            generator.edit(Image.open(turned), "pear", mask)
        with contextlib.suppress(TypeError):
            generator.edit(image.rotate(180), "pear", mask)
    assert torch.equal(*kept)


def test_a_transparent_hole_in_a_mask_is_drawn_again_however_it_is_given(generator, tmp_path):
    hole = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 64, 32))
    hole.save(tmp_path / "hole.png")
    grid = generator.transformer.config.grid
    of_file = kept_codes(tmp_path / "hole.png", grid, (64, 64))
    assert torch.equal(kept_codes(hole, grid, (64, 64)), of_file)
    assert not of_file.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"given": 5}, "given: expected codes as a torch.long tensor"),
        ({"given": torch.zeros(1, 2, 3, dtype=torch.bool)}, "got .* of torch.bool"),
        ({"given": torch.zeros(0, 2, 3, dtype=torch.long)}, "at least one image"),
        ({"guidance_scale": 1e39}, "guidance_scale"),
        ({"num_images": True}, "num_images: expected"),
    ],
)
def test_odd_values_are_refused_before_anything_is_drawn(generator, settings, message):
    with pytest.raises(UserError, match=message):
        generator.draw("pear", **settings)


def test_odd_captions_weights_and_images_are_refused(generator):
    image = Image.new("RGB", (24, 16))
    for action, message in (
        (lambda: generator.draw("\ud800"), "not valid UTF-8 text"),
        (lambda: generator.draw({"a": 10**400}), "expected a number from -1000 to 1000"),
        (lambda: generator.edit(Image.new("RGB", (0, 5)), "a", "left"), "is empty: 0x5 pixels"),
        (lambda: generator.edit(image, "a", np.zeros((2, 3), bool)), "got a NumPy array"),
        (lambda: generator.edit(image, "a", 0.5, num_images=0), "num_images: expected"),
        (lambda: generator.edit(image, "a", 0.5, seed=2**64), "seed"),
    ):
        with pytest.raises(UserError, match=message):
            action()
