"""Shards elsewhere: the same batches as from local files, whatever the server does."""

import contextlib
import io
import json
import re
import shutil
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from file_server import FileServer, own_cache, served
from fsspec.registry import _registry
from PIL import Image
from tiny_streams import TRAIN, epoch_of, keys_of
from webdataset.writer import TarWriter

from mmvit.data.samples import CaptionPixelsSample, ClassifierSample
from mmvit.errors import UserError
from mmvit.evaluation.splits import read_split
from mmvit.streams import pieces, remote
from mmvit.streams.address import Address
from mmvit.streams.cache import TOTAL
from mmvit.streams.order import LANES, Order
from mmvit.streams.pieces import RemoteFile
from mmvit.streams.shards import expand_shards, read_shard
from mmvit.streams.stream import ShardStream


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with own_cache(tmp_path) as pieces:
        yield pieces


@pytest.mark.parametrize(
    "settings", [{}, {"num_workers": 2}, {"shuffle_buffer": 0}, {"rank": 1, "world_size": 2}]
)
def test_remote_shards_give_the_batches_of_local_ones(tiny_shards, server, settings):
    expected = keys_of(epoch_of(f"{tiny_shards}/{TRAIN}", **settings))
    assert keys_of(epoch_of(f"{server.url}/{TRAIN}", **settings)) == expected


def test_a_sample_of_a_remote_split_is_that_of_a_local_one(tiny_shards, server, monkeypatch):
    """Of a split in many pieces, it fetches those that hold some of it."""
    monkeypatch.setattr(pieces, "PIECE", 1024)
    decode = ClassifierSample((16, 16), 4)
    expected = read_split(tiny_shards, "train", decode, most=6)["keys"]
    assert read_split(Address(server.url), "train", decode, most=6)["keys"] == expected


def test_shards_elsewhere_are_named_by_ranges_globs_and_folders(tiny_shards, server):
    names = [shard.name for shard in expand_shards(tiny_shards)]
    assert [shard.name for shard in expand_shards(server.url)] == names
    assert [shard.name for shard in expand_shards(f"{server.url}/train-*.tar")] == names[1:]
    asked = server.requests.total()
    assert [shard.name for shard in expand_shards(f"{server.url}/{TRAIN}")] == names[1:]
    assert server.requests.total() == asked


def test_a_folder_elsewhere_is_listed_once_a_process(server):
    for pattern in ("train-*.tar", "train-*.tar", "held-out-*.tar"):
        assert expand_shards(f"{server.url}/{pattern}")
    assert server.requests["/"] == 1


def test_an_address_may_begin_with_capitals(tiny_shards, server):
    place = server.url.replace("http", "HTTP")
    assert keys_of(epoch_of(f"{place}/{TRAIN}")) == keys_of(epoch_of(f"{tiny_shards}/{TRAIN}"))
    assert expand_shards(Path(f"{place}/a.tar")) == [Address(f"{server.url}/a.tar")]


