"""Turn shards of images into shards of image codes, once, so that training a generator never touches pixels.

    mmvit encode data/emoji data/emoji-codes
    mmvit encode data/photos data/photos-codes --tokenizer runs/photos-image --size 96

The first takes 20 s for 3,953 emoji on 2 cores. Every split of the source is encoded; a sample keeps its
captions and class, loses its image and gains `codes.npy` (rows, columns). dataset.json says which image
tokenizer made the codes, and training checks it.

    mmvit encode data/emoji data/emoji-augmented --augmented 8 --flip-unless "left right"

This also encodes eight augmented copies of every training image (`augmented.npy`), for a recipe's
`data.augmented`. Each copy is shifted by up to --shift pixels, and every second one is flipped, unless a
caption, in any language, has a word that begins with "left" or "right" ("leftwards").
"""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import read_caption, read_captions
from mmvit.data.codes import MAX_CODES, pack_codes
from mmvit.data.images import decode_image, has_shape, measure_image, parse_size, to_unit_range
from mmvit.data.lock import sole_writer
from mmvit.data.samples import AUGMENTED, IMAGE_EXTENSIONS, image_bytes
from mmvit.data.shards import BadSample, Sample, expand_shards, split_of
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    inherited_facts,
    read_dataset_card,
    read_samples,
    write_dataset_card,
)
from mmvit.errors import UserError
from mmvit.hub import fingerprint, trained_size
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.progress import with_progress

BATCH = 64
FIRST_JOINED = "\u0590"  # Hebrew, Arabic, Indic, Thai, Chinese, ...: behind Latin, Greek and Cyrillic
TRAIN = "train"  # the split whose images get augmented copies


