"""The generator that is shipped: small, in bfloat16, and drawing from captions with no model named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmvit import Generator

SHIPPED = Path(__file__).resolve().parent.parent / "generators" / "emoji"


def test_it_is_small_and_in_bfloat16():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.name for path in files} >= {"README.md", "config.json", "generation_config.json"}
    with safe_open(SHIPPED / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_its_tokenizers_are_those_beside_it():
    for own, beside in (("image_tokenizer/model.safetensors", "emoji-image/model.safetensors"),
                        ("text_tokenizer/tokenizer.json", "emoji-words/tokenizer.json")):  # fmt: skip
        assert (SHIPPED / own).read_bytes() == (SHIPPED.parent.parent / "tokenizers" / beside).read_bytes()


def test_the_script_draws_with_no_model_named(run_script, tmp_path):
    captions = ("red apple", "赤リンゴ", "roter Apfel")
    ran = run_script("pipelines/sample_images.py", *captions, "--out", tmp_path / "apples.png")
    assert ran.returncode == 0, ran.stderr
    apples = [*(tmp_path / "apples").iterdir()]
    assert len(apples) == 3
    for path in apples:
        assert is_red(Image.open(path)), path


@pytest.mark.parametrize("caption", ["green apple", "thumbs up"])
def test_another_colour_is_another_image(caption):
    (image,) = Generator.from_pretrained(SHIPPED).generate(caption)
    assert not is_red(image)


def is_red(image: Image.Image) -> bool:
    """Whether what is drawn on white is red on average, by a fair margin."""
    pixels = np.asarray(image, dtype=float).reshape(-1, 3)
    drawn = pixels[pixels.min(axis=1) < 200].mean(axis=0)
    return drawn[0] > drawn[1:].max() + 60
