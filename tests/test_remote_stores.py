"""Shards in a bucket of S3 and on the Hugging Face Hub: the same batches as from local files."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import boto3
import fsspec
import pytest
from file_server import own_cache
from moto.server import ThreadedMotoServer
from tiny_streams import epoch_of, keys_of

from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.pieces import RemoteFile
from mmvit.streams.shards import expand_shards, read_shard


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with own_cache(tmp_path) as pieces:
        yield pieces


@pytest.fixture
def bucket(tiny_shards, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for file in tiny_shards.iterdir():
        client.upload_file(str(file), "bucket", f"tiny/{file.name}")
    yield "s3://bucket/tiny"
    server.stop()


def test_shards_in_a_bucket_give_the_batches_of_local_ones(tiny_shards, bucket, cache):
    expected = keys_of(epoch_of(f"{tiny_shards}/train-*.tar"))
    for settings in ({}, {"num_workers": 1}):
        assert keys_of(epoch_of(f"{bucket}/train-*.tar", **settings)) == expected
    assert next(iter(expand_shards(bucket))).name == "held-out-000000.tar"
    with pytest.raises(UserError, match=r"s3://bucket/tiny/train-000009.tar: not found"):
        list(read_shard(Address(f"{bucket}/train-000009.tar")))
    shard = RemoteFile(Address(f"{bucket}/train-000001.tar"))
    other = {"Bucket": "bucket", "Key": "tiny/train-000002.tar"}
    boto3.client("s3").copy(other, "bucket", "tiny/train-000001.tar")
    shutil.rmtree(cache)
    with pytest.raises(UserError, match=r"train-000001.tar: the file has changed since it was opened"):
        shard.read(0, 10)
    with pytest.raises(
        UserError, match=r"no shards match s3://bucket/tiny/test-.*; it holds held-out-000000"
    ):
        expand_shards(f"{bucket}/test-*.tar")


class Server(BaseHTTPRequestHandler):
    folder: Path
    asked: list[tuple[str, str, str]]

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def started(server: type[Server], folder: Path) -> Iterator[tuple[type[Server], str]]:
    """Yields the class of its handlers, and its address."""
    handler = type("Tiny", (server,), {"folder": folder, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as store:
        threading.Thread(target=store.serve_forever, args=(0.01,), daemon=True).start()
        yield handler, f"http://127.0.0.1:{store.server_address[1]}"
        store.shutdown()


class Hub(Server):
    """What of the Hugging Face Hub reading shards needs."""

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/tree/" in self.path:
            files = [file for file in self.folder.iterdir() if file.suffix == ".tar"]
            listing = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files
            ]
            self.answer(200, json.dumps(listing).encode())
        elif "/resolve/" in self.path and (self.folder / name).is_file():
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.answer(206, (self.folder / name).read_bytes()[first : last + 1])
        else:
            self.answer(
                200 if self.path == "/api/datasets/owner/tiny" else 404, b'{"id": "owner/tiny", "sha": "1"}'
            )


def test_shards_on_the_hub_give_the_batches_of_local_ones(tiny_shards, monkeypatch):
    with started(Hub, tiny_shards) as (handler, endpoint):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint, "token": "hf_s3cr3t"})
        place = "hf://datasets/owner/tiny/train-*.tar"
        assert keys_of(epoch_of(place)) == keys_of(epoch_of(f"{tiny_shards}/train-*.tar"))
    assert {token for _, _, token in handler.asked if token} == {"Bearer hf_s3cr3t"}
    sizes = {file.name: file.stat().st_size for file in tiny_shards.glob("*.tar")}
    for path, span, _ in handler.asked:
        assert not span or span == f"bytes=0-{sizes[path.rpartition('/')[2]] - 1}"


class Bucket(Server):
    """What of Google Cloud Storage's JSON API reading shards needs: the files of a folder, facts of a file, a
    part of it."""

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        path, _, query = unquote(self.path).partition("?")
        file = self.folder / path.rpartition("/")[2]
        if path.endswith("/b/bucket/o"):
            files = self.folder.iterdir() if "prefix=tiny/&" in f"{query}&" else ()
            self.answer(200, json.dumps({"items": [*map(self.facts, files)]}).encode())
        elif not file.is_file():
            self.answer(404, b"{}")
        elif "alt=media" in query:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.answer(206, file.read_bytes()[first : last + 1])
        else:
            self.answer(200, json.dumps(self.facts(file)).encode())

    def facts(self, file: Path) -> dict[str, str]:
        return {
            "name": f"tiny/{file.name}",
            "size": str(file.stat().st_size),
            "etag": "1",
            "bucket": "bucket",
        }


def test_shards_in_a_bucket_of_google_give_the_batches_of_local_ones(tiny_shards, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks over gRPC, not the emulator
    with started(Bucket, tiny_shards) as (handler, endpoint):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        expected = keys_of(epoch_of(f"{tiny_shards}/train-*.tar"))
        for settings in ({}, {"num_workers": 1}):
            assert keys_of(epoch_of("gs://bucket/tiny/train-*.tar", **settings)) == expected
        with pytest.raises(UserError, match=r"gs://bucket/tiny/train-000009.tar: not found"):
            list(read_shard(Address("gs://bucket/tiny/train-000009.tar")))
    assert any(span for _, span, _ in handler.asked)
