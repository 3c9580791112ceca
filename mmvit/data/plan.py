"""The plan of an epoch: which reader (rank x worker) reads which part of which shard, from the seed alone."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Part(NamedTuple):
    """Every `step`-th sample of a shard, beginning with number `first`."""

    shard: Path
    first: int
    step: int


def plan_epoch(
    shards: Sequence[Path], seed: int, epoch: int, reader: int, num_readers: int, shuffle: bool
) -> list[Part]:
    """The parts that one reader reads in one epoch; over all readers, every sample occurs once.

    With at least as many shards as readers, each reader gets whole shards; otherwise readers share a
    shard and each takes every k-th sample of it. `shuffle` permutes the shards anew in every epoch.
    """
    order = list(shards)
    if shuffle:
        random_from(seed, epoch, "shards").shuffle(order)
    if len(order) >= num_readers:
        return [Part(shard, 0, 1) for shard in order[reader::num_readers]]
    mine = reader % len(order)
    sharers = range(mine, num_readers, len(order))
    return [Part(order[mine], sharers.index(reader), len(sharers))]


def shuffled(items: Iterator[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """Yields `items` in random order, holding at most `buffer_size` of them; 0 keeps the order."""
    held: list[Item] = []
    for item in items:
        if len(held) < buffer_size:
            held.append(item)
        elif held:
            place = rng.randrange(len(held))
            held[place], item = item, held[place]
            yield item
        else:
            yield item
    rng.shuffle(held)
    yield from held


def random_from(*parts: object) -> random.Random:
    """A generator seeded by all of `parts`; the same on every machine and in every process."""
    return random.Random("/".join(map(str, parts)))
