"""The data stream: shards → shuffled, decoded batches, over ranks and workers, with an exact position."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmvit.errors import UserError
from mmvit.streams.index import samples_promised
from mmvit.streams.order import Order
from mmvit.streams.reader import Batch, Decode, Delivery, Reader
from mmvit.streams.remote_index import indexes_of
from mmvit.streams.shards import BadShard, expand_shards
from mmvit.streams.tally import Tally
from mmvit.streams.workers import end_with_parent


class WorkerKilled(UserError):
    """A process of the stream has died, and with it the samples that it held."""


class ShardStream:
    """Iterates over the batches of this rank.

    Args:
        shards: a pattern, folder or list as `expand_shards` takes it.
        decode: a picklable callable (sample, rng) -> dict of numpy arrays, numbers or strings, or None to
            drop the sample silently. `rng` is seeded by (seed, epoch, sample key), and by the copy's number
            if a shard is named several times, so augmentation depends on neither worker nor rank. An entry
            `counts` (str → int) is summed in `report()` and stays out of the batch. It raises BadSample for
            a sample that cannot be used. Its attribute `needs`, if any, lists groups of extensions; a sample
            must have one of each group, such as `[("png", "jpg"), ("cls",)]`.
        batch_size: samples per batch of this rank.
        seed: for the order, and the samples' generators.
        num_workers: processes that read and decode; 0 means this process.
        shuffle_buffer: samples among which the order is mixed (`Order`); 0 keeps the order of the shards.
        repeat: True goes on forever in full batches; a sample that cannot be used is replaced by another one
            of the epoch. False is one epoch: every sample once over all ranks; the last batch may be short,
            and a rank may have none; iterating again repeats the same epoch.
        max_bad: share of bad samples (beyond ten in all) at which the stream stops.

    The samples that all ranks together get at a step depend on neither their number nor that of workers: the
    position is the number of samples that all have got, and any number of ranks can go on from it.

    Iterating raises UserError for a shard without the needed extensions and for too many bad samples. Batches
    are dicts of stacked tensors, plus `keys`, the samples' keys.
    """

    def __init__(
        self,
        shards: str | Path | list[str | Path],
        decode: Decode,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_buffer: int = 1000,
        repeat: bool = True,
        max_bad: float = 0.01,
    ):
        self.shards = expand_shards(shards)
        self.num_workers = num_workers
        self.max_bad = max_bad
        self.repeat = repeat
        self.settings = {
            "decode": decode,
            "batch_size": batch_size,
            "rank": rank,
            "world_size": world_size,
            "repeat": repeat,
            "max_bad": max_bad,
        }
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.samples_a_batch = batch_size * world_size
        self.consumed = 0
        self.before = Tally()  # of earlier iterations
        self.of_workers: dict[int, Tally] = {}

    @cached_property
    def reader(self) -> Reader:
        indexes = indexes_of(self.shards)
        order = Order([index.samples for index in indexes], self.seed, self.shuffle_buffer)
        return Reader(self.shards, indexes, order, **self.settings)

    @property
    def samples(self) -> int:
        """The samples of an epoch."""
        return self.reader.order.total

    @cached_property
    def layout(self) -> dict[str, Any]:
        """What a position depends on."""
        return {
            "shards": [shard.name for shard in self.shards],
            "samples": self.samples,
            "samples_per_shard": self.reader.order.digest,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "order": self.reader.order.version,
        }

    def __iter__(self) -> Iterator[Batch]:
        """Continues from the current position."""
        self.count_broken_shards()
        if not self.samples:
            if not self.repeat:
                return
            broken = self.before.broken()
            reasons = f" ({'; '.join(broken)})" if broken else ""
            raise UserError(f"found no sample in the shards of {self.shards[0].parent}{reasons}")
        self.before, self.of_workers = self.tally, {}
        with closing(self.deliveries()) as deliveries:
            for delivery in deliveries:
                if delivery.crash:
                    raise RuntimeError(f"a data worker failed:\n\n{delivery.crash}")
                for problem in delivery.tally.news(self.tally):
                    warnings.warn(problem, stacklevel=2)
                self.of_workers[delivery.worker] = delivery.tally
                if delivery.error:
                    raise UserError(delivery.error)
                self.consumed += self.samples_a_batch
                self.tally.check(self.max_bad)
                if delivery.batch is not None:
                    yield delivery.batch
        self.consumed = 0

    def count_broken_shards(self) -> None:
        found, known = Tally(), self.tally.broken_shards
        for shard, index in zip(self.shards, self.reader.indexes, strict=True):
            path = str(shard)
            if not index.problem or path in found.broken_shards:
                continue
            found.broken_shards[path] = text = str(BadShard(shard, index.problem))
            if (promised := samples_promised(shard)) is not None:
                found.lost[path] = max(0, promised - index.samples)
            if path not in known:
                warnings.warn(f"{text}; its other samples are used" if index.samples else text, stacklevel=3)
        self.before = self.before.plus(found)
        self.tally.check(self.max_bad)

    def deliveries(self) -> Generator[Delivery, None, None]:
        self.reader.plan(self.consumed).prepare()
        if self.num_workers == 0:
            yield from self.reader.deliver(0, 1, self.consumed)
            return
        ending = multiprocessing.RawValue(ctypes.c_bool, False)  # no lock, which a dead worker could hold
        loader = DataLoader(
            Deliveries(self.reader, self.consumed, ending),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=partial(become_worker, ending),
            generator=torch.Generator(),  # drawing from the global one would change a model's dropout
        )

        def end_workers() -> None:
            ending.value = True

        atexit.register(end_workers)  # a stream may still be open then; multiprocessing waits for its workers
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        deliveries = iter(loader)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)  # torch's raises anywhere, even within an optimizer step
        try:
            yield from deliveries
        except (
            RuntimeError,
            OSError,
            EOFError,
        ) as error:  # the last two: it died while it handed a batch over
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise WorkerKilled(
                "a data worker was killed, often for lack of memory: lower train.num_workers"
            ) from None
        finally:
            end_workers()  # before the loader's iterator goes, with this frame, and waits for them
            atexit.unregister(end_workers)

    @property
    def tally(self) -> Tally:
        """The counts of this rank."""
        return reduce(Tally.plus, self.of_workers.values(), self.before)

    def report(self) -> dict[str, Any]:
        """`read`, `skipped` (reason → count), `examples` (reason → first case), `broken_shards` (path →
        problem), and the decoder's counts."""
        tally = self.tally
        return {
            "read": tally.read,
            "skipped": dict(tally.skipped),
            "examples": dict(tally.examples),
            "broken_shards": dict(tally.broken_shards),
            **tally.counts,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch yielded, as plain numbers, strings, lists and dicts."""
        return {"layout": self.layout, "consumed": self.consumed, "tally": asdict(self.tally)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state` with exactly the batches of an uninterrupted run.

        With other shards, seed or shuffle buffer that is impossible; the stream then warns and continues with
        the next epoch.
        """
        if "positions" in state:
            state = from_reader_positions(state)
        layout = self.layout
        before = {"samples_per_shard": layout["samples_per_shard"], **state["layout"]}  # new in 2026-12
        changed = [name for name, value in layout.items() if before.get(name) != value]
        self.consumed = state["consumed"]
        if changed:
            epoch = -(-self.consumed // before["samples"])
            self.consumed = epoch * layout["samples"]
            warnings.warn(
                f"the data position was saved with other {', '.join(changed)}: continuing with epoch {epoch}",
                stacklevel=2,
            )
        self.before, self.of_workers = Tally(**state["tally"]), {}


def from_reader_positions(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a stream of before 2026-12, where each reader had a position of its own, as one that
    continues with the next epoch."""
    positions = state["positions"]
    tally = reduce(Tally.plus, (Tally(**position["tally"]) for position in positions))
    epoch = 1 + max(position["epoch"] for position in positions)
    return {"layout": {"samples": 1, "order": "of readers"}, "consumed": epoch, "tally": asdict(tally)}


def split_state(states: Sequence[dict[str, Any]], rank: int, same_world: bool = False) -> dict[str, Any]:
    """The state of this rank of a stream of which all ranks had the `states`. The position is that of all; in
    another number of ranks, rank 0 has all of their counts."""
    first = states[0]
    if "streams" in first:  # several
        parts = zip(*(state["streams"] for state in states), strict=True)
        return {"streams": [split_state(part, rank, same_world) for part in parts]}
    states = [from_reader_positions(state) if "positions" in state else state for state in states]
    if "tally" not in states[0]:
        return states[rank] if same_world else first
    furthest = max(states, key=lambda state: state["consumed"])  # readers were not in the same epoch
    counted = states[rank : rank + 1] if same_world else states if rank == 0 else ()
    tallies = (Tally(**state["tally"]) for state in counted)
    return {**furthest, "tally": asdict(reduce(Tally.plus, tallies, Tally()))}


class Deliveries(IterableDataset):
    """Gives each process of the loader every `num_workers`-th batch, in the order in which it asks them."""

    def __init__(self, reader: Reader, start: int, ending: ctypes.c_bool):
        self.reader, self.start, self.ending = reader, start, ending

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        try:
            yield from self.reader.deliver(info.id, info.num_workers, self.start, lambda: self.ending.value)
        except Exception:
            yield Delivery(info.id, Tally(), None, crash=traceback.format_exc())


def become_worker(ending: ctypes.c_bool, worker: int) -> None:
    """Makes this process end with the main process, and leave signals to it.

    Ctrl-C, a scheduler's SIGTERM, and the like reach the whole process group; the main process then saves a
    checkpoint, for which it may still need batches. A SIGTERM counts once the main process has set `ending`.
    """
    end_with_parent()
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def end_if_asked(*_: object) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_if_asked)
    end_if_asked()  # for a SIGTERM that came before
