"""The reader, one per rank and worker: its part of the shards → decoded batches with their position."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmvit.data.plan import Part, plan_epoch, random_from, shuffled
from mmvit.data.shards import BadSample, BadShard, Sample, read_shard
from mmvit.data.tally import Tally
from mmvit.errors import UserError

Batch = dict[str, Any]
Decode = Callable[[Sample, random.Random], dict[str, Any] | None]


def never() -> bool:
    return False


@dataclass
class Position:
    """How far a worker has got: samples drawn from the shuffled order of its epoch, and its counts so far."""

    epoch: int = 0
    drawn: int = 0
    done: bool = False  # only without `repeat`: nothing is left
    tally: Tally = field(default_factory=Tally)


@dataclass
class Delivery:
    """What a worker sends: a batch, and its position after it. `error` is a UserError's message, `crash`
    the traceback of any other exception."""

    worker: int
    position: Position
    batch: Batch | None
    error: str | None = None
    crash: str | None = None


@dataclass
class Reader:
    """One of the `num_readers` = ranks x workers that share the shards."""

    shards: list[Path]
    decode: Decode
    batch_size: int
    seed: int
    number: int
    num_readers: int
    shuffle_buffer: int
    repeat: bool
    max_bad: float

    def deliver(self, worker: int, start: Position, ended: Callable[[], bool] = never) -> Iterator[Delivery]:
        """Yields batches from `start` on, until `ended()`. A UserError is sent as text: the loader would add
        a traceback."""
        position = copy.deepcopy(start)
        try:
            for samples in self.batches(position, ended):
                yield Delivery(worker, copy.deepcopy(position), collate(samples) if samples else None)
        except UserError as error:
            yield Delivery(worker, position, None, error=str(error))

    def batches(
        self, position: Position, ended: Callable[[], bool] = never
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields lists of decoded samples, the last one short or empty, and keeps `position` current; stops
        between two samples once `ended()`."""
        batch: list[dict[str, Any]] = []
        while not position.done:
            already_drawn, has_samples = position.drawn, False
            for number, found in enumerate(self.draw(position.epoch), start=1):
                if ended():
                    return
                has_samples = has_samples or isinstance(found, Sample)
                if number <= already_drawn:
                    continue
                position.drawn = number
                sample = self.try_decode(found, position)
                if sample is not None:
                    batch.append(sample)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if not has_samples and self.repeat:
                reasons = position.tally.reasons()
                raise UserError(
                    f"reader {self.number + 1} of {self.num_readers} (ranks x workers) found no sample in "
                    f"its part of {self.shards[0].parent}"
                    + (f" ({reasons})" if reasons else "")
                    + "; use fewer workers, or more and fuller shards"
                )
            position.epoch, position.drawn, position.done = position.epoch + 1, 0, not self.repeat
        yield batch

    def draw(self, epoch: int) -> Iterator[Sample | BadShard]:
        """This reader's undecoded samples in the order of `epoch`; a broken shard counts as one of them."""
        shuffle = self.shuffle_buffer > 0
        plan = plan_epoch(self.shards, self.seed, epoch, self.number, self.num_readers, shuffle)
        found = (sample for part in plan for sample in self.read_part(part))
        return shuffled(found, self.shuffle_buffer, random_from(self.seed, epoch, "buffer", self.number))

    def read_part(self, part: Part) -> Iterator[Sample | BadShard]:
        """Reads a part of a shard. Raises UserError if no sample has the files that `decode` needs."""
        num_read, missing = 0, ""
        try:
            for number, sample in enumerate(read_shard(part.shard)):
                if number % part.step == part.first:
                    num_read += 1
                    sample.copy = part.copy
                    missing = self.missing_files(sample) if missing or num_read == 1 else ""
                    yield sample
        except BadShard as error:
            yield error
        if missing:
            raise UserError(f"no sample of {part.shard} has the files needed here: {missing}")

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

    def try_decode(self, found: Sample | BadShard, position: Position) -> dict[str, Any] | None:
        """Decodes a sample; counts it in `position.tally` and returns None if that fails."""
        tally = position.tally
        if isinstance(found, BadShard):
            tally.broken_shards.setdefault(str(found.shard), str(found))
            tally.check(self.max_bad)
            return None
        tally.read += 1
        try:
            if missing := self.missing_files(found):
                raise BadSample("missing file", missing)
            copy = (found.copy,) if found.copy else ()
            sample = self.decode(found, random_from(self.seed, position.epoch, found.key, *copy))
        except BadSample as bad:
            tally.skip(bad.reason, f"{found.key} in {found.shard}: {bad.detail}")
            tally.check(self.max_bad)
            return None
        except UserError as error:  # likely true of all samples
            raise UserError(f"{found.key} in {found.shard}: {error}") from None
        except Exception as error:
            error.add_note(f"while decoding {found.key} in {found.shard}")
            raise
        if sample is None:
            return None
        tally.count(sample.pop("counts", {}))
        return {**sample, "keys": found.key}


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stacks the entries of samples: arrays and numbers become tensors, strings lists."""
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, str):
            batch[name] = values
        elif isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.from_numpy(np.stack(values))
    return batch
