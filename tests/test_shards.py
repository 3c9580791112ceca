"""Shards: which files a pattern means, and writing them whole or not at all."""

import errno
import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from mmvit.data.packing import publish
from mmvit.data.writing import ShardWriter, read_dataset_card, remove_shard
from mmvit.errors import UserError
from mmvit.progress import progress_line
from mmvit.streams.index import beside, load_index, scan
from mmvit.streams.shard_lists import write_list
from mmvit.streams.shards import BadShard, expand_shards, read_shard, shards_of

TRAIN = "train-{000000..000004}.tar"


def write(folder: Path, samples: list[dict[str, bytes]], split: str = "train") -> Path:
    with ShardWriter(folder, split, samples_per_shard=1000) as writer:
        for number, files in enumerate(samples):
            writer.write(f"{number:04d}", files)
    return folder / f"{split}-000000.tar"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_patterns_expand_to_shards(tiny_shards):
    train = [tiny_shards / f"train-{number:06d}.tar" for number in range(5)]
    assert expand_shards(tiny_shards / TRAIN) == train
    assert expand_shards(str(tiny_shards / "train-*.tar")) == train
    assert expand_shards(tiny_shards) == [tiny_shards / "held-out-000000.tar", *train]
    assert expand_shards([train[1], tiny_shards / "train-00000{0,3}.tar"]) == [train[1], train[0], train[3]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "train-{000003..000006}.tar",
            "2 of 4 shards do not exist, the first is .*train-000005.tar; .* holds held-out-0",
        ),
        (
            "test-*.tar",
            "no shards match .*test-.*; .* holds held-out-000000.tar, train-000000.tar, .* and 2 more",
        ),
        ("nowhere/train-*.tar", "no shards match .*nowhere"),
        ("train-{5..2}.tar", "runs backwards"),
        ("train-{a}.tar", "neither a range"),
    ],
)
def test_pattern_without_shards_says_what_is_there(tiny_shards, pattern, message):
    with pytest.raises(UserError, match=message):
        expand_shards(tiny_shards / pattern)


def test_a_misspelt_folder_names_its_neighbour(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"no shards match .*photso; .* no photso; did you mean .*photos\?"):
        expand_shards(tmp_path / "photso")
    with pytest.raises(UserError, match=r"no shards match .*xyz; .* has no xyz; it has photos$"):
        expand_shards(tmp_path / "xyz")
    with pytest.raises(UserError, match=r"photso does not exist; did you mean .*photos\?"):
        expand_shards(tmp_path / "photso" / "train-*.tar")


def test_shards_named_heldout_by_an_earlier_version_are_found_and_replaced(tmp_path):
    old = write(tmp_path, [{"txt": b"old"}], "heldout")
    for found in (expand_shards(tmp_path / "held-out-*.tar"), shards_of(tmp_path, "held-out")):
        assert found == [old]
    new = write(tmp_path, [{"txt": b"new"}], "held-out")
    assert sorted(tmp_path.iterdir()) == [new, beside(new)]


def test_a_glob_of_a_split_leaves_out_splits_whose_names_begin_with_it(tmp_path):
    shards = {split: write(tmp_path, [{"txt": b"x"}], split) for split in ("train", "train-dev", "train-b")}
    assert expand_shards(tmp_path / "train-*.tar") == [shards["train"]]
    assert expand_shards(tmp_path / "train-dev-*.tar") == [shards["train-dev"]]
    assert expand_shards(tmp_path / "t*n-*.tar") == sorted(shards.values())
    assert expand_shards(tmp_path / "train*.tar") == sorted(shards.values())
    shards["train"].unlink()
    assert expand_shards(tmp_path / "train-*.tar") == [shards["train-b"], shards["train-dev"]]


def test_a_named_pipe_is_refused(tmp_path):
    write(tmp_path, [{"txt": b"x"}])
    pipe = tmp_path / "train-000001.tar"
    os.mkfifo(pipe)
    for pattern in (tmp_path, pipe, tmp_path / "train-*.tar"):
        with pytest.raises(UserError, match=r"train-000001.tar is not an ordinary file; move it away"):
            expand_shards(pattern)
    with pytest.raises(UserError, match="is not an ordinary file"):
        next(read_shard(pipe))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("[]", r"expected a JSON object, got \[\]"),
        ("null", "expected a JSON object, got None"),
        ("[" * 100_000, "is not valid JSON"),
        (" " * 2**24 + "{}", "is not valid JSON .more than 16,777,216 bytes"),
        ('{"classes": 3}', "expected a list of names as classes, got 3"),
        ('{"classes": "abc"}', "expected a list of names as classes, got 'abc'"),
        ('{"classes": [1, 2, 3]}', r"expected a list of names as classes, got \[1, 2, 3\]"),
        ('{"samples": 5}', r"expected \{split: number of samples\} as samples, got 5"),
        ('{"samples": {"train": "5"}}', r"expected \{split: number of samples\} as samples, got \{"),
        ('{"image_size": 5}', r"expected \[height, width\] as image_size, got 5"),
        ('{"image_size_median": [5, 0]}', r"expected \[height, width\] as image_size_median"),
        ('{"image_tokenizer": "x"}', "expected an object as image_tokenizer, got 'x'"),
    ],
)
def test_a_dataset_json_of_another_form_is_refused(tmp_path, card, message):
    (tmp_path / "dataset.json").write_text(card)
    with pytest.raises(UserError, match=f"dataset.json.* {message}"):
        read_dataset_card(tmp_path)


@pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "", []])
def test_pipes_and_nothing_are_refused(pattern):
    with pytest.raises(UserError, match=r"run a shell command|is empty"):
        expand_shards(pattern)


