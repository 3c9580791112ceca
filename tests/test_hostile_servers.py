"""Servers that are not to be trusted: what they list, send and change."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from file_server import own_cache, served

from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError
from mmvit.recipes.facts import codes_in
from mmvit.streams import remote
from mmvit.streams.address import Address
from mmvit.streams.pieces import RemoteFile
from mmvit.streams.shards import expand_shards


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "served").mkdir()
    with own_cache(tmp_path), served(tmp_path / "served") as server:
        yield server


@pytest.mark.parametrize(
    "url", ["https://h/$TOKEN.tar", "$TOKEN.tar", "dir://a.tar::https://h", "dir:///etc/a.tar"]
)
def test_a_list_of_shards_gets_at_no_environment_variables_and_local_files(server, url):
    (server.folder / "shards.json").write_text(json.dumps({"shardlist": [{"url": url, "nsamples": 1}]}))
    with pytest.raises(UserError, match="refused the shard"):
        expand_shards(f"{server.url}/shards.json")


def test_a_folder_of_a_server_gets_at_no_environment_variables(server):
    (server.folder / "a$TOKEN.tar").touch()
    with pytest.raises(UserError, match=r"lists 'a\$TOKEN.tar': \$ stands for an environment variable"):
        expand_shards(server.url)


@pytest.mark.parametrize("sent", ["bytes 100-199/300", "bytes 0-99/400", None])
def test_another_part_than_was_asked_for_is_not_taken(server, sent):
    """Of the length that was asked for, but from another place, or of a file that has grown."""
    (server.folder / "a.tar").write_bytes(bytes(300))

    def misbehave(handler, span):
        if span != (0, 1):
            handler.answer(206, b"x" * (span[1] - span[0]), {"Content-Range": sent} if sent else {})
        return span != (0, 1)

    server.version, server.misbehave = "", misbehave
    file = RemoteFile(Address(f"{server.url}/a.tar"))
    with pytest.raises(UserError, match=f"asked for bytes 0-299/300, the server sent {sent or 'no range'} "):
        file.read(0, 100)


def test_a_server_that_compresses_shards_is_named(server):
    (server.folder / "a.tar").write_bytes(bytes(300))
    server.misbehave = lambda handler, _: handler.answer(200, b"x", {"Content-Encoding": "gzip"}) or True
    with pytest.raises(UserError, match=r"a.tar: the server compresses it \(Content-Encoding: gzip\)"):
        RemoteFile(Address(f"{server.url}/a.tar"))


def test_files_that_differ_only_in_their_query_are_not_taken_for_one_another(server):
    (server.folder / "a.tar").write_bytes(bytes(10))

    def misbehave(handler, span):
        data = handler.path[-1:].encode() * 10
        handler.answer(206, data[slice(*span)], {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/10"})
        return True

    server.version, server.misbehave = "", misbehave
    files = [RemoteFile(Address(f"{server.url}/a.tar?part={number}")) for number in range(2)]
    assert [file.read(0, 10) for file in files] == [b"0" * 10, b"1" * 10]


@pytest.mark.parametrize("call", ["posix_fallocate", "replace"])
def test_a_cache_that_is_removed_while_a_piece_is_fetched_is_made_again(server, call):
    (server.folder / "a.tar").write_bytes(b"x" * 10)
    file, pending, original = RemoteFile(Address(f"{server.url}/a.tar")), [True], getattr(os, call)

    def removed_before(*arguments, **named):
        if pending:
            pending.clear()
            shutil.rmtree(file.cache.folder)
        return original(*arguments, **named)

    file.cache.folder.mkdir()
    with mock.patch.object(os, call, removed_before):
        assert file.read(0, 10) == b"x" * 10
    assert not pending


def test_a_piece_is_on_the_disk_before_it_has_its_name(server):
    (server.folder / "a.tar").write_bytes(b"x" * 10)
    file, synced = RemoteFile(Address(f"{server.url}/a.tar")), []

    def sync(_: int) -> None:
        synced.append(sorted(os.listdir(file.cache.folder)))

    with mock.patch.object(os, "fsync", sync):
        file.read(0, 10)
    assert synced == [[f"{file.key}-0.partial", "total"]]


@pytest.mark.parametrize("target", ["/a.tar", "file:///etc/passwd"])
def test_a_redirection_that_leads_nowhere_is_not_followed_again(server, target):
    (server.folder / "a.tar").touch()
    server.misbehave = lambda handler, _: handler.answer(302, b"", {"Location": target}) or True
    with pytest.raises(UserError, match=r"a.tar: the server redirects in a circle, or .* \(1 try in"):
        RemoteFile(Address(f"{server.url}/a.tar"))


def test_files_for_which_there_are_no_credentials_are_not_taken_for_absent(monkeypatch):
    error = type("NoCredentialsError", (Exception,), {})
    monkeypatch.setattr(remote, "ask_fsspec", mock.Mock(side_effect=error))
    named = "s3://some-bucket/train-000000.tar"
    with pytest.raises(UserError, match=r"s3://some-bucket/dataset.json: no credentials; set AWS_PROFILE"):
        codes_in({"data": {"train": named}}, "data", "model")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            403,
            r"cannot tell what made the image codes: .*/dataset.json: access denied; .* \(some servers",
        ),
        (404, "has no image codes, or its dataset.json does not say what made them; encode the shards"),
    ],
)
def test_a_denied_dataset_json_is_not_called_one_that_says_nothing(server, status, message):
    (server.folder / "dataset.json").touch()
    server.misbehave = lambda handler, span: handler.answer(status, b"", {}) is None
    assert (
        read_dataset_card(Address(server.url)) == {}
    )  # buckets that list no files answer 403 for absent ones
    with pytest.raises(UserError, match=message):
        codes_in({"data": {"train": f"{server.url}/train-000000.tar"}}, "data", "model")
