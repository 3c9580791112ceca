"""Turns shards of pictures into shards of image codes, once, so that training a generator never touches
pixels.

    python pipelines/encode_images.py data/emoji data/emoji-codes --tokenizer tokenizers/emoji-image

takes 20 s for 3953 emoji on 2 cores. Every split of the source is encoded; a sample keeps its captions and
class, loses its picture and gains `codes.npy` (rows, columns). dataset.json says which tokenizer made the
codes, and training checks it.

    python pipelines/encode_images.py data/emoji data/emoji-codes --views 8 --shift 2 \\
        --flip-unless left right clockwise counterclockwise links rechts

gives the samples of `train` eight more views each (`views.npy`), for `data.views` of a recipe: shifted by up
to two pixels, and every second one flipped, unless a caption, in any language, has a word that begins with
one of these ("leftwards").
"""

import argparse
import itertools
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import read_caption, read_captions
from mmvit.data.codes import MAX_CODES, pack_codes
from mmvit.data.images import decode_image, parse_size, to_unit_range
from mmvit.data.samples import IMAGE_EXTENSIONS, VIEWS, image_bytes
from mmvit.data.shards import BadSample, Sample, expand_shards, split_of
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    inherited_facts,
    read_dataset_card,
    read_samples,
    refuse_other_data,
    with_progress,
    write_dataset_card,
)
from mmvit.errors import UserError, refuse_source, run_script
from mmvit.hub import fingerprint
from mmvit.models.image_tokenizer import ImageTokenizer, load_image_tokenizer

BATCH = 64
FIRST_JOINED = "\u0590"  # Hebrew, Arabic, Indic, Thai, Chinese, ...: behind Latin, Greek and Cyrillic
TRAIN = "train"  # the split whose pictures are seen from more views