def main(
    source: Annotated[Path, Argument(help="folder of shards with images")],
    out: Annotated[Path, Argument(help="folder to write shards of codes to")],
    tokenizer: Annotated[str, Option(help="image tokenizer: a folder, run or Hub repository")] = (
        "tokenizers/emoji-image"
    ),
    size: Annotated[
        str | None,
        Option(
            help="side, or HEIGHTxWIDTH, in pixels that images are resized to (default: what the tokenizer's "
            "run was trained on, else 64)"
        ),
    ] = None,
    augmented: Annotated[int, Option(min=0, help=f"augmented copies of each image of {TRAIN}")] = 0,
    shift: Annotated[int, Option(min=0, help="largest shift of augmented copies, in pixels each way")] = 2,
    flip_unless: Annotated[
        str, Option(help='flip every second copy, unless a caption has a word that begins so: "left right"')
    ] = "",
) -> None:
    facts = inherited_facts(source, out)
    height, width = parse_size(size) if size else trained_size(tokenizer)
    model = load_image_tokenizer(tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
    try:
        grid = model.grid(height, width)
    except UserError as error:
        raise UserError(f"--size {height}x{width} does not fit {tokenizer}: {error}") from None
    if model.codebook_size > MAX_CODES:
        raise UserError(f"{tokenizer} has {model.codebook_size:,} codes; shards hold at most {MAX_CODES:,}")
    splits = find_splits(source)
    numbers = read_dataset_card(source).get("samples", {})
    if any(out.glob("*.tar")):
        refuse_damaged(splits, sum(numbers.values()) or None)
    with sole_writer(out):
        make_room(out, splits)
        outcome = Outcome(numbers)
        copies = Copies(
            augmented, shift, tuple(re.split(r"[\s,]+", flip_unless.strip(" ,"))) if flip_unless else ()
        )
        for split, shards in splits.items():
            samples = read_images(shards, (height, width), outcome, copies if split == TRAIN else Copies())
            with ShardWriter(out, split) as writer:
                shown = with_progress(samples, numbers.get(split), f"encoding {split}")
                for sample, codes in encode(model, shown):
                    files = {
                        name: data for name, data in sample.files.items() if name not in IMAGE_EXTENSIONS
                    }
                    files["codes.npy"] = pack_codes(codes[0])
                    if len(codes) > 1:
                        files[AUGMENTED] = pack_codes(codes[1:])
                    writer.write(sample.key, files)
                    outcome.wrote(split)
        if not outcome.written:
            outcome.print(out)
            raise UserError(f"no image in {source} could be encoded")
        made = {
            "path": tokenizer,
            "size": [height, width],
            "grid": list(grid),
            "codebook_size": model.codebook_size,
            "fingerprint": fingerprint(model),
        }
        own = {name: fact for name, fact in facts.items() if not name.startswith("image_")}  # sizes, modes
        write_dataset_card(out, outcome, **own, image_tokenizer=made)
    outcome.print(out)


@dataclass(frozen=True)
class Copies:
    """How many augmented copies an image gets, how far each is shifted (pixels, each way), and which
    beginnings of words in a caption forbid flipping every second one. Without such words none is flipped."""

    number: int = 0
    shift: int = 0
    flip_unless: tuple[str, ...] = ()

    def of(self, sample: Sample, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (height, width, 3) → the image and its copies, drawn from a generator seeded by its key."""
        rng = random.Random(sample.key)
        may_flip = False
        if self.number and self.flip_unless:
            captions = [read_caption(sample, (), rng)] if "txt" in sample.files else []
            captions += read_captions(sample).values() if "json" in sample.files else []
            if not captions:
                raise BadSample("no caption", "neither a txt nor captions in a json say whether to flip it")
            text = normalized(" ".join(captions))
            may_flip = not any(re.search(beginning(word), text) for word in self.flip_unless)
        images = [pixels]
        for number in range(self.number):
            flip = float(may_flip and number % 2 == 1)
            images.append(Augment(AugmentConfig(crop_padding=self.shift, flip=flip))(pixels, rng))
        return images


def normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def beginning(word: str) -> str:
    """A pattern for where a word begins; for anywhere in scripts that join words or write them together."""
    word = normalized(word)
    is_joined = any(character >= FIRST_JOINED for character in word)
    return ("" if is_joined else r"(?<!\w)") + re.escape(word)


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """The shards `train-000000.tar`, ... by split."""
    splits: dict[str, list[Path]] = {}
    for shard in expand_shards(folder):
        splits.setdefault(split_of(shard), []).append(shard)
    return splits


def refuse_damaged(splits: Mapping[str, list[Path]], total: int | None) -> None:
    """Raises UserError for a damaged source, before all of its codes are replaced by fewer."""
    read = Outcome()
    shards = [shard for members in splits.values() for shard in members]
    for _ in with_progress(read_samples(shards, read), total, "checking the source"):
        pass
    for damaged in itertools.chain(*read.examples.values()):
        raise UserError(f"{damaged}; encoding again would leave fewer codes: repair it, or encode elsewhere")


def make_room(out: Path, splits: Iterable[str]) -> None:
    """Deletes the dataset.json that says which tokenizer made earlier codes, before these are replaced.

    Raises:
        UserError: if `out` holds shards without codes, or splits that the source does not have.
    """
    there = {split_of(shard) for shard in out.glob("*.tar")}
    if there and "image_tokenizer" not in read_dataset_card(out):
        raise UserError(f"{out} holds shards that mmvit encode did not make; name another folder")
    if left := there - set(splits):
        raise UserError(
            f"{out} holds shards of {', '.join(sorted(left))}, which the source does not have; remove them, "
            "or name another folder"
        )
    (out / "dataset.json").unlink(missing_ok=True)


def read_images(
    shards: list[Path], size: tuple[int, int], outcome: Outcome, copies: Copies
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples with the pixels of their image and its copies, (1 + copies, 3, height, width) in [-1, 1]; those
    without a readable image are counted."""
    for sample in read_samples(shards, outcome):
        try:
            data = image_bytes(sample)
            images = copies.of(sample, decode_image(data, size))
            if not has_shape(measure_image(data).size, size):
                outcome.note("cropped around the centre (mmvit shards --fit pad keeps all)", sample.key)
            yield sample, np.stack([to_unit_range(each) for each in images])
        except BadSample as bad:
            outcome.skip(bad.reason, sample.key)


def encode(
    tokenizer: ImageTokenizer, samples: Iterator[tuple[Sample, np.ndarray]]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """The samples with their codes, (1 + copies, rows, columns)."""
    device = next(tokenizer.parameters()).device
    group: list[tuple[Sample, np.ndarray]] = []
    for item in samples:
        group.append(item)
        if len(group) * len(item[1]) >= BATCH:
            yield from encode_group(tokenizer, group, device)
            group = []
    if group:
        yield from encode_group(tokenizer, group, device)


def encode_group(
    tokenizer: ImageTokenizer, group: list[tuple[Sample, np.ndarray]], device: torch.device
) -> Iterator[tuple[Sample, np.ndarray]]:
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in group])).to(device)
    codes = tokenizer.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).cpu().numpy()
    return zip((sample for sample, _ in group), codes, strict=True)


if __name__ == "__main__":
    run_script(main)
