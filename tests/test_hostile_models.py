"""Folders of models made to break who loads them: each is refused by name, before memory is taken."""

import json
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CORE, tiny_classifier

from mmvit import ImageClassifier
from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError, refuse_damage
from mmvit.files import MOST_JSON, read_json
from mmvit.hub import CONFIG, setting_of_run, trained_size
from mmvit.interop.openai_dvae import load_openai_dvae
from mmvit.interop.vit import load_vit
from mmvit.interop.vit_export import vit_to_weights
from mmvit.interop.vqgan import load_vqgan
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.registry import load_image_tokenizer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.training.checkpoint import read_state
from mmvit.weights import WEIGHTS, read_weights

DEEP = b"[" * 100_000


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_classifier("a", "b", "c").save_pretrained(tmp_path / "model")


def set_in(path: Path, key: str, value: object) -> None:
    description = json.loads(path.read_text())
    *sections, last = key.split(".")
    config = description["config"]
    for section in sections:
        config = config[section]
    config[last] = value
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_classes", 10**12, "head.weight is .*, expected .1000000000000, 32"),
        ("core.depth", 10**9, "describes a model of far more layers than there are weights for"),
        ("core.width", 2 * 10**9, "describes no model that can be built"),
        ("core.width", 10**4000, "describes no model that can be built"),
        ("core.mlp_ratio", 1e300, "describes no model that can be built"),
        ("registers", 10**10, "positions.table is"),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_allocated(folder, key, value, message):
    set_in(folder / CONFIG, key, value)
    with pytest.raises(UserError, match=message):
        ImageClassifier.from_pretrained(folder)


