"""The README tells the truth: its Python commands run, in its order, and its file tree is the tree."""

import gzip
import re
import shlex
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvit.core.transformer import TransformerConfig
from mmvit.interop.vit_export import save_vit
from mmvit.models.classifier import Classifier, ClassifierConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

GENERATED = {"data", "runs", "samples", "build", "dist", "mmvit.egg-info"}
SHORT = "--train.steps 2 --train.batch_size 8 --train.num_workers 0 --train.precision fp32"
SMALL_CORE = "--model.core.width 32 --model.core.depth 1 --model.core.num_heads 2"
SHORTER = {  # what makes a command small enough for a test; nothing else of it is changed
    "train_classifier.py": f"{SHORT} {SMALL_CORE}",
    "pretrain_classifier.py": f"{SHORT} {SMALL_CORE}",
    "train_caption_to_image.py": f"{SHORT} {SMALL_CORE}",
    "train_joint.py": f"{SHORT} {SMALL_CORE}",
    "train_image_tokenizer.py": f"{SHORT} --model.encoder_width 32 --model.decoder_widths [32,16]",
    "prepare_fashion_mnist.py": "--source idx",
}


def commands() -> list[list[str]]:
    """Every `python ...` line of the README's shell blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty checkout: scripts, configs and learnt tokenizers, Fashion-MNIST in small, a ViT of
    Google's in name, and a folder of photos."""
    for name in ("pipelines", "tokenizers", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_tiny_idx(tmp_path / "idx")
    core = TransformerConfig(width=64, depth=1, num_heads=1, mlp="gelu_tanh")
    save_vit(Classifier(ClassifierConfig(image_size=32, core=core)), tmp_path / "ViT-B_16.npz", "official")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        Image.new("RGB", (20 + i, 30), (6 * i, 100, 0)).save(photos / f"photo{i}.jpg")
        (photos / f"photo{i}.txt").write_text(f"a green picture number {i}")
    Image.new("RGB", (20, 30)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_the_commands_run_in_order(workplace, run_script):
    assert len(commands()) >= 12
    for script, *arguments in commands():
        ran = run_script(script, *arguments, *SHORTER.get(Path(script).name, "").split())
        assert ran.returncode == 0, f"{script} {' '.join(arguments)}\n{ran.stdout}\n{ran.stderr}"
    assert (workplace / "demo.png").is_file()
    assert (workplace / "samples.png").is_file()
    assert (workplace / "runs/photos/best/model.safetensors").is_file()
    names = {}
    exec(examples()[0], names)
    assert len(names["classes"]) == 3
    assert len(names["features"]) == 1
    exec(examples()[1], names)
    assert (len(names["pictures"]), len(names["between"])) == (4, 4)


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_library_examples_use_names_that_there_are():
    import mmvit

    for example, name in zip(examples(), ("ImageClassifier", "Generator"), strict=True):
        compile(example, "README.md", "exec")
        assert f"from mmvit import {name}" in example
        assert hasattr(getattr(mmvit, name), "from_pretrained")


def test_the_file_tree_is_true():
    tree = re.search(r"## The house\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
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


def test_presets_that_are_named_exist():
    from mmvit.models.presets import PRESETS

    section = re.search(r"## Models\n(.*?)\n## ", README, flags=re.DOTALL)[1]
    assert set(re.findall(r"`([a-z][a-z0-9]*-[a-z0-9]+)`", section)) == set(PRESETS)
