"""Streams of the tiny shards and decoders for tests, which child processes import, too."""

import time
from pathlib import Path

import numpy as np

from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import ClassifierSample
from mmvit.data.writing import ShardWriter
from mmvit.streams.stream import ShardStream

TRAIN = "train-{000000..000004}.tar"
AUGMENT = AugmentConfig(crop_padding=2, flip=0.5, erase=0.5)


def stream_of(folder: Path, decode=None, batch_size=4, **settings) -> ShardStream:
    decode = decode or ClassifierSample((16, 16), 4, AUGMENT)
    return ShardStream(folder / TRAIN, decode, batch_size, **{"shuffle_buffer": 20, **settings})


def epoch_of(place, **settings) -> ShardStream:
    """One epoch, from a folder or an address."""
    settings = {"seed": 3, "shuffle_buffer": 20, "repeat": False, **settings}
    return ShardStream(place, ClassifierSample((16, 16), 4), 5, **settings)


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def take(stream: ShardStream, count: int) -> list[dict]:
    """The next `count` batches. (A for loop over zip would draw one too many.)"""
    batches = iter(stream)
    return [next(batches) for _ in range(count)]


def write(folder: Path, samples: list[dict[str, bytes]], split: str = "train") -> Path:
    with ShardWriter(folder, split, samples_per_shard=1000) as writer:
        for number, files in enumerate(samples):
            writer.write(f"{number:04d}", files)
    return folder / f"{split}-000000.tar"


class KeyOnly:
    """Decodes nothing; makes tests of order fast."""

    def __call__(self, sample, rng):
        return {"draw": rng.random()}


class Large:
    """More than a pipe holds, so that a worker waits to be rid of it."""

    def __call__(self, sample, rng):
        return {"text": "x" * 100_000}


class Rare:
    """Takes the first sample and passes over the others, slowly: a worker is busy until the next epoch."""

    def __call__(self, sample, rng):
        if sample.key == "train-000":
            return {"draw": rng.random()}
        time.sleep(0.5)
        return None


class Nothing:
    def __call__(self, sample, rng):
        return None


class Broken(ClassifierSample):
    """Has a bug, which one sample in the third shard shows: an array of another shape."""

    def __call__(self, sample, rng):
        found = super().__call__(sample, rng)
        return {**found, "labels": np.zeros(2)} if sample.key == "train-025" else found
