"""The order of samples: a function of seed, epoch, shards and their sample counts, so that a position is one
number, whatever reads them."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np

LANES = 64
VERSION = 2  # of the order: raised with any change, so that no position in another order is taken for one
LARGE = 2**16  # samples of a window from which on NumPy mixes it, in a fiftieth of the time


class Order:
    """Which sample comes at each place of each epoch.

    Shuffled, the shards of an epoch are laid end to end in a random order, from a random place on, and cut
    into 64 lanes of equal length, from which samples are taken in turn. Lanes are numbered at random: as they
    lie, they would give a small batch few classes where shards are sorted by class. Within a lane, samples
    are mixed in windows: all windows together hold about `shuffle_buffer` samples. Reading in this order thus
    stays close to 64 places at a time, which follow one another, and of ranks whose number divides 64 each
    reads lanes of its own.

    Args:
        counts: samples in each shard.
        shuffle_buffer: 0 keeps the samples in order.
    """

    def __init__(self, counts: Sequence[int], seed: int, shuffle_buffer: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.window = -(-shuffle_buffer // LANES)
        self.total = int(self.counts.sum())
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.mixed = lru_cache(maxsize=2 * LANES)(self._mixed)

    def __reduce__(self):  # caches cannot be sent to a worker
        return Order, (self.counts, self.seed, self.shuffle_buffer)

    @property
    def version(self) -> int:
        return VERSION + (self.window > LARGE)

    @property
    def digest(self) -> str:
        """Of the counts: equal for shards that hold as many samples each."""
        return sha256(self.counts.astype("<i8").tobytes()).hexdigest()[:16]

    def locate(self, epoch: int, place: int) -> tuple[int, int]:
        """The shard, and the number of the sample within it, at `place` (from 0) of an epoch."""
        shards, ends, starts, offset = self.epoch(epoch)
        if self.shuffle_buffer:
            length, longer = divmod(self.total, LANES)
            place, lane = divmod(place, LANES)
            window, within = divmod(place, self.window)
            size = min(self.window, length + (lane < longer) - window * self.window)
            place = starts[lane] + window * self.window + int(self.mixed(epoch, lane, window, size)[within])
            place = (place + offset) % self.total
        at = int(np.searchsorted(ends, place, side="right"))
        return int(shards[at]), int(place - ends[at] + self.counts[shards[at]])

    def spans(self, epoch: int, place: int, rank: int, world_size: int) -> list[list["Span"]]:
        """What is read from `place` of an epoch on: the samples of each lane that has places `rank`, `rank` +
        `world_size`, ..., or, where samples keep their order, all in one."""
        if not self.shuffle_buffer:
            return [self._spans(epoch, 0, place, self.total, 0)]
        starts, offset = self.epoch(epoch)[2:]
        length, longer = divmod(self.total, LANES)
        begin = place // LANES // self.window * self.window
        apart = math.gcd(world_size, LANES)
        return [
            self._spans(epoch, lane, begin, length + (lane < longer), starts[lane] + offset)
            for lane in range(rank % apart, LANES, apart)
        ]

    def _spans(self, epoch: int, lane: int, begin: int, end: int, offset: int) -> list["Span"]:
        shards, ends, *_ = self.epoch(epoch)
        spans = []
        while begin < end:
            place = (begin + offset) % self.total
            at = int(np.searchsorted(ends, place, side="right"))
            first = int(place - ends[at] + self.counts[shards[at]])
            number = min(end - begin, int(ends[at]) - place)
            spans.append(Span(int(shards[at]), first, first + number, lane, begin))
            begin += number
        return spans

    def earliest(self, span: "Span", sample: int) -> int:
        """The place from which on a sample of a span may be read."""
        within = span.begin + sample - span.first
        return within // self.window * self.window * LANES + span.lane if self.window else within

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
        """The order of the shards, where each of them ends, where each lane begins, and from where."""
        shards, starts, offset = [*range(len(self.counts))], [0] * LANES, 0
        if self.shuffle_buffer:
            rng = random_from(self.seed, epoch, "shards")
            rng.shuffle(shards)
            offset = rng.randrange(self.total)
            length, longer = divmod(self.total, LANES)
            start = 0
            for lane in rng.sample(range(LANES), LANES):
                starts[lane] = start
                start += length + (lane < longer)
        return np.array(shards), self.counts[shards].cumsum(), starts, offset

    def _mixed(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        rng = random_from(self.seed, epoch, lane, window)
        if self.window > LARGE:
            seed = [rng.getrandbits(32) for _ in range(8)]
            places = np.random.RandomState(seed).permutation(size)  # the same in any version of NumPy
        else:
            places = [*range(size)]
            rng.shuffle(places)
        return np.array(places, dtype=np.uint32)  # a tenth of a list's memory, and all lanes hold one


class Span(NamedTuple):
    """Samples of a shard, from number `first` to `last`, that lie in a lane from `begin` on."""

    shard: int
    first: int
    last: int
    lane: int
    begin: int


def random_from(*parts: object) -> random.Random:
    """A generator seeded by all of `parts`, the same on every machine and in every process."""
    return random.Random("/".join(map(str, parts)))
