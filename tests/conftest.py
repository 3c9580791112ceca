"""Tiny shards that the tests of several rooms read, and a way to run the scripts of the checkout."""

import contextlib
import gc
import importlib.abc
import importlib.machinery
import inspect
import io
import json
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from file_server import FileServer, served
from generator_scripts import SMALL
from PIL import Image
from vqgan_models import chameleon_model, diffusers_model, janus_model, small_vqgan

from mmvit import cli, errors
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import pack_codes
from mmvit.data.writing import ShardWriter
from mmvit.interop.lpips import LPIPS
from mmvit.models.vq import VQConfig, VQModel
from mmvit.models.vqgan import VQGAN
from mmvit.places import load_script
from mmvit.training import RunFolder

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("test_docs.py", "test_distributed.py", "test_wheel.py")  # first, or one process would end alone
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)  # the tests run in two processes on two cores (Makefile)


@pytest.fixture(scope="session", autouse=True)
def _little_garbage():
    gc.freeze()  # or each collection, here and in forks, would go through all that has been imported


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Indexes and unpacked shards of tests do not go to the user's cache."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_curves():
    """Curves are most of the time of tiny runs: they leave an empty file. test_training.py draws some."""
    with mock.patch.object(RunFolder, "draw_curves", lambda run: run.curves.touch()):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """The text tokenizer that is shipped."""
    return TextTokenizer.from_file(ROOT / "tokenizers" / "emoji-text")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """A folder with `train` (5 shards, 48 samples) and `held-out` (1 shard, 8).

    Samples have png (16x16), cls (0 to 3), txt, json and codes.npy (2x2). The class is the image's colour,
    and the codes are the class, so that a tiny model can learn both.
    """
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    for split, count in (("train", 48), ("held-out", 8)):
        with ShardWriter(folder, split, samples_per_shard=10) as writer:
            for number in range(count):
                writer.write(f"{split}-{number:03d}", tiny_sample(number % 4, rng))
    return folder


@pytest.fixture
def server(tiny_shards) -> Iterator[FileServer]:
    """Serves `tiny_shards`."""
    with served(tiny_shards) as server:
        yield server


def tiny_sample(label: int, rng: random.Random) -> dict[str, bytes]:
    name, colour = list(COLOURS.items())[label]
    noise = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3) // 8
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) * 7 // 8 + noise).astype(np.uint8)).save(buffer, "PNG")
    captions = {"en": f"{name} square", "de": f"Quadrat {name}"}
    return {
        "png": buffer.getvalue(),
        "cls": str(label).encode(),
        "txt": captions["en"].encode(),
        "json": json.dumps({"captions": captions}).encode(),
        "codes.npy": pack_codes(np.full((2, 2), label)),
    }


@pytest.fixture(scope="session")
def assert_same_state() -> Callable[[Any, Any], None]:
    """That two states (tensors in dictionaries and lists) are equal bit for bit, however long they took."""

    def check(left: Any, right: Any) -> None:
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            for key in left.keys() - {"seconds"}:
                check(left[key], right[key])
        elif isinstance(left, list | tuple):
            for pair in zip(left, right, strict=True):
                check(*pair)
        else:
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right

    return check


@pytest.fixture
def thin_vgg16() -> dict[str, torch.Tensor]:
    """VGG16's convolutions, all zeros: tensors that take no space in a file of torch's."""
    shapes = {name: t.shape for name, t in LPIPS().state_dict().items() if name.startswith("features.")}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


class AnyName(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which has no CPU build here and which timm only imports."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module, names = types.ModuleType(spec.name), AnyName("names", (), {})
        module.__getattr__ = lambda name: getattr(names, name)
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="session")
def timm():
    """The package, without torchvision."""
    finder = Torchvision()
    sys.meta_path.insert(0, finder)
    try:
        import timm
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return timm


@dataclass
class Ran:
    """How a script ended and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def mmvit_command() -> Callable[..., Ran]:
    """Runs `mmvit ARGUMENTS...` in this process, which spares seconds of importing torch."""
    return lambda *arguments: ran("mmvit", arguments, lambda: cli.main([*map(str, arguments)]))


@pytest.fixture(scope="session")
def run_script() -> Callable[..., Ran]:
    """Runs `python SCRIPT ARGUMENTS...` in this process."""

    def run(script: str, *arguments: object) -> Ran:
        main = load_script(script).main
        if inspect.signature(main).parameters or hasattr(main, "takes_settings"):
            return ran(script, arguments, lambda: cli.run_script(main))
        return ran(script, arguments, lambda: errors.run_script(main))

    return run


def ran(program: str, arguments: tuple[object, ...], call: Callable[[], None]) -> Ran:
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
    ):
        try:
            call()
        except SystemExit as end:
            code = end.code or 0
    return Ran(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, tiny_shards, run_script) -> Path:
    """A folder with an image tokenizer, codes that encode_images.py made by it, and a generator's recipe."""
    folder = tmp_path_factory.mktemp("encoded")
    tokenizer = VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16)))
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = ("--tokenizer", folder / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", tiny_shards, folder / "codes", *settings)
    assert ran.returncode == 0, ran.stderr
    (folder / "config.toml").write_text(
        f"""
        task = "generator"
        output = "{folder / "run"}"
        [data]
        train = "{folder}/codes/train-*.tar"
        held_out = "{folder}/codes/held-out-*.tar"
        image_tokenizer = "{folder}/tokenizer"
        text_tokenizer = "{ROOT}/tokenizers/emoji-text"
        [preview]
        captions = ["red square"]
        """
    )
    return folder


@pytest.fixture(scope="session")
def generator_run(encoded, run_script) -> Path:
    """The run folder of a generator that train_caption_to_image.py trained on the codes of `encoded`."""
    ran = run_script("pipelines/train_caption_to_image.py", encoded / "config.toml", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert "32 captions, 0 captions cut, 0 skipped" in ran.stdout
    return encoded / "run"


@pytest.fixture
def vqgan() -> VQGAN:
    """Ours, small, with random weights."""
    return small_vqgan()


@pytest.fixture(scope="module")
def diffusers_vq() -> torch.nn.Module:
    return diffusers_model()


@pytest.fixture(scope="module")
def janus_vq() -> torch.nn.Module:
    return janus_model()


@pytest.fixture(scope="module")
def chameleon_vq() -> torch.nn.Module:
    return chameleon_model(resolution=64, attn_resolutions=[32])
