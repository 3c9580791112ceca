"""Tars that are damaged or made to do harm: what can be read is read, the rest is told."""

import gzip
import io
import itertools
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from mmvit.streams.index import scan
from mmvit.streams.shards import BadShard, Sample, read_shard
from mmvit.streams.tar import BLOCK, MOST_BYTES, RECORD, BadTar, File, Problem, read_files

NAMES = [f"{number:04d}" for number in range(40)]


def tar_of(names: list[str], format: int = tarfile.USTAR_FORMAT, length: int = 700) -> bytes:
    """An archive with `NAME.txt` and `NAME.png` for each name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            for extension in ("txt", "png"):
                data = random.Random(f"{name}.{extension}").randbytes(length)
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def read(path: Path, content: bytes) -> tuple[list[Sample], str]:
    """The samples of a shard with this content, and what was wrong with it."""
    path.write_bytes(content)
    samples, problem = [], ""
    try:
        for sample in read_shard(path):
            samples.append(sample)
    except BadShard as error:
        problem = str(error)
    return samples, problem


@pytest.fixture
def shard(tmp_path) -> Path:
    return tmp_path / "train-000000.tar"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_are_those_that_tarfile_reads(form):
    names = [*NAMES, "long/" * 12 + "n" * 90, *["ö" * 300 for _ in [0] if form != tarfile.USTAR_FORMAT]]
    content = tar_of(names, form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(member.name, tar.extractfile(member).read()) for member in tar]
    found = list(read_files(io.BytesIO(content)))
    assert [(file.name, file.data) for file in found] == expected
    assert all(content[file.offset :][: len(file.data)] == file.data for file in found)


def test_a_size_in_binary_is_read():
    content = bytearray(tar_of(NAMES[:1]))
    content[124:136] = b"\x80" + (700).to_bytes(11)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:BLOCK])
    assert [len(file.data) for file in read_files(io.BytesIO(content))] == [700, 700]


@pytest.mark.parametrize("length", [BLOCK, 8 * BLOCK])
@pytest.mark.parametrize("fill", [b"\0", b"x"])
def test_an_overwritten_header_costs_its_neighbours_alone(shard, length, fill):
    content = tar_of(NAMES)
    place = 20 * 2 * 3 * BLOCK  # a sample has two files of three blocks
    damaged = content[:place] + fill * length + content[place + length :]
    samples, problem = read(shard, damaged)
    whole = {sample.key: sample.files for sample in read(shard, content)[0]}
    assert all(whole[sample.key] == sample.files for sample in samples)
    assert len(whole) - 4 <= len(samples) < len(whole)
    assert f"{place:,}" in problem
    assert "is truncated or damaged" in problem


def test_a_zero_page_that_ends_at_a_header_is_noticed(shard):
    content = tar_of(NAMES)
    place, length = 20 * 2 * 3 * BLOCK, 2 * 3 * BLOCK  # a whole sample
    samples, problem = read(shard, content[:place] + bytes(length) + content[place + length :])
    assert len(samples) == len(NAMES) - 3
    assert "3,072 zeros" in problem


def test_concatenated_archives_are_read_on(shard):
    samples, problem = read(shard, tar_of(NAMES[:7]) + tar_of(NAMES[7:]))
    assert [sample.key for sample in samples] == NAMES
    assert not problem
    assert len(tar_of(NAMES[:7])) % RECORD == 0


def test_links_and_devices_are_refused_and_counted(shard):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in zip("abcdef", (b"0", b"1", b"2", b"6", b"3", b"0"), strict=True):
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member, io.BytesIO())
            tar.addfile(tarfile.TarInfo(f"{name}.txt"), io.BytesIO())
    samples, problem = read(shard, out.getvalue())
    assert [sample.key for sample in samples] == ["a", "f"]
    assert "b.png is a link; c.png is a link; 2 more such" in problem


def test_a_damaged_compressed_shard_is_told(tmp_path):
    packed = bytearray(gzip.compress(tar_of(NAMES)))
    packed[-8] ^= 1  # its checksum
    samples, problem = read(tmp_path / "train-000000.tar.gz", bytes(packed))
    assert len(samples) == len(NAMES) - 1
    assert "CRC" in problem
    samples, problem = read(tmp_path / "train-000000.tgz", bytes(packed[: len(packed) // 2]))
    assert 0 < len(samples) < len(NAMES)
    assert "end-of-stream" in problem


@pytest.mark.parametrize("wanted", [None, ()])
def test_a_file_cut_short_is_told_by_what_is_left_of_it(wanted):
    content = header("a.cls", b"0", 700) + b"x" * 700
    cuts = {
        600: "a.cls ends after 600 of 700 bytes",
        700: "the archive ends within the last block of a.cls",
    }
    for length, told in cuts.items():
        with pytest.raises(BadTar) as found:
            list(read_files(io.BytesIO(content[: BLOCK + length]), wanted))
        assert str(found.value) == told


@pytest.mark.parametrize("number", [5, 100])
def test_a_web_page_is_no_tar_file(shard, number):
    page = b"<!doctype html>\n<p>not found" * number
    found = f"{shard} is not a tar file: it begins with '<!doctype html>\\n'"
    assert read(shard, page) == ([], found)
    assert read(shard, page[:0]) == ([], f"{shard} is truncated or damaged: the archive has no end mark")
    assert "is truncated" in read(shard, tar_of(NAMES)[: BLOCK // 2])[1]


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def extended(kind: bytes, data: bytes) -> bytes:
    return header("extended", kind, len(data)) + data + bytes(-len(data) % BLOCK)


def record(text: bytes) -> bytes:
    length = len(text) + 2
    length += len(str(length + len(str(length))))
    return b"%d %s\n" % (length, text)


RECORDS = {
    "a size that is no number": b"size=x",
    "a size of 4,301 digits": b"size=" + b"9" * 4301,
    "a sparse file": b"GNU.sparse.major=1",
}


@pytest.mark.parametrize("name", RECORDS)
def test_evil_pax_headers(shard, name):
    bad = extended(b"x", record(RECORDS[name])) + header("bad.txt", b"0", 0)
    samples, problem = read(shard, tar_of(NAMES[:2])[: 12 * BLOCK] + bad + tar_of(NAMES[2:]))
    assert "bad.txt" in problem
    assert [sample.key for sample in samples] == NAMES


def test_chains_of_extended_headers_end(shard):
    for kind in (b"x", b"L", b"K", b"g"):
        chain = extended(kind, b"12 path=bad\n") * 5000
        samples, problem = read(shard, chain + tar_of(NAMES))
        assert len(samples) == len(NAMES)
        assert not problem


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 2**40])
def test_sizes_are_bounded_before_memory_is_taken(shard, size):
    tracemalloc.start()
    samples, problem = read(
        shard, tar_of(NAMES[:2])[: 12 * BLOCK] + header("bad.txt", b"0", size) + b"x" * 9000
    )
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    assert [sample.key for sample in samples] == NAMES[:1]  # the second may lack files
    assert f"bad.txt has {size:,} bytes" in problem


@pytest.mark.parametrize("size", [b"-0000001000", b"0o0000001", b"1_0"])
def test_a_size_that_is_no_octal_number_is_a_damaged_header(shard, size):
    block = bytearray(header("bad.txt", b"0", 0))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    shard.write_bytes(tar_of(NAMES[:2])[: 12 * BLOCK] + block + tar_of(NAMES[2:]))
    with shard.open("rb") as stream:
        found = list(itertools.islice(read_files(stream, wanted=()), 100))
    assert [item.name for item in found if isinstance(item, File)] == [
        f"{name}.{extension}" for name in NAMES for extension in ("txt", "png")
    ]
    assert any("512 damaged bytes" in item.text for item in found if isinstance(item, Problem))


def test_a_compressed_bomb_takes_no_memory(tmp_path):
    content = header("bomb.txt", b"0", MOST_BYTES + BLOCK) + bytes(MOST_BYTES + BLOCK) + tar_of(NAMES)
    path = tmp_path / "train-000000.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    with pytest.raises(BadShard, match=r"bomb.txt has 268,435,968 bytes"):
        list(read_shard(path))
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_names_that_are_not_utf_8_are_told_apart(shard):
    content = tar_of(["k1", "k2"])
    for number in (1, 2):
        content = content.replace(b"k%d.txt" % number, b"\xff%d.txt" % number)
    for place in (0, 2 * 3 * BLOCK):
        block = bytearray(content[place : place + BLOCK])
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        content = content[:place] + bytes(block) + content[place + BLOCK :]
    samples, problem = read(shard, content)
    assert [sample.key for sample in samples] == ["\\xff1", "k1", "\\xff2", "k2"]
    assert not problem


def test_names_do_nothing_to_a_terminal_and_have_an_end(shard):
    content = tar_of(["\x1b[31m\n", "a" * 4090, "a" * 4093, "z"], tarfile.PAX_FORMAT)
    samples, problem = read(shard, content)
    assert [sample.key for sample in samples] == ["\\x1b[31m\\n", "a" * 4090, "z"]
    assert "aaa... has a name of 4,097 characters" in problem
    assert len(problem) < 500


def test_a_sample_of_many_files_is_bounded_too(shard, monkeypatch):
    monkeypatch.setattr("mmvit.streams.shards.MOST_BYTES", 3 * 2**20)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.txt", *(f"bomb.{number}" for number in range(20)), "z.txt"):
            member = tarfile.TarInfo(name)
            member.size = 2**20
            tar.addfile(member, io.BytesIO(bytes(2**20)))
    samples, problem = read(shard, out.getvalue())
    assert [sample.key for sample in samples] == ["a", "z"]
    assert "a sample of more than 3,145,728 bytes" in problem
    assert scan(shard).samples == 2


def test_what_is_no_tar_is_told(shard):
    for content in (b"", b"<html>not found</html>" * 100, b"x" * 5 * BLOCK):
        samples, problem = read(shard, content)
        assert not samples
        assert problem


def test_every_sample_of_a_mutated_shard_is_delivered_or_its_loss_is_told(shard):
    rng = random.Random(0)
    content = tar_of(NAMES[:12], length=300)
    whole = {sample.key: sample.files for sample in read(shard, content)[0]}
    for _ in range(600):
        damaged = bytearray(content)
        place, length = rng.randrange(len(content)), rng.choice((1, 1, 8, 512, 4096))
        for at in range(place, min(place + length, len(content))):
            damaged[at] = rng.choice((0, 255, damaged[at] ^ (1 << rng.randrange(8))))
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        files: list[File] = []
        problems: list[Problem | BadTar] = []
        try:
            for item in read_files(io.BytesIO(damaged)):
                (files if isinstance(item, File) else problems).append(item)
        except BadTar as error:
            problems.append(error)
        samples, problem = read(shard, bytes(damaged))
        assert bool(problems) == bool(problem)
        if len(files) < 2 * len(whole):
            assert problem
        assert len({sample.key for sample in samples}) == len(samples) <= len(whole)