@dataclass(frozen=True)
class Views:
    """How many more views a picture has, how far each is moved (pixels, each way), and the beginnings of
    words that forbid, in a caption of any language, to flip every second one; none is flipped where none are
    given."""

    number: int = 0
    shift: int = 0
    flip_unless: tuple[str, ...] = ()

    def of(self, sample: Sample, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (height, width, 3) → the picture and its views, drawn by its key."""
        rng = random.Random(sample.key)
        may_flip = False
        if self.number and self.flip_unless:
            captions = [read_caption(sample, (), rng)] if "txt" in sample.files else []
            captions += read_captions(sample).values() if "json" in sample.files else []
            if not captions:
                raise BadSample("no caption", "has neither a txt nor captions in a json: may it be flipped?")
            text = normalized(" ".join(captions))
            may_flip = not any(re.search(beginning(word), text) for word in self.flip_unless)
        seen = [pixels]
        for view in range(self.number):
            flip = float(may_flip and view % 2 == 1)
            seen.append(Augment(AugmentConfig(crop_padding=self.shift, flip=flip))(pixels, rng))
        return seen


def normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def beginning(word: str) -> str:
    """A pattern of where a word begins so; of anywhere in scripts that join words or write them together."""
    word = normalized(word)
    is_joined = any(character >= FIRST_JOINED for character in word)
    return ("" if is_joined else r"(?<!\w)") + re.escape(word)


def main() -> None:
    options = parse_arguments()
    refuse_source(options.out, options.source)
    refuse_other_data(options.out, inherited_facts(options.source).get("source"))
    tokenizer = load_image_tokenizer(options.tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
    try:
        grid = tokenizer.grid(*options.size)
    except UserError as error:
        height, width = options.size
        raise UserError(f"--size {height}x{width} does not go with {options.tokenizer}: {error}") from None
    if tokenizer.codebook_size > MAX_CODES:
        raise UserError(
            f"{options.tokenizer} has {tokenizer.codebook_size} codes, shards hold {MAX_CODES} at most"
        )
    splits = find_splits(options.source)
    if any(options.out.glob("*.tar")):
        refuse_damaged(splits)
    make_room(options.out, splits)
    numbers = read_dataset_card(options.source).get("samples", {})
    outcome = Outcome(numbers)
    plan = Views(options.views, options.shift, tuple(options.flip_unless))
    for split, shards in splits.items():
        samples = with_progress(
            read_pictures(shards, options.size, outcome, plan if split == TRAIN else Views()),
            numbers.get(split),
            f"encoding {split}",
        )
        with ShardWriter(options.out, split) as writer:
            for sample, codes in encode(tokenizer, samples):
                files = {name: data for name, data in sample.files.items() if name not in IMAGE_EXTENSIONS}
                files["codes.npy"] = pack_codes(codes[0])
                if len(codes) > 1:
                    files[VIEWS] = pack_codes(codes[1:])
                writer.write(sample.key, files)
                outcome.wrote(split)
    if not outcome.written:
        outcome.print(options.out)
        raise UserError(f"no picture in {options.source} could be encoded")
    made = {
        "path": str(options.tokenizer),
        "size": list(options.size),
        "grid": list(grid),
        "codebook_size": tokenizer.codebook_size,
        "fingerprint": fingerprint(tokenizer),
    }
    facts = inherited_facts(options.source)
    own = {name: fact for name, fact in facts.items() if not name.startswith("image_")}  # sizes, modes
    write_dataset_card(options.out, outcome, **own, image_tokenizer=made)
    outcome.print(options.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of shards with pictures")
    parser.add_argument("out", type=Path, help="folder to write shards of codes to")
    parser.add_argument("--tokenizer", default="tokenizers/emoji-image", help="image tokenizer (%(default)s)")
    parser.add_argument(
        "--size",
        type=parse_size,
        default="64",
        help="side, or HEIGHTxWIDTH, in pixels that pictures are brought to (%(default)s)",
    )
    parser.add_argument("--views", type=int, default=0, help=f"more views of the split {TRAIN} (%(default)s)")
    parser.add_argument("--shift", type=int, default=2, help="pixels that views are moved by (%(default)s)")
    parser.add_argument(
        "--flip-unless",
        nargs="+",
        default=[],
        metavar="WORD",
        help="flip every second view, unless a caption, in any language, has a word that begins so",
    )
    options = parser.parse_args()
    for name in ("views", "shift"):
        if (number := getattr(options, name)) < 0:
            raise UserError(f"--{name} {number}: it is 0 or more")
    return options


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """`train-000000.tar`, ... by split."""
    splits: dict[str, list[Path]] = {}
    for shard in expand_shards(folder):
        splits.setdefault(split_of(shard), []).append(shard)
    return splits


def refuse_damaged(splits: Mapping[str, list[Path]]) -> None:
    """Raises UserError where a shard cannot be read to its end, before whole codes are replaced by fewer."""
    read = Outcome()
    for shards in splits.values():
        for _ in read_samples(shards, read):
            pass
    for damaged in itertools.chain(*read.examples.values()):
        raise UserError(f"{damaged}; codes that are there would become fewer: mend it, or encode elsewhere")


def make_room(out: Path, splits: Iterable[str]) -> None:
    """Codes that were there lose what says whose they are, before the first of them is replaced.

    Raises:
        UserError: when they are no codes, or some would stay, because the source has nothing in their place.
    """
    there = {split_of(shard) for shard in out.glob("*.tar")}
    if there and "image_tokenizer" not in read_dataset_card(out):
        raise UserError(f"{out} holds shards that are no codes of this script; name another folder")
    if left := there - set(splits):
        raise UserError(
            f"{out} holds shards of {', '.join(sorted(left))}, which the source does not have; remove them, "
            "or name another folder"
        )
    (out / "dataset.json").unlink(missing_ok=True)


def read_pictures(
    shards: list[Path], size: tuple[int, int], outcome: Outcome, views: Views
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples with their pixels and those of their views, (1 + views, 3, height, width) in [-1, 1]; those
    without a readable picture are counted."""
    for sample in read_samples(shards, outcome):
        try:
            seen = views.of(sample, decode_image(image_bytes(sample), size))
            yield sample, np.stack([to_unit_range(each) for each in seen])
        except BadSample as bad:
            outcome.skip(bad.reason, sample.key)


def encode(
    tokenizer: ImageTokenizer, samples: Iterator[tuple[Sample, np.ndarray]]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """The samples with their codes, (1 + views, rows, columns)."""
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
