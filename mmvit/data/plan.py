"""The plan of an epoch: which reader (rank x worker) reads which part of which shard, given the seed."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Part(NamedTuple):
    """Every `step`-th sample of a shard, starting at number `first`. A shard that is named several times is
    read as copy 0, 1, ..."""

    shard: Path
    first: int
    step: int
    copy: int = 0


def plan_epoch(
    shards: Sequence[Path], seed: int, epoch: int, reader: int, num_readers: int, shuffle: bool
) -> list[Part]:
    """The parts that one reader reads in one epoch. All readers together read every sample as often as its
    shard is named.

    With at least as many shards as readers, each reader gets whole shards; otherwise readers share a shard
    and each takes every k-th sample. `shuffle` permutes the shards anew in every epoch.
    """
    named: Counter[Path] = Counter()
    order = []
    for shard in shards:
        order.append((shard, named[shard]))
        named[shard] += 1
    if shuffle:
        random_from(seed, epoch, "shards").shuffle(order)
    if len(order) >= num_readers:
        return [Part(shard, 0, 1, copy) for shard, copy in order[reader::num_readers]]
    mine = reader % len(order)
    sharers = range(mine, num_readers, len(order))
    shard, copy = order[mine]
    return [Part(shard, sharers.index(reader), len(sharers), copy)]


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
    """A generator seeded by all of `parts`, the same on every machine and in every process."""
    return random.Random("/".join(map(str, parts)))
