"""Turns shards of pictures into shards of image codes, once, so that training a generator never touches
pixels.

    python pipelines/encode_images.py data/emoji data/emoji-codes --tokenizer tokenizers/emoji-image

takes 20 s for 3953 emoji on 2 cores. Every split of the source is encoded; a sample keeps its captions and
class, loses its picture and gains `codes.npy` (rows, columns). dataset.json says which tokenizer made the
codes, and training checks it.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from mmvit.data.codes import MAX_CODES, pack_codes
from mmvit.data.images import decode_image, parse_size, to_unit_range
from mmvit.data.samples import IMAGE_EXTENSIONS, image_bytes
from mmvit.data.shards import BadSample, Sample, expand_shards
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    inherited_facts,
    read_dataset_card,
    read_samples,
    with_progress,
    write_dataset_card,
)
from mmvit.errors import UserError, run_script
from mmvit.hub import fingerprint
from mmvit.models.image_tokenizer import ImageTokenizer, load_image_tokenizer

BATCH = 64


def main() -> None:
    options = parse_arguments()
    if options.source.resolve() == options.out.resolve():
        raise UserError(f"{options.out} is the source itself; name another folder for the codes")
    tokenizer = load_image_tokenizer(options.tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
    grid = tokenizer.grid(*options.size)
    if tokenizer.codebook_size > MAX_CODES:
        raise UserError(
            f"{options.tokenizer} has {tokenizer.codebook_size} codes, shards hold {MAX_CODES} at most"
        )
    splits = find_splits(options.source)
    make_room(options.out, splits)
    card, outcome = read_dataset_card(options.source), Outcome()
    for split, shards in splits.items():
        samples = with_progress(
            read_pictures(shards, options.size, outcome),
            card.get("samples", {}).get(split),
            f"encoding {split}",
        )
        with ShardWriter(options.out, split) as writer:
            for sample, codes in encode(tokenizer, samples):
                files = {name: data for name, data in sample.files.items() if name not in IMAGE_EXTENSIONS}
                writer.write(sample.key, {**files, "codes.npy": pack_codes(codes)})
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
    write_dataset_card(options.out, outcome, **{**facts, "image_tokenizer": made})
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
    return parser.parse_args()


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """`train-000000.tar`, ... by split."""
    splits: dict[str, list[Path]] = {}
    for shard in expand_shards(folder):
        splits.setdefault(split_of(shard), []).append(shard)
    return splits


def split_of(shard: Path) -> str:
    return shard.stem.rpartition("-")[0] or shard.stem


def make_room(out: Path, splits: Iterable[str]) -> None:
    """Codes that were there lose what says whose they are, before the first of them is replaced.

    Raises:
        UserError: when some would stay, because the source has nothing in their place.
    """
    there = {split_of(shard) for shard in out.glob("*.tar")}
    if left := there - set(splits):
        raise UserError(
            f"{out} holds shards of {', '.join(sorted(left))}, which the source does not have; remove them, "
            "or name another folder"
        )
    (out / "dataset.json").unlink(missing_ok=True)


def read_pictures(
    shards: list[Path], size: tuple[int, int], outcome: Outcome
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples with their pixels (3, height, width) in [-1, 1]; those without a readable picture are
    counted."""
    for sample in read_samples(shards, outcome):
        try:
            yield sample, to_unit_range(decode_image(image_bytes(sample), size))
        except BadSample as bad:
            outcome.skip(bad.reason, sample.key)


def encode(
    tokenizer: ImageTokenizer, samples: Iterator[tuple[Sample, np.ndarray]]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """The samples with their codes (rows, columns)."""
    device = next(tokenizer.parameters()).device
    group: list[tuple[Sample, np.ndarray]] = []
    for item in samples:
        group.append(item)
        if len(group) == BATCH:
            yield from encode_group(tokenizer, group, device)
            group = []
    if group:
        yield from encode_group(tokenizer, group, device)


def encode_group(
    tokenizer: ImageTokenizer, group: list[tuple[Sample, np.ndarray]], device: torch.device
) -> Iterator[tuple[Sample, np.ndarray]]:
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in group])).to(device)
    codes = tokenizer.encode(pixels).cpu().numpy()
    return zip((sample for sample, _ in group), codes, strict=True)


if __name__ == "__main__":
    run_script(main)