def test_remote_shard_is_read_from_front_to_back(tiny_shards, server):
    [shard] = expand_shards(f"{server.url}/train-000001.tar")
    local = [(s.key, s.files) for s in read_shard(tiny_shards / "train-000001.tar")]
    assert [(s.key, s.files) for s in read_shard(shard)] == local


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("buffer", "start"), [(0, 0), (0, 130), (100, 0), (700, 391), (100, 1130)])
def test_plans_name_what_is_read_before_it_is_read(world, buffer, start):
    order = Order([300, 1, 200, 0, 70], 5, buffer)
    epoch, place = divmod(start, order.total)
    for rank in range(world):
        planned = {
            (span.shard, sample): order.earliest(span, sample)
            for spans in order.spans(epoch, place, rank + start - epoch * order.total, world)
            for span in spans
            for sample in range(span.first, span.last)
        }
        read = {order.locate(epoch, at): at for at in range(place + rank, order.total, world)}
        assert read.keys() <= planned.keys()
        assert all(planned[sample] <= at for sample, at in read.items())
        if buffer and world in (2, 8):
            assert len(planned) <= len(read) + order.window * LANES / world  # those of lanes of its own


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:word@host/a.tar: gone", "https://***@host/a.tar: gone"),
        ("https://h/a?X-Amz-Key=ab%2F&versionId=3, s3://b", "https://h/a?X-Amz-Key=***&versionId=3, s3://b"),
        ("zip://a.tar::https://u@h/z.zip?tok=1", "zip://a.tar::https://***@h/z.zip?tok=***"),
        ("https://h/a.tar#token=abc&e=3, #5", "https://h/a.tar#token=***&e=***, #5"),
        ("https://h/a?download=1#t=abc: gone", "https://h/a?download=1#t=***: gone"),
        ("https://h/page.html#remote-shards", None),
        ("hf://datasets/o/n@main/a.tar or https://$USER:$WORD@h/a?t=$TOKEN.", None),
    ],
)  # fmt: skip
def test_errors_show_addresses_without_their_secrets(text, shown):
    assert str(UserError(text)) == (shown or text)


# What servers do


def answers(server: FileServer, misbehave, times: int = 2) -> None:
    """Misbehaves on the first requests for each part of a file."""
    seen: Counter[tuple[str, tuple[int, int] | None]] = Counter()

    def first_times(handler, span):
        seen[handler.path, span] += 1
        return seen[handler.path, span] <= times and misbehave(handler, span)

    server.misbehave = first_times


def fail(handler, span):
    handler.answer(500, b"", {})
    return True


def cut(handler, span):
    if span == (0, 1):
        return False
    handler.answer(206, b"x" * 100, {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/10240"}, length=200)
    handler.close_connection = True
    return True


def shorten(handler, span):
    if span != (0, 1):  # not the first request, for the length
        handler.answer(206, b"x", {"Content-Range": f"bytes {span[0]}-{span[0]}/10240"})
    return span != (0, 1)


def hang(handler, span):
    time.sleep(0.3)
    return True


def drip(handler, span):
    if span == (0, 1):
        return False
    handler.answer(206, b"x", {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/10240"}, length=100_000)
    with contextlib.suppress(OSError):
        for _ in range(10):
            time.sleep(0.05)
            handler.wfile.write(b"x")
    handler.close_connection = True
    return True


@pytest.mark.parametrize("misbehave", [fail, cut, shorten, hang, drip])
def test_requests_that_fail_are_made_again(tiny_shards, server, misbehave, monkeypatch, cache):
    monkeypatch.setattr(remote, "NO_ANSWER", 0.1)
    monkeypatch.setattr(remote, "SLOWEST", 10**9)
    answers(server, misbehave)
    [shard] = expand_shards(f"{server.url}/train-000001.tar")
    local = [(s.key, s.files) for s in read_shard(tiny_shards / "train-000001.tar")]
    assert [(s.key, s.files) for s in read_shard(shard)] == local
    assert server.requests["/train-000001.tar"] >= 4
    assert {path.name for path in cache.iterdir()} == {RemoteFile(shard).key + "-0", TOTAL}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, r"/train-000001.tar: the server answered 500 \(8 tries"),
        (404, r"/train-000001.tar: not found"),
        (403, "/train-000001.tar: access denied; check its user, password or token"),
        (400, "/train-000001.tar: the server answered 400"),
    ],
)
def test_a_server_that_does_not_give_a_shard_is_quoted(server, status, message):
    server.misbehave = lambda handler, span: handler.answer(status, b"", {}) is None
    [shard] = expand_shards(f"{server.url}/train-000001.tar?token=s3cr3t")
    with pytest.raises(UserError, match=message.replace("tar:", r"tar\?token=\*\*\*:")):
        list(read_shard(shard))


def test_a_server_that_is_gone_is_named(server):
    server.server_close()
    with pytest.raises(UserError, match=r"train-000001.tar: connection refused by 127.0.0.1:\d+ \(8 tries"):
        list(read_shard(Address(f"{server.url}/train-000001.tar")))


@pytest.mark.parametrize(("number", "tries"), [(socket.EAI_NONAME, 3), (socket.EAI_AGAIN, 8)])
def test_a_host_that_does_not_exist_is_named_after_few_tries(monkeypatch, number, tries):
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=socket.gaierror(number, "")))
    with pytest.raises(UserError, match=rf"a.tar: cannot resolve no.invalid \({tries} tries"):
        list(read_shard(Address("http://no.invalid/a.tar")))


