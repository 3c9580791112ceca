"""Shards in a bucket of S3 and on the Hugging Face Hub: the same batches as from local files."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


class Hub(BaseHTTPRequestHandler):
    """What of the Hugging Face Hub reading shards needs."""

    folder: Path
    asked: list[tuple[str, str, str]]

    def log_message(self, *_) -> None:
        pass

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

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_shards_on_the_hub_give_the_batches_of_local_ones(tiny_shards, monkeypatch):
    handler = type("Tiny", (Hub,), {"folder": tiny_shards, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint, "token": "hf_s3cr3t"})
        place = "hf://datasets/owner/tiny/train-*.tar"
        assert keys_of(epoch_of(place)) == keys_of(epoch_of(f"{tiny_shards}/train-*.tar"))
        hub.shutdown()
    assert {token for _, _, token in handler.asked if token} == {"Bearer hf_s3cr3t"}
    sizes = {file.name: file.stat().st_size for file in tiny_shards.glob("*.tar")}
    for path, span, _ in handler.asked:
        assert not span or span == f"bytes=0-{sizes[path.rpartition('/')[2]] - 1}"