def test_tables_that_are_no_weights_are_bounded(tmp_path):
    grid = {"grid": [60_000, 60_000], "positions": "rotary_2d"}
    config = GeneratorConfig(core=CORE, vocab_size=10, text_length=4, codebook_size=16, positions="rotary_2d")
    GeneratorTransformer(config).save_pretrained(tmp_path)
    for key, value in grid.items():
        set_in(tmp_path / CONFIG, key, value)
    with pytest.raises(UserError, match=r"tables of 115,200,000,\d+ bytes of at most"):
        GeneratorTransformer.from_pretrained(tmp_path)
    VQModel(VQConfig(codebook_size=16)).save_pretrained(tmp_path)
    set_in(tmp_path / CONFIG, "decoder_depths", [10**9, 3])
    with pytest.raises(UserError, match="far more layers"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", [DEEP, b'{"kind": "\\ud800"}', b"1" * 5000, b" " * (MOST_JSON + 1), b"\xff", b"3"]
)
def test_evil_json_is_refused_wherever_it_is_read(folder, tmp_path, text):
    for name in (CONFIG, "classes.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(text)
        with pytest.raises(UserError, match=name):
            ImageClassifier.from_pretrained(folder)
        (folder / name).write_bytes(before)
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(UserError, match="is not a tokenizer"):
        TextTokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"!":1,', b'"!":4000000000,', "tokens without gaps, got token 4,000,000,000"),
        (b'"ByteLevel"', b'"Levels"', "is not a tokenizer"),
    ],
)
def test_a_damaged_text_tokenizer_is_refused(tmp_path, tokenizer, old, new, message):
    text = tokenizer.tokenizer.to_str().encode()
    assert old in text
    (tmp_path / "tokenizer.json").write_bytes(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        TextTokenizer.from_file(tmp_path)


def test_damage_that_a_caption_shows_first_is_told(tokenizer):
    broken = TextTokenizer(tokenizer.tokenizer, "tokenizer.json")
    broken.ranks = None
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged, or not what it should be \(TypeError"):
        broken.encode(["red"], 4, 0.1, random.Random(0))


def test_a_pipe_or_folder_in_place_of_a_file_is_refused(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(UserError, match="no weights at"):
        ImageClassifier.from_pretrained(folder)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_an_evil_recipe_of_a_run_is_ignored(tmp_path):
    for text in (b"a = " + DEEP, b"a = 1" + b"1" * 5000, b"data = 3", b'data = {image_size = "64"}', b"\xff"):
        (tmp_path / "config.toml").write_bytes(text)
        assert setting_of_run(tmp_path, "train", "select") is None
        assert trained_size(tmp_path) == (64, 64)


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    keys = ("dtype", "shape", "data_offsets")
    text = json.dumps({name: dict(zip(keys, facts, strict=True)) for name, facts in tensors.items()}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**26) + b"{}",
        struct.pack("<Q", len(DEEP)) + DEEP,
        header(a=("F32", [2], [0, 8])),
        header(a=("F32", [2**60], [0, 4])) + bytes(4),
        header(a=("X8", [1], [0, 4])) + bytes(4),
        header(a=("F32", [1], [0, 4]), b=("F32", [1], [0, 4])) + bytes(4),
        header(a=("F32", [1], [4, 0])) + bytes(4),
    ],
)
def test_evil_headers_of_weights_are_refused(tmp_path, data):
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        read_weights(tmp_path / WEIGHTS)


def timm_weights() -> dict[str, torch.Tensor]:
    return vit_to_weights(
        Classifier(ClassifierConfig(image_size=16, patch_size=8, num_classes=3, core=CORE)), "timm"
    )


def test_weights_of_others_that_take_no_space_are_refused(tmp_path):
    huge = timm_weights() | {"patch_embed.proj.weight": torch.empty(10**9, 3, 0, 16)}
    save_file(huge, tmp_path / "empty.safetensors")
    spread = timm_weights() | {
        "head.weight": torch.zeros(()).expand(10**9, 32),
        "head.bias": torch.zeros(()).expand(10**9),
    }
    torch.save(spread, tmp_path / "spread.pth")
    far = timm_weights() | {"blocks.999999999.norm1.weight": torch.zeros(32)}
    save_file(far, tmp_path / "far.safetensors")
    for name, message in (
        ("empty.safetensors", "patch_size"),
        ("spread.pth", r"head.weight is \(1000000000, 32\), of which fewer numbers are stored"),
        ("far.safetensors", "far more layers"),
    ):
        with pytest.raises(UserError, match=message):
            load_vit(tmp_path / name, num_heads=2)


def test_archives_that_unpack_to_far_more_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmvit.files.MOST_PACKED", 2**20)
    for name, member in (("bomb.npz", "a.npy"), ("bomb.pth", "bomb/data.pkl"), ("training.pt", "x/data.pkl")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(2**21))
    for read in (
        lambda: load_vit(tmp_path / "bomb.npz"),
        lambda: load_vit(tmp_path / "bomb.pth"),
        lambda: load_openai_dvae(tmp_path / "bomb.pth", tmp_path / "bomb.pth"),
        lambda: read_state(tmp_path / "training.pt"),
    ):
        with pytest.raises(UserError, match="unpacks to 2,097,152 bytes"):
            read()
    (tmp_path / "endless.pt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"endless\.pt is missing"):
        read_state(tmp_path / "endless.pt")


@pytest.mark.parametrize(
    "config",
    [{"model_type": "vit", "image_size": {}}, {"architecture": "x", "model_args": "y"}, {"architecture": []}],
)
def test_settings_of_others_of_another_form_are_refused(tmp_path, config):
    save_file(timm_weights(), tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_vit(tmp_path, num_heads=[])
    (tmp_path / CONFIG).write_text('{"_class_name": "VQModel", "block_out_channels": 3}')
    with pytest.raises(UserError, match=str(tmp_path)):
        load_vqgan(tmp_path)


def test_nothing_but_damage_is_told_as_damage(tmp_path):
    class PanicException(BaseException):
        """What libraries in Rust raise."""

    for error in (PanicException("index out of bounds"), KeyError("x"), MemoryError(), OSError(22, "x")):
        with (
            pytest.raises(UserError, match="model is damaged, or not what it should be"),
            refuse_damage("model"),
        ):
            raise error
    for error in (
        KeyboardInterrupt(),
        UserError("x"),
        FileNotFoundError(2, "x"),
        RuntimeError("can't allocate memory"),
    ):
        with pytest.raises(type(error)) as caught, refuse_damage("model"):
            raise error
        assert caught.value is error
