"""Where samples lie: indexes beside shards and in the cache, and what makes them stale."""

import errno
import gzip
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from test_tar import NAMES, tar_of

from mmvit.errors import UserError
from mmvit.streams import index as indexes
from mmvit.streams import packed
from mmvit.streams.index import SUFFIX, Index, beside, index_of, load_index, save_index, scan
from mmvit.streams.remote_index import indexes_of
from mmvit.streams.shards import read_shard
from mmvit.streams.stream import ShardStream
from mmvit.streams.tally import Tally


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(tar_of(NAMES))
    return path


def key(sample, rng):
    return {"text": sample.files["txt"].hex()}


@pytest.mark.parametrize("format", [0, 1, 2])
def test_a_range_holds_a_sample_with_all_its_headers(shard, format):
    content = tar_of([*NAMES, "long/" * 12 + "n" * 90], format)
    shard.write_bytes(content)
    stream = ShardStream(shard, key, 10, shuffle_buffer=0, repeat=False)
    found = [(own, text) for batch in stream for own, text in zip(batch["keys"], batch["text"], strict=True)]
    assert found == [(sample.key, sample.files["txt"].hex()) for sample in read_shard(shard)]
    ranges = scan(shard).ranges
    assert ranges[0, 0] == 0
    assert (ranges[1:, 0] == ranges[:-1, 1]).all()


def test_a_damaged_shard_has_the_samples_that_can_be_read(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[:3072] + b"x" * 512 + content[3584:])
    index = scan(shard)
    assert len(index.ranges) == len(NAMES) - 2
    assert "damaged bytes from byte 3,072" in index.problem
    shard.write_bytes(content[:20_000])  # within a file, whose data are passed over
    assert len(scan(shard).ranges) == len(list_of(shard))
    assert "ends" in scan(shard).problem


def list_of(shard: Path) -> list:
    samples = []
    try:
        for sample in read_shard(shard):
            samples.append(sample)
    except Exception:
        pass
    return samples


def test_an_index_is_taken_from_beside_the_shard(shard, run_script):
    ran = run_script("pipelines/index_shards.py", shard.parent)
    told = f"40 samples in 1 shard\nshards.json and 1 index are in {shard.parent}\n"
    assert ran.stdout.endswith(told), ran.stderr
    with mock.patch.object(indexes, "scan", side_effect=AssertionError):
        assert (index_of(shard).ranges == scan(shard).ranges).all()


def test_an_interrupted_index_goes_on_and_makes_stale_ones_again(shard, run_script):
    shards = [shard, *(Path(shutil.copy(shard, shard.with_name(f"train-{n:06d}.tar"))) for n in range(1, 5))]
    assert run_script("pipelines/index_shards.py", shard.parent, "--workers", 2).returncode == 0
    right = [beside(each).read_bytes() for each in shards]
    beside(shards[1]).unlink()
    beside(shards[2]).write_bytes(right[2][:-1])
    shards[3].write_bytes(tar_of(NAMES[::-1]))  # of the same size
    os.utime(beside(shards[3]))
    shards[4].write_bytes(tar_of([*NAMES[:1], *NAMES[5:9], *NAMES[1:5], *NAMES[9:]]))
    os.utime(beside(shards[4]), (0, 0))  # of the same three headers
    scanned = []
    with mock.patch.object(indexes, "scan", lambda path: scanned.append(path) or scan(path)):
        ran = run_script("pipelines/index_shards.py", shard.parent, "--workers", 0)
    told = f"200 samples in 5 shards\nshards.json and 5 indexes are in {shard.parent}\n"
    assert ran.stdout.endswith(told), ran.stderr
    assert scanned == shards[1:]
    assert [beside(each).read_bytes() for each in shards[:3]] == right[:3]
    assert (load_index(beside(shards[3]), shards[3]).ranges == scan(shards[3]).ranges).all()


def test_local_shards_show_no_bar_of_remote_ones(shard):
    with mock.patch("mmvit.streams.remote_index.with_progress", side_effect=AssertionError):
        assert [index.samples for index in indexes_of([shard])] == [40]


def test_a_large_shard_is_indexed_once_and_kept_in_the_cache(shard, monkeypatch):
    monkeypatch.setattr(indexes, "KEPT_FROM", 0)
    first = index_of(shard)
    with mock.patch.object(indexes, "scan", side_effect=AssertionError):
        assert (index_of(shard).ranges == first.ranges).all()
    shard.write_bytes(tar_of(NAMES[:30]))
    assert len(index_of(shard).ranges) == 30


def keys_and_problem(shard: Path) -> tuple[list[str], str]:
    stream = ShardStream(shard, key, 10, shuffle_buffer=0, repeat=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = [own for batch in stream for own in batch["keys"]]
    return keys, stream.tally.broken_shards.get(str(shard), "")


def test_what_is_wrong_with_a_compressed_shard_is_known_in_every_run(tmp_path):
    path = tmp_path / "train-000000.tar.gz"
    first, second = (gzip.compress(tar_of(names), 0) for names in (NAMES[:20], NAMES[20:]))
    checksum = bytearray(first)
    checksum[-8] ^= 1  # the data are whole, as far as can be known
    for content, problem in ((checksum, "CRC"), (first + b"\x1f" + second, "Not a gzipped file")):
        path.write_bytes(content)
        for _ in range(2):
            keys, found = keys_and_problem(path)
            assert keys == NAMES[:20]
            assert problem in found


def test_a_shard_that_unpacks_to_far_more_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MOST_UNPACKED", 2**18)
    shard = tmp_path / "train-000000.tar.gz"
    shard.write_bytes(gzip.compress(tar_of(NAMES) + bytes(2**27)))
    index = index_of(shard)
    most = 200 * shard.stat().st_size
    assert f"it unpacks to more than {most:,} bytes" in index.problem
    assert index.shard.length <= most < 2**26
    assert index.samples == len(NAMES) - 1  # the last one may lack files


def test_a_compressed_shard_that_cannot_be_read_for_a_while_loses_no_samples(tmp_path):
    shard = tmp_path / "train-000000.tar.gz"
    shard.write_bytes(gzip.compress(tar_of(NAMES), 0))
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with (
        mock.patch.object(packed.gzip.GzipFile, "read1", side_effect=[tar_of(NAMES)[:4096], stale]),
        pytest.raises(UserError, match=f"cannot read shard {shard}: Stale file handle"),
    ):
        index_of(shard)
    assert index_of(shard).samples == len(NAMES)
    kept = packed.cache("index", shard)
    head, ranges = kept.read_bytes().split(b"\n", 1)
    head = {**json.loads(head), "size": index_of(shard).shard.length - 512}
    kept.write_bytes(json.dumps(head).encode() + b"\n" + ranges)  # an earlier version's
    with pytest.raises(UserError, match="has changed since it was indexed: start again"):
        keys_and_problem(shard)
    assert keys_and_problem(shard) == (NAMES, "")


@pytest.mark.parametrize("cache", ["/dev/null", "/sys/none"])
def test_a_cache_that_cannot_be_written_matters_to_compressed_shards_only(shard, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setattr(indexes, "KEPT_FROM", 0)
    assert index_of(shard).samples == 40
    compressed = shard.with_name("train-000001.tar.gz")
    compressed.write_bytes(gzip.compress(shard.read_bytes()))
    assert index_of(compressed).samples == 40
    with pytest.raises(UserError, match=rf"cannot use the folder {cache}/mmvit/remote: .* with data.cache"):
        keys_and_problem(compressed)


def test_who_may_read_a_shard_may_read_its_index(shard):
    for mode in (0o600, 0o640, 0o644):
        shard.chmod(mode)
        path = shard.with_name(shard.name + SUFFIX)
        save_index(scan(shard), path)
        assert path.stat().st_mode & 0o777 == mode


def test_a_user_without_a_home_needs_no_cache(shard, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError))
    monkeypatch.setattr(indexes, "KEPT_FROM", 0)
    assert index_of(shard).samples == 40


def test_an_index_that_does_not_fit_is_not_used(shard, tmp_path):
    path = shard.with_name(shard.name + SUFFIX)
    save_index(scan(shard), path)
    assert load_index(path, shard)
    whole = path.read_bytes()
    for content in (b"", b"{}\n", b"[]\n", b"\xff\n", whole[:-1], whole + b"0", b'{"samples": -1}\n',
                    b"[" * 100_000, whole.replace(b'"samples": 40', b'"samples": 1e9')):  # fmt: skip
        path.write_bytes(content)
        assert load_index(path, shard) is None
    path.write_bytes(whole)
    other = bytearray(shard.read_bytes())
    other[0] ^= 1  # the same size
    shard.write_bytes(other)
    with pytest.raises(UserError, match=r"index is not of .* as it is now: run mmvit index again"):
        next(iter(ShardStream(shard, key, 10)))


def test_ranges_of_a_false_index_cost_samples_and_no_more(shard):
    ranges = scan(shard).ranges.copy()
    ranges[3], ranges[5], ranges[7] = (512, 2**40), (2**62, 2**62 + 9), (9, 5)
    stream = ShardStream(shard, key, 10, shuffle_buffer=0, repeat=False)
    with (
        mock.patch("mmvit.streams.remote_index.index_of", lambda path: Index.of(path, ranges)),
        pytest.warns(UserWarning, match="changed shard"),
    ):
        keys = [own for batch in stream for own in batch["keys"]]
    assert len(keys) == 37
    assert stream.tally.skipped == {"changed shard": 3}


@pytest.mark.parametrize("start", [-5, 2**63 - 1])
def test_an_index_that_points_outside_its_shard_is_named(shard, start):
    path = shard.with_name(shard.name + SUFFIX)
    save_index(scan(shard), path)
    content = path.read_bytes()
    place = content.index(b"\n") + 1
    path.write_bytes(content[:place] + start.to_bytes(8, "little", signed=True) + content[place + 8 :])
    with pytest.raises(UserError, match="run mmvit index again"):
        next(iter(ShardStream(shard, key, 10)))


def test_files_of_two_samples_are_never_one(shard):
    ranges = scan(shard).ranges.copy()
    ranges[3] += (ranges[3, 1] - ranges[3, 0]) // 2  # from its second file to the first of the next sample
    stream = ShardStream(shard, key, 10, shuffle_buffer=0, repeat=False)
    with (
        mock.patch("mmvit.streams.remote_index.index_of", lambda path: Index.of(path, ranges)),
        pytest.warns(UserWarning, match="files of 0003 and 0004 in one sample"),
    ):
        keys = [own for batch in stream for own in batch["keys"]]
    assert keys == NAMES[:3] + NAMES[4:]


def test_a_file_without_an_extension_is_no_part_of_a_sample(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[:1536] + tar_of(["x"])[:1536].replace(b"x.txt", b"x\0\0\0\0") + content[1536:])
    fix_checksum(shard, 1536)
    stream = ShardStream(shard, key, 10, shuffle_buffer=0, repeat=False)
    assert [own for batch in stream for own in batch["keys"]] == NAMES


def fix_checksum(shard: Path, start: int) -> None:
    content = bytearray(shard.read_bytes())
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    shard.write_bytes(content)


def test_a_reader_can_be_sent_to_a_worker(shard):
    for has_own in (False, True):
        if has_own:
            save_index(scan(shard), shard.with_name(shard.name + SUFFIX))
        stream = ShardStream(shard, key, 10, seed=1)
        sent = pickle.loads(pickle.dumps(stream.reader))
        assert sent.read(200, Tally()) == stream.reader.read(200, Tally())


def test_many_shards_open_only_the_files_that_they_read(shard):
    shards = [
        Path(shutil.copy(shard, shard.with_name(f"train-{number:06d}.tar"))) for number in range(1, 400)
    ]
    stream = ShardStream([str(path) for path in shards], key, 100, seed=1, repeat=False)
    assert len([own for batch in stream for own in batch["keys"]]) == 399 * 40
    assert len(list(Path("/proc/self/fd").iterdir())) < 250
    assert isinstance(stream.reader.order.counts, np.ndarray)
