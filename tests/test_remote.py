"""Shards elsewhere: the same batches as from local files, whatever the server does."""

import json
import os
from unittest import mock

import pytest
from file_server import FileServer, served

from mmvit.data.samples import ClassifierSample
from mmvit.data.shards import expand_shards, read_shard
from mmvit.data.stream import ShardStream

TRAIN = "train-{000000..000004}.tar"


@pytest.fixture
def server(tiny_shards) -> FileServer:
    with served(tiny_shards) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with mock.patch.dict(
        os.environ, MMVIT_CACHE=str(tmp_path / "pieces"), XDG_CACHE_HOME=str(tmp_path / "cache")
    ):
        yield tmp_path / "pieces"


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def stream_of(place, **settings) -> ShardStream:
    settings = {"seed": 3, "shuffle_buffer": 20, "repeat": False, **settings}
    return ShardStream(place, ClassifierSample((16, 16), 4), 5, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"num_workers": 2}, {"shuffle_buffer": 0}, {"rank": 1, "world_size": 2}]
)
def test_remote_shards_give_the_batches_of_local_ones(tiny_shards, server, settings):
    expected = keys_of(stream_of(f"{tiny_shards}/{TRAIN}", **settings))
    assert keys_of(stream_of(f"{server.url}/{TRAIN}", **settings)) == expected


def test_shards_elsewhere_are_named_by_ranges_globs_and_folders(tiny_shards, server):
    names = [shard.name for shard in expand_shards(tiny_shards)]
    assert [shard.name for shard in expand_shards(server.url)] == names
    assert [shard.name for shard in expand_shards(f"{server.url}/train-*.tar")] == names[1:]
    asked = server.requests.total()
    assert [shard.name for shard in expand_shards(f"{server.url}/{TRAIN}")] == names[1:]
    assert server.requests.total() == asked


def test_remote_shard_is_read_from_front_to_back(tiny_shards, server):
    [shard] = expand_shards(f"{server.url}/train-000001.tar")
    local = [(s.key, s.files) for s in read_shard(tiny_shards / "train-000001.tar")]
    assert [(s.key, s.files) for s in read_shard(shard)] == local


def test_training_reads_remote_shards_and_resumes_as_from_local_ones(
    server, tiny_shards, tmp_path, mmvit_command
):
    def train(name, place, steps, *more):
        ran = mmvit_command(
            "train", "image_folders", "--data.train", f"{place}/train-*.tar", "--data.held_out",
            f"{place}/held-out-*.tar", "--data.cache_size", "1GB", "--model.image_size", 16,
            "--model.num_classes", 4, "--model.core.depth", 1, "--train.batch_size", 8,
            "--train.steps", steps, "--optimizer.schedule", "constant",
            "--optimizer.warmup_steps", 1, "--output", tmp_path / name, *more,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["loss"]

    whole = train("local", tiny_shards, 9)
    assert train("remote", server.url, 4) != whole
    assert train("remote", server.url, 9, "--resume") == whole


def test_remote_shards_are_encoded_as_local_ones(server, tiny_shards, tmp_path, encoded, mmvit_command):
    settings = ("--tokenizer", encoded / "tokenizer", "--size", 16, "--workers", 0)
    ran = mmvit_command("encode", server.url, tmp_path / "codes", *settings)
    assert ran.returncode == 0, ran.stderr
    for shard in (encoded / "codes").glob("*.tar"):
        assert (tmp_path / "codes" / shard.name).read_bytes() == shard.read_bytes()