def test_a_shard_that_changes_while_it_is_read_is_noticed(server, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4096)
    shard = RemoteFile(Address(f"{server.url}/train-000001.tar"))
    shard.read(0, 10)
    server.version = '"2"'
    with pytest.raises(UserError, match="the file has changed since it was opened"):
        shard.read(5000, 5010)


def test_servers_without_ranges_are_asked_for_whole_shards(tiny_shards, server):
    server.has_ranges = False
    assert keys_of(epoch_of(f"{server.url}/{TRAIN}")) == keys_of(epoch_of(f"{tiny_shards}/{TRAIN}"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/a.tar", r"gs:// needs another package: pip install 'mmvit\[gcs\]'"),
        ("nosuch://bucket/a.tar", "unknown protocol nosuch://; expected https://, http://, s3://"),
        ("https://host/a.tar?token=$NO_SUCH_TOKEN", "the environment variable NO_SUCH_TOKEN is not set"),
        ("https://host/a.tar?token=***", "expected the address with its secret"),
    ],
)
def test_addresses_that_cannot_be_read_say_what_is_missing(address, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    monkeypatch.delitem(_registry, "gs", raising=False)  # nor imported by another test
    with pytest.raises(UserError, match=message):
        list(read_shard(Address(address)))


# What shards there are


def img2dataset_shards(folder: Path, image: bytes, with_table: bool = True) -> None:
    """As img2dataset writes them: images that could not be downloaded are in the table alone."""
    for shard in range(3):
        captions = {f"{shard:05d}{n:04d}": None if n == 2 else f"picture {n} of {shard}" for n in range(4)}
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for key, caption in captions.items():
                facts = {
                    "url": "https://example.org/a.jpg", "caption": caption, "key": key, "status": "success",
                    "error_message": None, "width": 16, "height": 16, "original_width": 32, "exif": "{}",
                    "sha256": "0" * 64, "aesthetic": float("nan"),
                }  # fmt: skip
                files = {"jpg": image, "json": json.dumps(facts, indent=4).encode()}
                files |= {} if caption is None else {"txt": caption.encode()}
                tar.write({"__key__": key, **files})
        if with_table:
            (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 6, "successes": 4}))


@pytest.mark.parametrize("with_table", [True, False])
def test_shards_of_img2dataset_work_unchanged(tmp_path, with_table):
    """Without the table, those of cc3m on the Hub; the json's caption is no caption of a language."""
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "JPEG")
    (tmp_path / "shards").mkdir()
    img2dataset_shards(tmp_path / "shards", image.getvalue(), with_table)

    def stream_in_order(place):
        return ShardStream(place, CaptionPixelsSample((16, 16)), 4, shuffle_buffer=0, repeat=False)

    def captions_of(stream):
        with pytest.warns(UserWarning, match="no caption: 000000002"):
            return [caption for batch in stream for caption in batch["captions"]]

    with served(tmp_path / "shards") as server:
        stream = stream_in_order(server.url)
        assert stream.samples == 12
        assert (server.sent["/00000.tar"] == 1) == with_table  # asked for its length alone
        captions = captions_of(stream)
    assert captions == captions_of(stream_in_order(tmp_path / "shards"))
    assert captions == [f"picture {n} of {shard}" for shard in range(3) for n in (0, 1, 3)]
    assert stream.report()["skipped"] == {"no caption": 3}


