"""Make the Fashion-MNIST data set: 60,000 + 10,000 images of clothes, 28x28, in 10 classes, with captions.

    apt-get install dataset-fashion-mnist        # or download its .deb and unpack it with dpkg -x
    mmvit prepare fashion-mnist data/fashion-mnist
    mmvit prepare fashion-mnist data/fashion-mnist --source folder-with-the-four-idx-files

It takes 15 s. Every sample has `png` (greyscale), `cls` (0 to 9) and `txt` (the name of the class). The
splits are the data set's own, train and test; train comes in a fixed mixed order.
"""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import encode_png
from mmvit.data.writing import Outcome, ShardWriter, refuse_other_data, write_dataset_card
from mmvit.errors import UserError
from mmvit.progress import with_progress

SOURCE = "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), IDX files"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
PREFIXES = {"train": "train", "test": "t10k"}  # of the file names


def main(
    out: Annotated[Path, Argument(help="folder to write the shards to")],
    source: Annotated[Path, Option(help="folder of the IDX files")] = PACKAGE_FOLDER,
    samples_per_shard: Annotated[int, Option(help="samples in one tar file")] = 5000,
) -> None:
    refuse_other_data(out, SOURCE)
    data = {split: read_split(source, prefix) for split, prefix in PREFIXES.items()}
    outcome = Outcome()
    for split, (images, labels) in data.items():
        order = range(len(images))
        if split == "train":
            order = sorted(order, key=lambda number: hashlib.sha256(str(number).encode()).digest())
        with ShardWriter(out, split, samples_per_shard) as writer:
            for number in with_progress(order, len(images), f"writing {split}"):
                label = int(labels[number])
                files = {
                    "png": encode_png(images[number]),
                    "cls": b"%d" % label,
                    "txt": CLASSES[label].encode(),
                }
                writer.write(f"{split}-{number:05d}", files)
                outcome.wrote(split, files["png"], CLASSES[label])
    write_dataset_card(out, outcome, classes=CLASSES, source=SOURCE, licence="MIT")
    outcome.print(out)


def read_split(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (count, 28, 28) and labels uint8 (count,)."""
    images = read_idx(find(source, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(find(source, f"{prefix}-labels-idx1-ubyte"))
    last = labels.max(initial=0)
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or last >= len(CLASSES):
        raise UserError(
            f"{source}: {prefix} has images {images.shape}, labels {labels.shape} up to {last}; "
            "expected (n, 28, 28), (n,) and at most 9"
        )
    return images, labels


def find(source: Path, name: str) -> Path:
    for path in (source / f"{name}.gz", source / name):
        if path.is_file():
            return path
    raise UserError(
        f"no {name}[.gz] in {source}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist; "
        "without root: apt-get download dataset-fashion-mnist, dpkg -x dataset-fashion-mnist*.deb fm, and "
        f"--source fm{PACKAGE_FOLDER}; or --source FOLDER with the four files from the project's page"
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes: 00 00 08, number of axes, their big-endian lengths, data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ')}, not 00 00 08"
        )
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if pixels.size != np.prod(shape):
        raise UserError(
            f"{path} has {pixels.size:,} bytes of data, but its header says {shape}; download it again"
        )
    return pixels.reshape(shape)


if __name__ == "__main__":
    run_script(main)