def test_compressed_shard_reads_like_a_plain_one(tiny_shards, tmp_path):
    plain = tiny_shards / "held-out-000000.tar"
    packed = tmp_path / "held-out.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [(s.key, s.files) for s in read_shard(packed)] == [(s.key, s.files) for s in read_shard(plain)]


def test_same_samples_give_the_same_bytes(tmp_path):
    samples = [{"png": bytes(range(256)), "txt": str(number).encode()} for number in range(20)]
    first, second = write(tmp_path / "a", samples), write(tmp_path / "b", samples)
    assert first.read_bytes() == second.read_bytes()


def test_failed_writing_leaves_the_earlier_shards_alone(tmp_path):
    before = write(tmp_path, [{"txt": b"old"}]).read_bytes()

    def fail_half_way() -> None:
        with ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
            writer.write("0", {"txt": b"new"})
            writer.write("1", {"txt": b"new"})
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way()
    assert names(tmp_path) == ["train-000000.tar", "train-000000.tar.index"]
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_a_full_disk_names_the_shards_and_leaves_nothing(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    def fill(disk: str) -> None:
        monkeypatch.setattr(TarWriter, disk, fail)
        with ShardWriter(tmp_path / "out", "train") as writer:
            writer.write("0", {"txt": b"new"})

    for disk in ("write", "close"):  # the second when buffers are flushed
        with pytest.raises(UserError, match=r"cannot write .*out/train-000000\.tar: No space left on device"):
            fill(disk)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_second_process_does_not_write_to_the_same_folder(tmp_path):
    lock = tmp_path / ".writing.lock"
    hold = (
        f"from mmvit.data.lock import *; w = sole_writer({str(tmp_path)!r}); w.__enter__(); print(); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as child:
        child.stdout.readline()
        with pytest.raises(UserError, match=f"is being written to by process {child.pid} on"):
            write(tmp_path, [{"txt": b"x"}])
        assert list(tmp_path.iterdir()) == [lock]
        child.kill()  # which leaves its file
    (tmp_path / ".train-000000.tar.7.partial").write_bytes(b"left by a process that was killed")
    with ShardWriter(tmp_path, "train") as writer, ShardWriter(tmp_path, "test") as other:
        writer.write("0", {"txt": b"x"})
        other.write("0", {"txt": b"x"})
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert [name for name in names(tmp_path) if "index" not in name] == [
        "test-000000.tar",
        "train-000000.tar",
    ]


def test_no_split_is_replaced_when_another_cannot_be_finished(tmp_path, monkeypatch):
    before = {split: write(tmp_path, [{"txt": b"old"}], split).read_bytes() for split in ("test", "train")}
    close = TarWriter.close

    def fail(tar: TarWriter) -> None:
        name = tar.stream.name
        close(tar)
        if "test-" in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TarWriter, "close", fail)

    def write_both() -> None:
        with ShardWriter(tmp_path, "test") as test, ShardWriter(tmp_path, "train") as train:
            for writer in (test, train):
                writer.write("0", {"txt": b"new"})
            for writer in (test, train):
                writer.finish()

    with pytest.raises(UserError, match="No space left"):
        write_both()
    assert {path.name[:-11]: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert len(names(tmp_path)) == 4  # with their indexes


def test_a_header_with_a_number_out_of_range_is_damage(tmp_path):
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.txt")
        member.pax_headers = {"size": "9" * 30}
        tar.addfile(member)
    with pytest.raises(BadShard, match="is truncated or damaged"):
        list(read_shard(path))


def test_progress_tells_the_time_left():
    assert progress_line("writing", 1200, 6000, 3.0) == "writing: 1,200 of 6,000, 400/s, 0:00:12 left"
    assert progress_line("writing", 1200, None, 3.0) == "writing: 1,200, 400/s"
    assert progress_line("writing", 5000, 6000, 10.0, is_done=True) == "writing: 5,000 of 6,000, 500/s"


def test_a_shard_is_written_with_its_index(tmp_path):
    for text in (b"red", b"a longer caption than fits into one block" * 20):
        shard = write(tmp_path, [{"txt": text}] * 3)
        index = load_index(beside(shard), shard)
        assert (index.ranges == scan(shard).ranges).all()


@pytest.mark.parametrize("how", ["written", "removed", "packed"])
def test_a_list_of_shards_goes_when_one_of_them_is_replaced(tmp_path, how):
    """Its counts would contradict the new ones."""
    shard = write(tmp_path, [{"txt": b"x"}])
    (tmp_path / "staged").mkdir()
    staged = write(tmp_path / "staged", [{"txt": b"x"}] * 2)
    write_list(tmp_path, {shard.name: (1, shard.stat().st_size)})
    assert (tmp_path / "shards.json").exists()
    if how == "written":
        write(tmp_path, [{"txt": b"x"}] * 2)
    elif how == "removed":
        remove_shard(shard)
    else:
        publish(staged.parent, tmp_path, [shard.name], ["train"])
    assert not (tmp_path / "shards.json").exists()


def test_fewer_shards_replace_all_earlier_ones_of_the_split(tmp_path):
    with ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
        for number in range(3):
            writer.write(str(number), {"txt": b""})
    write(tmp_path, [{"txt": b"a"}])
    assert names(tmp_path) == ["train-000000.tar", "train-000000.tar.index"]


@pytest.mark.parametrize(
    ("key", "files"), [("a.b", {"txt": b""}), ("", {"txt": b""}), ("a", {}), ("twice", {"txt": b""})]
)
def test_writer_refuses_keys_that_readers_would_misread(tmp_path, key, files):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("twice", {"txt": b""})
        with pytest.raises(ValueError, match="sample"):
            writer.write(key, files)
