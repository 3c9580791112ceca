"""The reader, one per worker: batches of samples at given places of the order, decoded."""

import copy
import itertools
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmvit.errors import UserError
from mmvit.streams.ahead import Ahead, Plan
from mmvit.streams.cache import take_damaged
from mmvit.streams.index import Index
from mmvit.streams.order import LANES, Order, random_from
from mmvit.streams.packed import opened
from mmvit.streams.shards import BadSample, BadShard, Sample, read_shard, split_name
from mmvit.streams.tally import DAMAGED, Tally
from mmvit.streams.tar import MOST_BYTES, BadTar, Problem, read_files

Batch = dict[str, Any]
Decode = Callable[[Sample, random.Random], dict[str, Any] | None]
MOST_TRIES = 1000  # of other samples in place of one that cannot be used


def never() -> bool:
    return False


@dataclass
class Delivery:
    """What a worker sends: a batch, and its counts so far. `error` is a UserError's message, `crash` the
    traceback of any other exception."""

    worker: int
    tally: Tally
    batch: Batch | None
    error: str | None = None
    crash: str | None = None


@dataclass
class Reader:
    """Reads this rank's share of the samples at consecutive places, `batch_size` of every
    `world_size · batch_size`."""

    shards: list[Path]
    indexes: list[Index]
    order: Order
    decode: Decode
    batch_size: int
    rank: int
    world_size: int
    repeat: bool
    max_bad: float

    def __post_init__(self):
        named: Counter[Path] = Counter()
        self.copies = []  # 0, 1, ... for a shard that is named several times
        for shard in self.shards:
            self.copies.append(named[shard])
            named[shard] += 1
        lanes = LANES // math.gcd(self.world_size, LANES) if self.order.shuffle_buffer else 1
        self.opened = lru_cache(maxsize=2 * lanes)(opened)  # no more: open pieces that are evicted take space
        self.all_lack_files = lru_cache(maxsize=None)(self._all_lack_files)
        self.none_fits = lru_cache(maxsize=None)(self._none_fits)

    def __reduce__(self):  # caches and open files cannot be sent to a worker
        return Reader, tuple(getattr(self, field.name) for field in fields(self))

    def deliver(
        self, worker: int, num_workers: int, start: int, ended: Callable[[], bool] = never
    ) -> Iterator[Delivery]:
        """Yields every `num_workers`-th batch after `start` samples, until `ended()`. A UserError is sent as
        text: the loader would add a traceback."""
        tally = Tally()
        try:
            with Ahead(self.plan(start), self.repeat) as ahead:
                for number in itertools.count(worker, num_workers):
                    first = start + number * self.batch_size * self.world_size
                    if not self.repeat and first >= self.order.total:
                        return
                    ahead.reach(first)
                    samples = self.read(first, tally, ended)
                    if damaged := take_damaged():
                        tally.count({DAMAGED: len(damaged)})
                        tally.examples.setdefault(DAMAGED, damaged[0])
                    if ended():
                        return
                    yield Delivery(worker, copy.deepcopy(tally), collate(samples) if samples else None)
        except UserError as error:
            yield Delivery(worker, tally, None, error=str(error))

    def plan(self, start: int) -> Plan:
        return Plan(self.order, self.indexes, start, self.rank, self.world_size)

    def read(self, first: int, tally: Tally, ended: Callable[[], bool] = never) -> list[dict[str, Any]]:
        """The decoded samples of this rank's batch of those from number `first` on. With `repeat`, one that
        cannot be used is replaced by another of its epoch, so that batches are full."""
        samples = []
        for number in range(first + self.rank, first + self.batch_size * self.world_size, self.world_size):
            if ended() or (not self.repeat and number >= self.order.total):
                break
            epoch, place = divmod(number, self.order.total)
            sample = self.try_decode(epoch, place, tally)
            if sample is None and self.repeat:
                sample = self.replacement(epoch, place, tally, ended)
            if sample is not None:
                samples.append(sample)
        return samples

    def replacement(
        self, epoch: int, place: int, tally: Tally, ended: Callable[[], bool]
    ) -> dict[str, Any] | None:
        rng = random_from(self.order.seed, epoch, place, "replacement")
        for _ in range(MOST_TRIES):
            if ended():
                return None
            uncounted = Tally()  # it is counted at its own place
            if sample := self.try_decode(epoch, rng.randrange(self.order.total), uncounted, place):
                return sample
        raise UserError(f"none of {MOST_TRIES:,} samples of {self.shards[0].parent} can be used")

    def try_decode(self, epoch: int, place: int, tally: Tally, *instead_of: int) -> dict[str, Any] | None:
        """Decodes a sample; counts it in `tally` and returns None if that fails."""
        number, place = self.order.locate(epoch, place)
        key = f"sample {place + 1:,}"
        tally.read += 1
        try:
            found = self.find(number, place)
            key = found.key
            self.check_files(found)
            copies = (found.copy,) if found.copy else ()
            sample = self.decode_sample(found, random_from(self.order.seed, epoch, key, *copies, *instead_of))
        except BadSample as bad:
            tally.skip(bad.reason, f"{key} in {self.shards[number]}: {bad.detail}")
            tally.check(self.max_bad)
            return None
        if sample is None:
            return None
        tally.count(sample.pop("counts", {}))
        return {**sample, "keys": key}

    def decode_sample(self, sample: Sample, rng: random.Random) -> dict[str, Any] | None:
        """Raises BadSample for whatever its decoder raises, UserError if that is true of all samples."""
        try:
            return self.decode(sample, rng)
        except BadSample:
            raise
        except UserError as error:
            if self.none_fits(sample.shard):
                raise UserError(f"{sample.key} in {sample.shard}: {error}") from None
            raise BadSample("does not fit", str(error)) from None
        except Exception as error:
            raised = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(raised.filename).name}:{raised.lineno}"
            raise BadSample(f"{type(error).__name__} in {where}", str(error)) from None

    def check_files(self, sample: Sample) -> None:
        """Raises BadSample if a file is missing that `decode` needs, UserError if all samples lack it."""
        if missing := self.missing_files(sample):
            if self.all_lack_files(sample.shard):
                raise UserError(f"no sample of {sample.shard} has the files needed here: {missing}")
            raise BadSample("missing file", missing)

    def find(self, number: int, place: int) -> Sample:
        """Reads sample `place` of shard `number`."""
        index, shard = self.indexes[number], self.shards[number]
        start, end = (int(byte) for byte in index.ranges[place])
        if not 0 <= start < end <= start + MOST_BYTES:
            raise BadSample("changed shard", f"its index is damaged: bytes {start} to {end}")
        data = self.opened(index.shard).read(start, end)
        files, key = {}, None
        try:
            for item in read_files(BytesIO(data), part_at=start):
                if isinstance(item, Problem):
                    raise BadTar(item.text)
                own, extension = split_name(item.name)
                if not extension:
                    continue
                if own != (key := key or own):
                    raise BadTar(f"files of {key} and {own} in one sample")
                files[extension] = item.data
            if not files:
                raise BadTar("no files")
        except BadTar as error:
            raise BadSample(
                "changed shard", f"it is no longer as it was indexed, or damaged: {error}"
            ) from None
        return Sample(key, shard, files, self.copies[number])

    def missing_files(self, sample: Sample) -> str:
        """Which of the extensions that `decode` needs `sample` lacks, in words; "" if none."""
        groups = getattr(self.decode, "needs", [])
        missing = [group for group in groups if not any(name in sample.files for name in group)]
        if not missing:
            return ""
        text = f"needs {' and '.join(map(' or '.join, missing))}, has {', '.join(sorted(sample.files))}"
        if "codes.npy" in sample.files and any("png" in group for group in missing):
            text += " (this is a shard of codes: name the shards of images that they were made from)"
        return text

    def _all_lack_files(self, shard: Path) -> bool:
        try:
            return all(self.missing_files(sample) for sample in read_shard(shard))
        except BadShard:
            return True

    def _none_fits(self, shard: Path) -> bool:
        """Whether every sample of a shard is refused as that of other settings."""
        with suppress(BadShard):
            for sample in read_shard(shard):
                with suppress(Exception):
                    self.decode(sample, random.Random(0))
                    return False
        return True


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stacks the entries of samples: arrays and numbers become tensors, strings lists."""
    batch: Batch = {}
    for name, first in samples[0].items():
        try:
            values = [sample[name] for sample in samples]
            if isinstance(first, str):
                batch[name] = values
            elif isinstance(first, torch.Tensor):
                batch[name] = torch.stack(values)
            else:
                batch[name] = torch.from_numpy(np.stack(values))
        except Exception as error:
            error.add_note(f"while stacking {name} of {', '.join(sample['keys'] for sample in samples)}")
            raise
    return batch
