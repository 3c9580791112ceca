"""The data stream: it covers, mixes, resumes and reports what is bad."""

import gzip
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import CaptionSample, ClassifierSample
from mmvit.data.writing import ShardWriter
from mmvit.errors import UserError
from mmvit.streams.order import LANES, Order
from mmvit.streams.reader import Reader
from mmvit.streams.shards import read_shard
from mmvit.streams.stream import ShardStream, split_state
from mmvit.streams.tally import Tally

TRAIN = "train-{000000..000004}.tar"
AUGMENT = AugmentConfig(crop_padding=2, flip=0.5, erase=0.5)


def stream_of(folder: Path, decode=None, batch_size=4, **settings) -> ShardStream:
    decode = decode or ClassifierSample((16, 16), 4, AUGMENT)
    return ShardStream(folder / TRAIN, decode, batch_size, **{"shuffle_buffer": 20, **settings})


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


# Coverage and order


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_cover_every_sample_once(tiny_shards, num_workers):
    seen = Counter()
    for rank in range(2):
        stream = stream_of(
            tiny_shards, KeyOnly(), rank=rank, world_size=2, num_workers=num_workers, repeat=False
        )
        seen.update(keys_of(stream))
    assert seen == {f"train-{number:03d}": 1 for number in range(48)}


COUNTS = ([10, 10, 10, 10, 8], [1], [0, 3, 0], [700, 1, 900, 400], [130] * 40)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("shuffle_buffer", [0, 1, 20, 1000, 100_000])
def test_an_epoch_has_every_sample_once(counts, shuffle_buffer):
    order = Order(counts, 7, shuffle_buffer)
    whole = {(shard, number) for shard, count in enumerate(counts) for number in range(count)}
    epochs = [[order.locate(epoch, place) for place in range(len(whole))] for epoch in range(2)]
    assert [*map(sorted, epochs)] == [sorted(whole)] * 2
    if not shuffle_buffer:
        assert epochs[0] == epochs[1] == sorted(whole)
    elif len(whole) > 30:
        assert epochs[0] != epochs[1] != sorted(whole)


def test_an_order_mixes_and_stays_close_to_the_places_of_its_lanes():
    order, epoch = Order([1000] * 64, 0, 6400), [1, 2]
    places = np.array(
        [[1000 * s + n for s, n in map(order.locate, [e] * 64_000, range(64_000))] for e in epoch]
    )
    lanes = places.reshape(2, -1, LANES)
    moved = np.diff(lanes, axis=1)
    assert 20 < np.abs(moved[np.abs(moved) < 1000]).mean() < 70  # windows of 100
    assert (np.ptp(lanes[:, :100], axis=1) < 200).mean() > 0.9  # a lane's first window
    assert abs(np.corrcoef(places)[0, 1]) < 0.4


