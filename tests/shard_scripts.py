"""What the tests of `mmvit shards` share: images to read, a run of the script, its shards read back."""

from pathlib import Path

from PIL import Image

from mmvit.streams.shards import Sample, expand_shards, read_shard


def read_split(folder: Path, split: str) -> dict[str, Sample]:
    return {
        sample.key: sample
        for shard in expand_shards(folder / f"{split}-*.tar")
        for sample in read_shard(shard)
    }


def save_image(path: Path, size: tuple[int, int] = (8, 8), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_shards(run_script, source: Path, out: Path, *arguments: object) -> tuple[dict[str, Sample], str]:
    done = run_script("pipelines/make_shards.py", source, out, "--held-out-share", 0, *arguments)
    assert done.returncode == 0, done.stderr
    return read_split(out, "train"), done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, with those in folders in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
