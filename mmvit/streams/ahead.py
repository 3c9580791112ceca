"""Fetching the pieces of remote shards in the order in which a reader will need them, some time before."""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache, partial

from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.cache import SIZE, the_cache
from mmvit.streams.index import Index
from mmvit.streams.order import Order, Span
from mmvit.streams.packed import Unpacked, opened
from mmvit.streams.pieces import Fetchers, RemoteFile
from mmvit.streams.workers import processes_here

BYTES_AHEAD = 2**28  # that are fetched before they are needed
INDEXES_AT_ONCE = 16


class Plan:
    """The pieces that a rank reads from sample number `start` on, in the order in which it needs them."""

    def __init__(self, order: Order, indexes: Sequence[Index], start: int, rank: int, world_size: int):
        self.order, self.indexes, self.start = order, indexes, start
        self.rank, self.world_size = rank, world_size
        self.file = lru_cache(maxsize=1024)(opened)

    def spans(self, epoch: int) -> list[list[Span]]:
        place = max(0, self.start - epoch * self.order.total)
        rank = self.start + self.rank - epoch * self.order.total
        found = self.order.spans(epoch, place, rank, self.world_size)
        return [[span for span in spans if self.is_remote(span.shard)] for spans in found]

    def is_remote(self, shard: int) -> bool:
        return isinstance(self.indexes[shard].shard, Address | Unpacked)

    def pieces(self, epoch: int) -> Iterator[tuple[int, RemoteFile, int]]:
        """The number of the sample before which it is needed, the file, and the number of the piece."""
        yield from heapq.merge(
            *map(partial(self.of_lane, epoch), self.spans(epoch)), key=lambda piece: piece[0]
        )

    def of_lane(self, epoch: int, spans: list[Span]) -> Iterator[tuple[int, RemoteFile, int]]:
        before = None
        for span in spans:
            ends = self.indexes[span.shard].ranges[span.first : span.last, 1]
            begin = int(self.indexes[span.shard].ranges[span.first, 0])
            file = self.file(self.indexes[span.shard].shard)
            for number in range(begin // file.piece, (int(ends[-1]) - 1) // file.piece + 1):
                if (file, number) == before:
                    continue
                before = file, number
                sample = span.first + int(ends.searchsorted(number * file.piece, side="right"))
                yield epoch * self.order.total + self.order.earliest(span, sample), file, number

    @cached_property
    def has_any(self) -> bool:
        return any(map(self.is_remote, range(len(self.indexes))))

    def prepare(self) -> None:
        """Loads the indexes that are needed first, several at once, as each takes a few requests.

        Raises:
            UserError: if one cannot be loaded, or the cache does not hold what is read at once.
        """
        if not self.has_any:
            return
        spans = self.spans(self.start // self.order.total)
        firsts = {span.shard for own in spans for span in own[:1]}
        with ThreadPoolExecutor(INDEXES_AT_ONCE) as pool:
            list(pool.map(lambda shard: self.indexes[shard].ranges, firsts))
        self.check_size()

    def check_size(self) -> None:
        pieces = self.pieces(self.start // self.order.total)
        needed_now = itertools.takewhile(self.is_needed_now, pieces)
        now = {(file.key, number): file.size_of(number) for _, file, number in needed_now}
        needed = 2 * sum(now.values()) * processes_here()
        if needed > (size := the_cache().size):
            raise UserError(
                f"data.cache_size: {size:,} bytes are too few, {needed:,} are read at once: make it larger "
                f"(or {SIZE} in the environment), or data.shuffle_buffer smaller"
            )

    def is_needed_now(self, piece: tuple[int, RemoteFile, int]) -> bool:
        return piece[0] < self.start + max(1, self.order.shuffle_buffer)


class Ahead:
    """A context manager in which the pieces of a plan are fetched. `reach` tells it how far reading is."""

    def __init__(self, plan: Plan, repeat: bool):
        self.plan, self.repeat, self.reached = plan, repeat, plan.start
        self.moved, self.is_over = threading.Condition(), False

    def __enter__(self) -> "Ahead":
        if self.plan.has_any:
            self.fetchers = Fetchers()
            threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.plan.has_any:
            self.is_over = True
            self.reach(self.reached)
            self.fetchers.close()

    def reach(self, number: int) -> None:
        """To be called before the sample of this number is read."""
        with self.moved:
            self.reached = number
            self.moved.notify()

    def run(self) -> None:
        total, ahead = self.plan.order.total, deque[tuple[int, int]]()
        first = self.plan.start // total
        with suppress(UserError):  # who reads it will be told
            for epoch in itertools.count(first) if self.repeat else [first]:
                self.wait(lambda: self.reached >= (epoch - 1) * total)  # noqa: B023
                for place, file, number in self.plan.pieces(epoch):
                    ahead.append((place, file.size_of(number)))
                    self.wait(lambda: self.is_near(ahead))
                    if self.is_over:
                        return
                    self.fetchers.do(partial(file.fetch, number))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.moved:
            self.moved.wait_for(lambda: self.is_over or condition())

    def is_near(self, ahead: deque[tuple[int, int]]) -> bool:
        """Whether the last of `ahead`, places and bytes, is needed soon; forgets those that were needed."""
        while len(ahead) > 1 and ahead[0][0] <= self.reached:
            ahead.popleft()
        return len(ahead) == 1 or sum(size for _, size in ahead) <= BYTES_AHEAD
