"""The data stream: shards → shuffled, decoded batches, over ranks and workers, with an exact position."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmvit.data.reader import Batch, Decode, Delivery, Position, Reader
from mmvit.data.shards import expand_shards
from mmvit.data.tally import Tally
from mmvit.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent is gone


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
        seed: for the shard order, the shuffling and the samples' generators.
        num_workers: processes that read and decode; 0 means this process.
        shuffle_buffer: samples held back (per worker, undecoded) to draw from at random; 0 reads everything
            in order.
        repeat: True goes on forever in full batches; each worker begins its next epoch on its own. False is
            one epoch: every sample once over all ranks and workers. Each worker's last batch may be short,
            and ranks may have different numbers of batches; iterating again repeats the same epoch.
        max_bad: share of bad samples (beyond ten in all) at which the stream stops.

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
        lanes = max(1, num_workers)  # readers of this rank
        self.readers = [
            Reader(
                shards=self.shards,
                decode=decode,
                batch_size=batch_size,
                seed=seed,
                number=rank * lanes + lane,
                num_readers=world_size * lanes,
                shuffle_buffer=shuffle_buffer,
                repeat=repeat,
                max_bad=max_bad,
            )
            for lane in range(lanes)
        ]
        self.layout = {
            "shards": [shard.name for shard in self.shards],
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "num_workers": lanes,
            "shuffle_buffer": shuffle_buffer,
        }
        self.positions = [Position() for _ in self.readers]
        self.next_worker = 0

    def __iter__(self) -> Iterator[Batch]:
        """Continues from the current position."""
        with closing(self.deliveries()) as deliveries:
            for delivery in deliveries:
                if delivery.crash:
                    raise RuntimeError(f"a data worker failed:\n\n{delivery.crash}")
                for problem in delivery.position.tally.news(self.positions[delivery.worker].tally):
                    warnings.warn(problem, stacklevel=2)
                self.positions[delivery.worker] = delivery.position
                self.next_worker = (delivery.worker + 1) % len(self.readers)
                if delivery.error:
                    raise UserError(delivery.error)
                self.tally.check(self.max_bad)
                if delivery.batch is not None:
                    yield delivery.batch
        self.positions = [Position(tally=position.tally) for position in self.positions]
        self.next_worker = 0

    def deliveries(self) -> Generator[Delivery, None, None]:
        if self.num_workers == 0:
            yield from self.readers[0].deliver(0, self.positions[0])
            return
        # The loader asks its processes in turn, from the first, which therefore has to be lane `next_worker`.
        order = [(self.next_worker + place) % self.num_workers for place in range(self.num_workers)]
        ending = multiprocessing.RawValue(ctypes.c_bool, False)  # no lock, which a dead worker could hold
        loader = DataLoader(
            Lanes([(lane, self.readers[lane], self.positions[lane]) for lane in order], ending),
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
                "a data worker was killed, often for lack of memory: lower train.num_workers or "
                "data.shuffle_buffer"
            ) from None
        finally:
            end_workers()  # before the loader's iterator goes, with this frame, and waits for them
            atexit.unregister(end_workers)

    @property
    def tally(self) -> Tally:
        """The counts of all workers of this rank."""
        return reduce(Tally.plus, (position.tally for position in self.positions))

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
        return {
            "layout": self.layout,
            "positions": [asdict(position) for position in self.positions],
            "next_worker": self.next_worker,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state` with exactly the batches of an uninterrupted run.

        With other shards, seed, ranks, workers or shuffle buffer that is impossible; the stream then warns
        and continues with the next epoch.
        """
        positions = [
            Position(**{**position, "tally": Tally(**position["tally"])}) for position in state["positions"]
        ]
        changed = [name for name, value in self.layout.items() if state["layout"].get(name) != value]
        if changed:
            epoch = 1 + max(position.epoch for position in positions)
            warnings.warn(
                f"the data position was saved with other {', '.join(changed)}: continuing with epoch {epoch}",
                stacklevel=2,
            )
            tally = reduce(Tally.plus, (position.tally for position in positions))
            positions = [Position(epoch) for _ in self.readers]
            positions[0].tally = tally
        self.positions = positions
        self.next_worker = 0 if changed else state["next_worker"]


class Lanes(IterableDataset):
    """Gives each process of the loader its reader and its position."""

    def __init__(self, lanes: list[tuple[int, Reader, Position]], ending: ctypes.c_bool):
        self.lanes, self.ending = lanes, ending

    def __iter__(self) -> Iterator[Delivery]:
        lane, reader, position = self.lanes[get_worker_info().id]
        try:
            yield from reader.deliver(lane, position, lambda: self.ending.value)
        except Exception:
            yield Delivery(lane, position, None, crash=traceback.format_exc())


def become_worker(ending: ctypes.c_bool, worker: int) -> None:
    """Makes this process end with the main process, and leave signals to it.

    Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the main process then saves a
    checkpoint, for which it may still need batches. A SIGTERM counts once the main process has set `ending`.
    """
    if sys.platform == "linux":  # else a process killed for its memory leaves workers that wait for ever
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_if_asked(*_: object) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_if_asked)
    end_if_asked()  # for a SIGTERM that came before