@pytest.mark.parametrize("world", [2, 4, 64])
def test_ranks_that_divide_the_lanes_read_shards_of_their_own(world):
    order = Order([100] * 640, 0, 1000)
    read = [{order.locate(0, place)[0] for place in range(rank, order.total, world)} for rank in range(world)]
    assert sum(map(len, read)) <= 640 + 2 * LANES  # those at the ends of lanes are read by two


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_small_batches_have_all_classes_of_a_sorted_shard(batch_size):
    order = Order([20_000], 0, 1000)
    classes = np.array([order.locate(0, place)[1] // 2000 for place in range(19_200)])
    at_random = np.random.default_rng(0).permutation(classes)
    found, expected = (
        np.mean([len(set(batch)) for batch in each.reshape(-1, batch_size)]) for each in (classes, at_random)
    )
    assert found > 0.97 * expected


def test_the_places_of_a_large_buffer_are_mixed_fast_and_small():
    order = Order([64 * 2**17], 0, 64 * 2**17)
    assert order.version == 3
    places = order.mixed(0, 0, 0, 2**17)
    assert places.nbytes == 4 * 2**17
    assert sorted(places.tolist()) == [*range(2**17)]
    assert (order.mixed(0, 1, 0, 2**17) != places).any()
    small = Order([640_000], 0, 640_000)
    assert (small.version, small.locate(0, 64)) == (2, (0, 247_930))  # as ever: a checkpoint counts on it


def test_a_position_in_an_order_of_before_goes_on_with_the_next_epoch(tiny_shards):
    state = stream_of(tiny_shards, KeyOnly()).state_dict()
    del state["layout"]["order"]
    stream = stream_of(tiny_shards, KeyOnly())
    with pytest.warns(UserWarning, match="other order: continuing with epoch 2"):
        stream.load_state_dict({**state, "consumed": 49})


def test_one_shard_is_mixed_differently_in_every_epoch(tiny_shards):
    stream = ShardStream(tiny_shards / "train-000000.tar", KeyOnly(), 10, shuffle_buffer=20)
    first, second = take(stream, 2)
    assert sorted(first["keys"]) == sorted(second["keys"])
    assert first["keys"] != second["keys"]


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_the_same_seed(tiny_shards):
    def two_epochs(seed):
        keys = keys_of(take(stream_of(tiny_shards, KeyOnly(), seed=seed), 24))
        return keys[:48], keys[48:]

    first, second = two_epochs(seed=0)
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second
    assert (first, second) == two_epochs(seed=0)
    assert first != two_epochs(seed=1)[0]


def test_no_shuffle_buffer_keeps_the_order_of_the_shards(tiny_shards):
    stream = stream_of(tiny_shards, KeyOnly(), shuffle_buffer=0, repeat=False)
    assert keys_of(stream) == [f"train-{number:03d}" for number in range(48)]
    assert keys_of(stream) == [f"train-{number:03d}" for number in range(48)]  # once more from the beginning


def test_randomness_of_a_sample_depends_on_neither_rank_nor_worker(tiny_shards):
    def draws(**settings):
        batches = list(stream_of(tiny_shards, KeyOnly(), repeat=False, seed=3, **settings))
        return {
            key: draw.item()
            for batch in batches
            for key, draw in zip(batch["keys"], batch["draw"], strict=True)
        }

    alone = draws()
    assert len(set(alone.values())) == 48
    assert draws(rank=0, world_size=2) | draws(rank=1, world_size=2) == alone


def test_a_sample_is_augmented_differently_in_every_epoch(tiny_shards):
    draws: dict[str, set[float]] = {}
    for batch in take(stream_of(tiny_shards, KeyOnly()), 36):  # three epochs
        for key, draw in zip(batch["keys"], batch["draw"].tolist(), strict=True):
            draws.setdefault(key, set()).add(draw)
    assert {len(found) for found in draws.values()} == {3}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_shard_that_is_named_twice_is_read_twice_with_other_randomness(tiny_shards, world_size):
    once, twice = tiny_shards / "train-000000.tar", tiny_shards / "train-000001.tar"
    draws: dict[str, list[float]] = {}
    for rank in range(world_size):
        stream = ShardStream(
            [once, twice, twice], KeyOnly(), 4, repeat=False, rank=rank, world_size=world_size
        )
        for batch in stream:
            for key, draw in zip(batch["keys"], batch["draw"].tolist(), strict=True):
                draws.setdefault(key, []).append(draw)
    assert Counter(len(set(found)) for found in draws.values()) == {1: 10, 2: 10}
    assert sorted(len(found) for found in draws.values()) == [1] * 10 + [2] * 10


# Position


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("done", [0, 3, 13, 24])
def test_resumed_stream_gives_the_batches_of_an_uninterrupted_one(tiny_shards, num_workers, done):
    whole = take(stream_of(tiny_shards, batch_size=5, num_workers=num_workers), done + 12)
    first = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    second.load_state_dict(state)
    for expected, found in zip(whole[done:], take(second, 12), strict=True):
        assert found["keys"] == expected["keys"]
        assert torch.equal(found["pixels"], expected["pixels"])
        assert torch.equal(found["labels"], expected["labels"])
    reads = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    take(reads, done + 12)
    assert second.report() == reads.report()


def test_interrupted_evaluation_goes_on_where_it_was(tiny_shards):
    stream = stream_of(tiny_shards, KeyOnly(), num_workers=2, repeat=False, batch_size=5)
    whole = keys_of(stream)
    part = keys_of(take(stream, 4))
    assert part + keys_of(stream) == whole


def global_batches(folder: Path, count: int, world: int, num_workers: int, state=None) -> list[set[str]]:
    """The keys that all ranks together get at each of `count` steps of 12 samples."""
    streams = [
        stream_of(folder, KeyOnly(), 12 // world, rank=rank, world_size=world, num_workers=num_workers)
        for rank in range(world)
    ]
    for rank, stream in enumerate(streams):
        if state is not None:
            stream.load_state_dict(split_state(state, rank))
    ranks = [take(stream, count) for stream in streams]
    if state is not None:
        state[:] = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    return [
        [key for keys in zip(*(batch["keys"] for batch in batches), strict=True) for key in keys]
        for batches in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_have_the_same_samples_for_any_number_of_ranks_and_workers(tiny_shards, world, num_workers):
    assert global_batches(tiny_shards, 6, world, num_workers) == global_batches(tiny_shards, 6, 1, 0)


def test_any_number_of_ranks_goes_on_from_a_position(tiny_shards):
    whole = global_batches(tiny_shards, 8, 1, 0)
    state = [stream_of(tiny_shards, KeyOnly(), 6, rank=rank, world_size=2).state_dict() for rank in range(2)]
    found = []
    for world, num_workers, count in ((2, 1, 3), (4, 0, 2), (1, 3, 2), (3, 1, 1)):
        found += global_batches(tiny_shards, count, world, num_workers, state)
    assert found == whole
    assert sum(own["tally"]["read"] for own in state) == 8 * 12  # nothing is counted twice


def test_position_of_other_shards_or_another_order_warns_and_takes_the_next_epoch(tiny_shards):
    saved = stream_of(tiny_shards, KeyOnly())
    take(saved, 2)
    for change, name in (({"seed": 1}, "seed"), ({"shuffle_buffer": 30}, "shuffle_buffer")):
        stream = stream_of(tiny_shards, KeyOnly(), **change)
        with pytest.warns(UserWarning, match=f"other {name}: continuing with epoch 1"):
            stream.load_state_dict(saved.state_dict())
        assert stream.consumed == 48
    fewer = ShardStream(tiny_shards / "train-000000.tar", KeyOnly(), 4, shuffle_buffer=20)
    with pytest.warns(UserWarning, match="other shards, samples, samples_per_shard: continuing with epoch 1"):
        fewer.load_state_dict(saved.state_dict())
    assert fewer.consumed == 10


def test_position_in_shards_of_which_two_have_changed_places_takes_the_next_epoch(tmp_path, tiny_shards):
    """They have the same names, and as many samples in all."""
    for number in range(5):
        other = {0: 4, 4: 0}.get(number, number)  # of 10 and of 8 samples
        shutil.copy(tiny_shards / f"train-00000{other}.tar", tmp_path / f"train-00000{number}.tar")
    saved = stream_of(tiny_shards, KeyOnly())
    take(saved, 2)
    state = saved.state_dict()
    stream = stream_of(tmp_path, KeyOnly())
    with pytest.warns(UserWarning, match="saved with other samples_per_shard: continuing with epoch 1"):
        stream.load_state_dict(state)
    del state["layout"]["samples_per_shard"]  # as of an earlier version
    stream.load_state_dict(state)
    assert stream.consumed == 8


def test_position_of_an_earlier_version_goes_on_with_the_next_epoch(tiny_shards):
    tally = {"read": 30, "skipped": {"bad": 1}, "examples": {"bad": "x"}, "broken_shards": {}, "counts": {}}
    position = {"epoch": 2, "drawn": 5, "done": False, "tally": tally}
    stream = stream_of(tiny_shards, KeyOnly())
    with pytest.warns(UserWarning, match="continuing with epoch 3"):
        stream.load_state_dict({"layout": {"seed": 0}, "positions": [position] * 2, "next_worker": 1})
    assert (stream.consumed, stream.tally.read) == (3 * 48, 60)


@pytest.mark.parametrize("same_world", [True, False])
def test_all_ranks_go_on_with_the_same_epoch_from_an_earlier_version(tiny_shards, same_world):
    """There, one rank could be in the next epoch already."""
    states = [
        {
            "layout": {},
            "positions": [{"epoch": epoch, "drawn": 5, "done": False, "tally": asdict(Tally(read))}],
        }
        for epoch, read in ((0, 10), (1, 11), (1, 12))
    ]
    streams = [stream_of(tiny_shards, KeyOnly(), rank=rank, world_size=3) for rank in range(3)]
    for rank, stream in enumerate(streams):
        with pytest.warns(UserWarning, match="continuing with epoch 2"):
            stream.load_state_dict(
                split_state([{"streams": [s]} for s in states], rank, same_world)["streams"][0]
            )
    assert [stream.tally.read for stream in streams] == ([10, 11, 12] if same_world else [33, 0, 0])


def test_a_resume_reads_nothing_of_what_was_seen(tiny_shards):
    stream = stream_of(tiny_shards, KeyOnly(), 1)
    state = {**stream.state_dict(), "consumed": 1_000_000 * 48 + 47}
    stream.load_state_dict(state)
    with mock.patch.object(Reader, "find", side_effect=Reader.find, autospec=True) as find:
        take(stream, 2)
    assert find.call_count == 2


def test_stream_with_workers_leaves_the_global_generator_alone(tiny_shards):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(stream_of(tiny_shards, KeyOnly(), num_workers=1), 1)
    assert torch.rand(1) == expected


# Bad samples


def test_bad_samples_are_skipped_counted_and_named(tiny_shards, tmp_path):
    good = next(iter(read_shard(tiny_shards / "held-out-000000.tar"))).files
    samples = [good] * 200
    samples[3] = {**good, "png": good["png"][:60]}
    samples[5] = {**good, "cls": b"4"}
    samples[8] = {**good, "cls": b"cat"}
    samples[199] = {"txt": b"no image", "cls": b"1"}
    write(tmp_path, samples)
    for num_workers in (0, 1):
        decode = ClassifierSample((16, 16), 4)
        stream = ShardStream(tmp_path, decode, 8, repeat=False, shuffle_buffer=0, num_workers=num_workers)
        with pytest.warns(UserWarning, match="skipped a sample, unreadable class: 0008 in .* cls is b'cat'"):
            assert len(keys_of(stream)) == 196
        report = stream.report()
        assert report["read"] == 200
        assert report["skipped"] == {
            "undecodable image": 1,
            "class outside the range": 1,
            "unreadable class": 1,
            "missing file": 1,
        }
        assert report["examples"]["class outside the range"].startswith("0005 in ")
        assert "cls is 4, the classes are 0 to 3" in report["examples"]["class outside the range"]
        assert "needs jpg or png or webp or jpeg, has cls, txt" in report["examples"]["missing file"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_stops_at_too_many_bad_samples(tiny_shards, tmp_path, num_workers):
    good = next(iter(read_shard(tiny_shards / "held-out-000000.tar"))).files
    write(tmp_path, [{**good, "cls": b"9"} if number % 5 == 0 else good for number in range(100)])
    stream = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 8, num_workers=num_workers)
    with pytest.raises(
        UserError, match=r"^11 bad samples among \d+ read: 11 x class outside the range"
    ) as caught:
        keys_of(stream)
    assert "Traceback" not in str(caught.value)
    lenient = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 8, repeat=False, max_bad=0.5)
    assert len(keys_of(lenient)) == 80


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_without_the_needed_key_says_which_keys_it_has(tmp_path, num_workers):
    path = write(tmp_path, [{"png": b"", "txt": b"a"}] * 5)
    stream = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 2, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        next(iter(stream))
    assert str(caught.value) == f"no sample of {path} has the files needed here: needs cls, has png, txt"


def test_truncated_shard_keeps_what_is_before_the_cut_and_is_reported(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "train-000002.tar"
    whole = cut.read_bytes()
    for length in (len(whole) // 2, len(whole) // 1024 * 512, 700):
        cut.write_bytes(whole[:length])
        stream = stream_of(tmp_path, KeyOnly(), repeat=False)
        with pytest.warns(UserWarning, match="train-000002.tar is truncated or damaged"):
            keys = set(keys_of(stream))
        assert {f"train-{number:03d}" for number in range(48) if number // 10 != 2} <= keys
        assert len(keys) < 48
        report = stream.report()
        assert report["skipped"] == {}
        assert list(report["broken_shards"]) == [str(cut)]
        assert f"{cut} is truncated or damaged" in report["broken_shards"][str(cut)]


def test_archive_cut_between_two_files_or_overwritten_is_noticed(tiny_shards, tmp_path):
    whole = (tiny_shards / "train-000001.tar").read_bytes()
    with tarfile.open(tiny_shards / "train-000001.tar") as archive:
        offset = archive.getmembers()[10].offset
    count = len(keys_of(ShardStream(tiny_shards / "train-000001.tar", KeyOnly(), 2, repeat=False)))
    overwritten = whole[:offset] + b"x" * 512 + whole[offset + 512 :]
    # of two whole samples before a cut, the second is not known to be whole; nor are those beside damage
    for number, (data, left) in enumerate(((whole[:offset], 1), (overwritten, count - 2))):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        stream = ShardStream(path, KeyOnly(), 2, repeat=False)
        with pytest.warns(UserWarning, match="its other samples are used"):
            assert len(keys_of(stream)) == left
        assert list(stream.report()["broken_shards"]) == [str(path)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_that_are_all_broken_end_the_stream(tmp_path, num_workers):
    for number in range(2):
        (tmp_path / f"train-{number:06d}.tar").write_bytes(b"<html>not found</html>" * 100)
    stream = ShardStream(tmp_path, KeyOnly(), 4, num_workers=num_workers)
    with pytest.raises(UserError, match=r"found no sample .*2 broken shards, the first: .*damaged"):
        next(iter(stream))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_shard_is_one_however_often_it_is_met(tiny_shards, tmp_path, num_workers):
    shutil.copytree(tiny_shards, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "train-000002.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    stream = stream_of(tmp_path, KeyOnly(), num_workers=num_workers)
    with pytest.warns(UserWarning, match="damaged") as caught:
        take(stream, 150)  # twelve epochs
    assert len([warning for warning in caught if str(cut) in str(warning.message)]) <= max(1, num_workers)
    assert list(stream.report()["broken_shards"]) == [str(cut)]
    assert "0 skipped, and parts of 1 broken shard, the first: " in stream.tally.describe()


def test_fewer_samples_than_ranks_are_read_in_turn(tmp_path):
    write(tmp_path, [{"txt": b"a"}] * 2)
    ranks = [
        keys_of(take(ShardStream(tmp_path, KeyOnly(), 2, rank=rank, world_size=3), 4)) for rank in range(3)
    ]
    assert Counter(key for keys in ranks for key in keys) == {"0000": 12, "0001": 12}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_replaced_so_that_batches_are_full(tmp_path, num_workers):
    good = {"json": b'{"captions": {"en": "red"}}'}
    write(tmp_path, [good if number % 10 else {"json": b"{"} for number in range(100)])
    stream = ShardStream(tmp_path, CaptionSample(), 8, num_workers=num_workers, max_bad=0.5)
    with pytest.warns(UserWarning, match="json is invalid"):
        batches = take(stream, 25)  # two epochs
    keys = Counter(keys_of(batches))
    assert {len(batch["keys"]) for batch in batches} == {8}
    assert len(keys) == 90
    assert min(keys.values()) == 2
    assert (stream.tally.read, stream.tally.skipped) == (200, {"json is invalid": 20})


def test_samples_that_cannot_be_used_at_all_end_the_stream(tmp_path):
    write(tmp_path, [{"txt": b"a"}] * 3)
    with pytest.raises(UserError, match=r"none of 1,000 samples of .* can be used"):
        next(iter(ShardStream(tmp_path, Nothing(), 2)))


def test_a_shard_that_changes_under_the_stream_is_noticed(tiny_shards, tmp_path):
    path = shutil.copy(tiny_shards / "train-000000.tar", tmp_path)
    stream = ShardStream(path, KeyOnly(), 2, shuffle_buffer=0, repeat=False)
    batches = iter(stream)
    next(batches)
    Path(path).write_bytes(b"x" * 4096)
    with pytest.warns(UserWarning, match="skipped a sample, changed shard: sample 3 in "):
        assert keys_of(batches) == []
    assert stream.tally.skipped == {"changed shard": 8}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_compressed_shards_are_unpacked_once(tiny_shards, tmp_path, num_workers):
    content = (tiny_shards / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar.gz").write_bytes(gzip.compress(content))
    for _ in range(2):
        stream = ShardStream(tmp_path, KeyOnly(), 5, shuffle_buffer=0, repeat=False, num_workers=num_workers)
        assert keys_of(stream) == [f"train-{number:03d}" for number in range(10)]


def test_numbers_too_long_and_json_too_deep_in_a_caption_cost_one_sample_each(tmp_path):
    good = {"json": b'{"captions": {"en": "red"}}'}
    write(tmp_path, [good, {"json": b'{"size": ' + b"9" * 4301 + b"}"}, {"json": b"[" * 100_000}, good])
    stream = ShardStream(tmp_path, CaptionSample(), 1, repeat=False, shuffle_buffer=0)
    with pytest.warns(UserWarning, match="skipped a sample, json is invalid: 0001 in .*4301 digits"):
        assert keys_of(stream) == ["0000", "0003"]
    assert stream.report()["skipped"] == {"json is invalid": 2}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_bug_ends_the_stream_and_its_workers_with_the_samples_named(tiny_shards, num_workers):
    stream = stream_of(tiny_shards, Broken((16, 16), 4), num_workers=num_workers, repeat=False)
    before = multiprocessing.active_children()
    with pytest.raises((RuntimeError, ValueError), match="must have the same shape") as caught:
        keys_of(stream)
    text = "".join(traceback.format_exception(caught.value))
    assert re.search("while stacking labels of .*train-025", text)
    assert "in collate" in text  # the traceback of the worker, not only that of the stream
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("decoder", ["Broken((16, 16), 4)", "KeyOnly()"])
def test_a_process_ends_with_the_error_of_a_worker_or_its_own(tiny_shards, decoder, num_workers):
    script = f"""
from pathlib import Path
from test_stream import Broken, KeyOnly, stream_of
stream = stream_of(Path({str(tiny_shards)!r}), {decoder}, num_workers={num_workers})
batches = iter(stream)
for number, batch in enumerate(batches):
    if number == 20:
        raise RuntimeError("the loop has a bug")
"""
    command, here = [sys.executable, "-c", script], Path(__file__).parent
    ended = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=60)
    assert ended.returncode == 1
    expected = "the loop has a bug" if decoder == "KeyOnly()" else "must have the same shape"
    assert expected in ended.stderr


def test_a_busy_worker_ends_after_the_sample_in_hand(tiny_shards):
    before = multiprocessing.active_children()
    batches = iter(stream_of(tiny_shards, Rare(), num_workers=1, batch_size=1, shuffle_buffer=0))
    next(batches)
    [worker] = set(multiprocessing.active_children()) - set(before)
    with mock.patch.object(BaseProcess, "terminate") as terminate:  # the loader's last resort, after 5 s
        batches.close()
    assert not terminate.called
    assert worker.exitcode == 0


def test_workers_end_with_a_process_that_is_killed(tiny_shards):
    script = f"""
import multiprocessing, os, signal
from pathlib import Path
from test_stream import Large, stream_of
batches = iter(stream_of(Path({str(tiny_shards)!r}), Large(), num_workers=1))
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command, here = [sys.executable, "-c", script], Path(__file__).parent
    ended = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    worker = Path("/proc") / ended.stdout.strip()
    deadline = time.monotonic() + 10  # the kernel's work, not ours
    while worker.exists() and "State:\tZ" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)
