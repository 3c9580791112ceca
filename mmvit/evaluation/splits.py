"""Splits of a data set: which of them is held out, and reading one, or a sample of it, into memory."""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvit.errors import MissingData, UserError, did_you_mean
from mmvit.evaluation.held_out import evenly_spread
from mmvit.progress import with_progress
from mmvit.streams.order import Order, Span
from mmvit.streams.reader import Batch, Decode
from mmvit.streams.shards import (
    HELD_OUT,
    OLD_HELD_OUT,
    Sample,
    expand_shards,
    read_shard,
    shards_of,
    split_of,
)
from mmvit.streams.stream import ShardStream

# names that held-out splits go by; the first one that a data set has is measured by default
HELD_OUT_SPLITS = ("combinations", HELD_OUT, OLD_HELD_OUT, "test", "val", "validation")
READ_AT_ONCE = 256  # samples
MOST_MEMORY, BYTES_PER_PIXEL = 16, 4 * 3  # GiB; three floats


def find_split(folder: Path, split: str | None = None) -> str:
    """`split`, or the held-out split that `folder` has.

    Raises:
        UserError: if there is no such split; the message lists those that there are.
    """
    there = splits_in(folder)
    if split is not None:
        if split not in there and not (split == HELD_OUT and OLD_HELD_OUT in there):
            raise UserError(f"{folder} has no split {split!r}{did_you_mean(split, there)}")
        return split
    for name in HELD_OUT_SPLITS:
        if name in there:
            return name
    raise UserError(
        f"{folder} has no held-out split ({', '.join(HELD_OUT_SPLITS)}), only {', '.join(there)}: choose one "
        "with --split"
    )


def splits_in(folder: Path) -> list[str]:
    return list(dict.fromkeys(split_of(shard) for shard in expand_shards(folder)))


def listed(names: str | Sequence[str]) -> list[str]:
    """`"en,de"`, or a list of such names, as a list."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def files_of(folder: Path, split: str) -> set[str]:
    """The extensions of a split's first sample."""
    for sample in itertools.chain.from_iterable(map(read_shard, shards_of(folder, split))):
        return {*sample.files}
    return set()


def num_samples(folder: Path, split: str) -> int:
    """How many samples a split, `*` for all splits, has."""
    return in_order(folder, split, keys_alone).samples


def read_split(folder: Path, split: str, decode: Decode, most: int | None = None) -> dict[str, Any]:
    """The samples of a split, `*` for all splits, in order: {"keys": [...], ...} with what `decode` returns,
    tensors stacked into one and the rest as lists.

    Args:
        most: of a split with more samples, only so many are read, evenly spread over it.

    Raises:
        UserError: if the split has no samples or a shard is damaged.
    """
    batches = list(batches_of(folder, split, decode, most=most))
    whole: dict[str, Any] = {}
    for name, value in batches[0].items():
        parts = [batch[name] for batch in batches]
        is_tensor = isinstance(value, Tensor)
        whole[name] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    return whole


def batches_of(
    folder: Path, split: str, decode: Decode, what: str = "reading", most: int | None = None
) -> Iterator[Batch]:
    """The batches of a split, `*` for all splits, in order, with progress.

    Args:
        most: as for `read_split`.

    Raises:
        UserError: if the split has no samples, or at its end if a shard is damaged: figures of the rest would
            not compare with others.
    """
    stream = in_order(folder, split, decode)
    name = "all splits" if split == "*" else split
    if most is not None and most < stream.samples:
        name = f"{most:,} of the {stream.samples:,} samples of {name}"
        stream.reader = replace(stream.reader, order=Spread(stream.reader.order, most))
    is_empty = True
    for batch in with_progress(stream, stream.samples, f"{what} {name}", lambda batch: len(batch["keys"])):
        is_empty = False
        yield batch
    for problem in stream.report()["broken_shards"].values():
        raise UserError(f"{problem}; figures of the rest would not compare with others: write it again")
    if is_empty:
        reasons = stream.tally.reasons()
        usable = f" that can be used: {reasons}" if reasons else ""
        raise MissingData(f"{folder}/{split}-*.tar holds no samples{usable}")


def in_order(folder: Path, split: str, decode: Decode) -> ShardStream:
    return ShardStream(shards_of(folder, split), decode, READ_AT_ONCE, shuffle_buffer=0, repeat=False)


class Spread:
    """`total` places, evenly spread over an order that has more and does not shuffle."""

    shuffle_buffer = 0

    def __init__(self, order: Order, total: int):
        self.order, self.seed, self.total = order, order.seed, total
        self.places = evenly_spread(order.total, total).tolist()

    def locate(self, epoch: int, place: int) -> tuple[int, int]:
        return self.order.locate(epoch, self.places[place])

    def spans(self, epoch: int, place: int, rank: int, world_size: int) -> list[list[Span]]:
        """As of `Order`, for one rank: every sample by itself."""
        located = [(*self.locate(epoch, number), number) for number in range(place, self.total)]
        return [[Span(shard, sample, sample + 1, 0, number) for shard, sample, number in located]]

    def earliest(self, span: Span, sample: int) -> int:
        return span.begin


def keys_alone(sample: Sample, rng: random.Random) -> dict[str, Any]:
    """Decodes nothing: the keys are added anyway."""
    return {}


@dataclass(frozen=True)
class Only:
    """Decodes the samples of these keys and passes over the others."""

    keys: Collection[str]
    decode: Decode

    @property
    def needs(self) -> Sequence[Sequence[str]]:
        return getattr(self.decode, "needs", ())

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any] | None:
        return self.decode(sample, rng) if sample.key in self.keys else None


def check_memory(images: int, size: tuple[int, int]) -> None:
    """Raises UserError if so many images of `size` pixels take more memory than `MOST_MEMORY`."""
    if (needed := images * size[0] * size[1] * BYTES_PER_PIXEL / 2**30) > MOST_MEMORY:
        raise UserError(
            f"{images:,} images of {size[0]}x{size[1]} pixels take {needed:,.0f} GiB of memory, more than "
            f"{MOST_MEMORY}: measure fewer with --limit"
        )
