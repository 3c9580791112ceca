"""The data stream: it covers, mixes and resumes."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_streams import KeyOnly, keys_of, stream_of, take

from mmvit.streams.order import LANES, Order
from mmvit.streams.reader import Reader
from mmvit.streams.stream import ShardStream, split_state
from mmvit.streams.tally import Tally

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
    uninterrupted = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    whole = take(uninterrupted, done + 12)
    first = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    second.load_state_dict(state)
    for expected, found in zip(whole[done:], take(second, 12), strict=True):
        assert found["keys"] == expected["keys"]
        assert torch.equal(found["pixels"], expected["pixels"])
        assert torch.equal(found["labels"], expected["labels"])
    assert second.report() == uninterrupted.report()


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
