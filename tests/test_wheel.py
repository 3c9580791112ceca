"""The wheel alone is enough: in an empty folder, without a checkout, it draws, lists recipes and plans."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from mmvit.places import FOLDERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel, built from a copy of the checkout, is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "evaluation-*.json")
    for name in ("mmvit", *FOLDERS):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "-C--build-option=--compression=stored"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder, folder / "source"], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def test_the_wheel_draws_in_an_empty_folder(installed, tmp_path):
    """In one process, as importing torch takes seconds."""
    code = f"""
        import sys, mmvit, mmvit.cli
        assert mmvit.__file__.startswith({str(installed)!r})
        sys.argv[0] = "mmvit"
        mmvit.cli.main(["sample", "red apple", "--num", "1", "--out", "apple.png"])
        print("---")
        mmvit.cli.main(["train", "--list"])
        print("---")
        mmvit.cli.main(["train", "emoji_demo", "--dry-run"])
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    drawn, listed, planned = ran.stdout.split("---\n")
    assert "1 image" in drawn
    assert "emoji_demo" in listed
    assert "PFLOP" in planned
    with Image.open(tmp_path / "apple.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 50
    assert {path.name for path in tmp_path.iterdir()} == {"apple.png", "apple"}


def test_the_wheel_has_every_file_of_the_folders_beside_the_library(installed):
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    lacking = [name for name in listed if not (installed / "mmvit" / name).is_file()]
    assert listed
    assert not lacking