def test_a_list_of_shards_spares_requests_and_is_compared_with_them(tiny_shards, tmp_path, mmvit_command):
    for shard in tiny_shards.glob("train-*.tar"):
        shutil.copy(shard, tmp_path)
    with served(tmp_path) as server:
        ran = mmvit_command("index", server.url, "--out", tmp_path / "made", "--workers", 0)
        told = f"48 samples in 5 shards\nshards.json and 5 indexes are in {tmp_path / 'made'}\n"
        assert ran.stdout == told, ran.stderr
        for file in (tmp_path / "made").iterdir():
            file.rename(tmp_path / file.name)
        again = mmvit_command("index", tmp_path, "--workers", 0).stdout
        assert again == told.replace(str(tmp_path / "made"), str(tmp_path))
        listed = json.loads((tmp_path / "shards.json").read_text())["shardlist"]
        assert [shard["nsamples"] for shard in listed] == [10, 10, 10, 10, 8]
        for place in (f"{server.url}/{TRAIN}", f"{server.url}/shards.json"):
            server.requests.clear()
            assert epoch_of(place).samples == 48
            assert server.requests.total() <= 2  # its length, and itself
        listed[0]["nsamples"] += 1
        (tmp_path / "shards.json").write_text(json.dumps({"shardlist": listed}))
        remote.facts_of.cache_clear()
        with pytest.raises(UserError, match=r"has 10 samples, but shards.json \(or .*\) beside it says 11"):
            next(iter(epoch_of(f"{server.url}/{TRAIN}")))


def test_an_index_beside_that_does_not_fit_is_not_used(tiny_shards, tmp_path):
    shutil.copy(tiny_shards / "train-000001.tar", tmp_path)
    head, ranges = (tiny_shards / "train-000001.tar.index").read_bytes().split(b"\n", 1)
    (tmp_path / "train-000001.tar.index").write_bytes(head + b"\n" + ranges[16:32] + ranges[16:])
    with served(tmp_path) as server:
        keys = keys_of(epoch_of(f"{server.url}/train-000001.tar", shuffle_buffer=0))
    assert keys == [f"train-{number:03d}" for number in range(10, 20)]


# Training and encoding


def test_training_reads_remote_shards_and_resumes_as_from_local_ones(
    server, tiny_shards, tmp_path, mmvit_command
):
    def train(name, place, steps, *more):
        ran = mmvit_command(
            "train", "image_folders", "--data.train", place.format("train-*.tar"), "--data.held_out",
            place.format("held-out-*.tar"), "--data.cache_size", "1GB", "--model.image_size", 16,
            "--model.num_classes", 4, "--model.core.depth", 1, "--model.core.width", 32,
            "--model.core.num_heads", 2, "--train.num_workers", 0, "--train.batch_size", 8,
            "--train.steps", steps, "--optimizer.schedule", "constant",
            "--optimizer.warmup_steps", 1, "--output", tmp_path / name, *more,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert not re.search("hunter2|s3cr3t", ran.stdout + ran.stderr)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["loss"]

    whole = train("local", f"{tiny_shards}/{{}}", 9)
    address = server.url.replace("://", "://user:hunter2@") + "/{}?token=s3cr3t"
    assert train("remote", address, 4) != whole
    assert train("remote", address, 9, "--resume") == whole
    for file in (tmp_path / "remote").rglob("*.*"):
        assert not file.is_file() or not re.search(rb"hunter2|s3cr3t", file.read_bytes()), file
    ran = mmvit_command("train", tmp_path / "remote", "--resume")
    assert "expected the address with its secret" in ran.stderr


def test_remote_shards_are_encoded_as_local_ones(server, tiny_shards, tmp_path, encoded, mmvit_command):
    settings = ("--tokenizer", encoded / "tokenizer", "--size", 16, "--workers", 0)
    ran = mmvit_command("encode", server.url, tmp_path / "codes", *settings)
    assert ran.returncode == 0, ran.stderr
    for shard in (encoded / "codes").glob("*.tar"):
        assert (tmp_path / "codes" / shard.name).read_bytes() == shard.read_bytes()
