"""The house keeps its shape: imports point downwards, `tokenizers/` shadows nothing, the wheel is mmvit
alone, configs load."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch

from mmvit.config import read_toml
from mmvit.models.registry import build_model
from mmvit.places import FOLDERS
from mmvit.recipes.find import recipes
from mmvit.recipes.resolve import resolve

ROOT = Path(__file__).parent.parent
FLOORS = {  # a room may import from rooms on lower floors, and from its own
    "core": 0,
    "models": 1,
    "streams": 1,
    "data": 2,
    "training": 3,
    "sampling": 3,
    "interop": 3,
    "evaluation": 4,  # it measures what sampling draws
    "serving": 5,
    "recipes": 5,
    "cli": 5,  # scripts and the command
}
ANYWHERE = {"errors", "config", "files", "hub", "lock", "memory", "sharding", "places", "progress", "weights"}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def imported_names(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def rooms() -> list[tuple[Path, str]]:
    files = sorted((ROOT / "mmvit").glob("*/*.py"))
    assert len(files) > 20
    return [(path, path.parent.name) for path in files]


def test_imports_point_downwards():
    for path, room in rooms():
        for name in imported_names(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != "mmvit" or other in ANYWHERE or other == room:
                continue
            assert FLOORS[other] < FLOORS[room], f"{path} imports {name}, which is not on a lower floor"
    for path in (ROOT / "mmvit").glob("*.py"):
        if path.stem in ANYWHERE:
            rooms_used = {name.split(".")[1] for name in imported_names(path) if name.startswith("mmvit.")}
            assert rooms_used <= ANYWHERE, f"{path} may be imported from anywhere, so it imports no room"


def test_core_and_models_do_no_input_or_output():
    for path, room in rooms():
        packages = {name.split(".")[0] for name in imported_names(path)}
        if room in ("core", "models"):
            assert not packages & {"deepspeed", "webdataset", "PIL"}, path
        if path.name != "deepspeed_engine.py":
            assert "deepspeed" not in packages, path


def test_the_folder_tokenizers_does_not_shadow_the_package():
    for folder in ("tokenizers", "pipelines", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    code = "import sys; sys.path.insert(0, ''); import tokenizers as t; t.Tokenizer; print(t.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "site-packages" in found


def test_scripts_are_never_imported():
    for path in ROOT.glob("[!.]*/**/*.py"):
        assert not {name.split(".")[0] for name in imported_names(path)} & {"pipelines", "benchmarks"}, path


def test_the_wheel_holds_every_room_and_the_folders_beside_them():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {f"mmvit.{room.name}" for room in (ROOT / "mmvit").iterdir() if any(room.glob("*.py"))}
    beside = {f"mmvit.{folder}" for folder in FOLDERS}
    assert {*settings["packages"]} == {"mmvit"} | rooms | beside
    assert settings["package-dir"] == {f"mmvit.{folder}": folder for folder in FOLDERS}


def test_nothing_is_unpickled():
    for path in [*ROOT.glob("mmvit/**/*.py"), *ROOT.glob("pipelines/*.py"), *ROOT.glob("tokenizers/*.py")]:
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert not (
                isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.load", "pickle.loads")
            ), path


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_resolves_and_builds(name):
    path = recipes()[name]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("task = "), f"{path}: the first line says what it trains"
    assert f"mmvit train {name}" in text, f"{path}: the header says its command"
    start_at_a_run = "model" in read_toml(path).get("start", {})
    shipped = {"start.model": "generators/emoji"} if start_at_a_run else {}  # instead of a run not made here
    recipe = resolve(name, shipped, read_data=False).recipe
    with torch.device("meta"):
        model = build_model(recipe.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("name", ["dalle", "emoji_dalle"])
def test_dalles_recipes_train_as_published(name):
    recipe = resolve(name, read_data=False).recipe
    optimizer, train = recipe.optimizer, recipe.train
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 4.5e-4, 4.5e-2)
    assert (tuple(optimizer.betas), train.clip_norm, train.ema_decay) == ((0.9, 0.96), 4.0, 0.99)
    assert (recipe.data.bpe_dropout, recipe.preview.temperature) == (0.1, 1.0)
    model = recipe.model
    assert (model.attention, model.text_loss_weight, model.image_loss_weight) == ("dalle", 1.0, 7.0)
    if name == "dalle":
        assert (train.batch_size, train.steps, optimizer.warmup_steps) == (1024, 430_000, 5000)
        assert (model.core.width, model.core.depth, model.core.num_heads) == (3968, 64, 62)


def test_models_and_drawing_import_nothing_that_they_do_not_use(tmp_path):
    """In a Python that has imported nothing: each of these would take from a tenth of a second to several."""
    code = """
import importlib, pkgutil, sys
import mmvit.core, mmvit.models
for room in (mmvit.core, mmvit.models):
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
print(*{name.partition(".")[0] for name in sys.modules})
from mmvit.cli import main
main(["sample", "red apple", "--out", sys.argv[1]])
print(*{name.partition(".")[0] for name in sys.modules})
"""
    command = [sys.executable, "-c", code, tmp_path / "apple.png"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for_models, *_, for_drawing = (line.split() for line in ran.stdout.splitlines())
    heavy = {"deepspeed", "kornia", "matplotlib", "torchmetrics", "transformers"}
    assert not {*for_models} & {*heavy, "webdataset", "PIL", "scipy"}
    assert not {*for_drawing} & {*heavy, "huggingface_hub", "requests"}
    assert {"torch", "PIL"} <= {*for_drawing}
    assert (tmp_path / "apple").is_dir()


def test_training_is_imported_without_the_compiler():
    """Its imports take two seconds, which an optimizer made on import would cost every command."""
    code = "import sys, mmvit.recipes.launch; print('torch._dynamo' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr
