"""What a data stream does about bad samples, damaged shards, bugs and processes that end."""

import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
from ranks import running, start_one
from tiny_streams import Broken, KeyOnly, Large, Nothing, Rare, keys_of, stream_of, take, write

from mmvit.data.samples import CaptionSample, ClassifierSample
from mmvit.errors import UserError
from mmvit.streams.index import beside, index_of
from mmvit.streams.shards import read_shard
from mmvit.streams.stream import ShardStream

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
    told = "000000.tar is not a tar file: it begins with '<html>not found<'"
    with (
        pytest.warns(UserWarning, match=f"{told}$"),
        pytest.raises(UserError, match=rf"found no sample .*2 broken shards, the first: .*{told}\)"),
    ):
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
    assert "0 skipped, and parts of 1 broken shard" in stream.tally.describe()


def test_damage_since_a_shard_was_indexed_is_told_by_its_place_in_the_shard(tiny_shards, tmp_path):
    shard = Path(shutil.copy(tiny_shards / "train-000000.tar", tmp_path))
    shutil.copy(beside(tiny_shards / shard.name), tmp_path)
    start, end = index_of(shard).ranges[2].tolist()
    content = shard.read_bytes()
    shard.write_bytes(content[:start] + b"x" * (end - start) + content[end:])
    stream = ShardStream(shard, KeyOnly(), 2, repeat=False)
    with pytest.warns(UserWarning, match=rf"sample 3 .*: no tar header from byte {start:,} to byte {end:,}"):
        keys_of(stream)


def test_samples_lost_in_broken_shards_are_counted_as_far_as_indexes_tell(tiny_shards, tmp_path):
    cut, other = (Path(shutil.copy(tiny_shards / f"train-00000{number}.tar", tmp_path)) for number in (1, 2))
    shutil.copy(beside(tiny_shards / cut.name), tmp_path)
    promised = len(list(read_shard(cut)))
    cut.write_bytes(cut.read_bytes()[:-20_000])
    stream = ShardStream(tmp_path, KeyOnly(), 4, repeat=False)
    with pytest.warns(UserWarning, match="damaged"):
        lost = promised + len(list(read_shard(other))) - len(keys_of(stream))
    assert 0 < lost < promised
    said = f"parts of 1 broken shard ({lost} samples lost), the first: {cut} is truncated"
    assert said in stream.tally.describe()
    resumed = ShardStream(tmp_path, KeyOnly(), 4, repeat=False)
    resumed.load_state_dict(stream.state_dict())
    resumed.count_broken_shards()
    assert said in resumed.tally.describe()
    other.write_bytes(other.read_bytes()[:-20_000])
    stream = ShardStream(tmp_path, KeyOnly(), 4, repeat=False)
    with pytest.warns(UserWarning, match="damaged"):
        keys_of(stream)
    assert f"parts of 2 broken shards (at least {lost} samples lost), the first: " in stream.tally.describe()


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


def read_with_a_bug(shards: Path, decode: Callable, num_workers: int) -> None:
    batches = iter(stream_of(shards, decode, num_workers=num_workers))  # still open at the end of Python
    for number, _ in enumerate(batches):
        if number == 20:
            raise RuntimeError("the loop has a bug")


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("decode", [Broken((16, 16), 4), KeyOnly()], ids=type)
def test_a_process_ends_with_the_error_of_a_worker_or_its_own(tiny_shards, decode, num_workers):
    ended = start_one(read_with_a_bug, tiny_shards, decode, num_workers)
    assert ended.returncode == 1
    expected = "the loop has a bug" if isinstance(decode, KeyOnly) else "must have the same shape"
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


def read_and_die(shards: Path) -> None:
    batches = iter(stream_of(shards, Large(), num_workers=1))
    next(batches)
    print(multiprocessing.active_children()[0].pid)
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_process_that_is_killed(tiny_shards):
    with running(read_and_die, tiny_shards) as one:
        worker = Path("/proc") / one.lines.readline().strip()
        one.process.join()
        assert one.process.exitcode == -signal.SIGKILL, one.errors.read_text()
        deadline = time.monotonic() + 10  # the kernel's work, not ours
        while worker.exists() and "State:\tZ" not in (worker / "status").read_text():
            assert time.monotonic() < deadline, "the worker outlived its parent"
            time.sleep(0.05)
