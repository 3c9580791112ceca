"""The cache of pieces of remote shards: bounded, shared by processes, and never trusted blindly."""

import errno
import gc
import gzip
import itertools
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
from file_server import FileServer, own_cache, served
from tiny_streams import TRAIN, epoch_of, keys_of

from mmvit.config import build_config
from mmvit.errors import UserError
from mmvit.recipes.data import CacheConfig
from mmvit.streams import pieces
from mmvit.streams.address import Address
from mmvit.streams.cache import SUM, TOTAL, Cache, take_damaged
from mmvit.streams.index import index_of
from mmvit.streams.pieces import RemoteFile
from mmvit.streams.shard_lists import write_list
from mmvit.streams.shards import read_shard
from mmvit.streams.stream import ShardStream


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with own_cache(tmp_path) as pieces:
        yield pieces


def test_pieces_are_fetched_ahead_and_each_once_a_machine(tiny_shards, server, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4096)
    place, ranks = f"{server.url}/{TRAIN}", range(2)
    streams = [epoch_of(place, rank=rank, world_size=2, num_workers=2, repeat=True) for rank in ranks]
    for _ in itertools.islice(zip(*map(iter, streams), strict=False), 10):
        pass
    sizes = {f"/{shard.name}": shard.stat().st_size for shard in tiny_shards.glob("train-*.tar")}
    for name, size in sizes.items():  # three headers, with which the index is compared, and the length in all
        assert size / 2 < server.sent[name] <= size + 3 * 512 + 1


@pytest.mark.parametrize("size", [1, -1, 0.003, "50 gigs", "0GB"])
def test_a_size_without_a_unit_is_refused(size):
    with pytest.raises(UserError, match=r'expected a size such as "50GB" \(KB, MB, GB, TB\), got '):
        build_config(CacheConfig, {"cache_size": size}, "config.toml")


def test_the_cache_stays_within_its_size_and_keeps_what_was_used_last(tmp_path):
    cache = Cache(tmp_path, 1050)

    def use(number: int) -> int:
        file = cache.open(f"piece-{number}", 100, lambda: [b"x" * 50, bytes([number]) * 50])
        os.utime(file, ns=(0, use.now))
        use.now += 10**9
        return file

    use.now = 0
    first = use(0)
    for number in range(1, 20):
        os.close(use(number))
        os.close(use(3))
        assert sum(path.stat().st_size for path in tmp_path.glob("piece-*")) <= 1050
    assert (tmp_path / "piece-3").exists()
    assert not (tmp_path / "piece-0").exists()
    assert os.pread(first, 100, 0) == b"x" * 50 + bytes(50)  # still open
    os.close(first)


def test_pieces_that_were_read_are_not_held_open(server, cache):
    """Their space would not come free when they are evicted."""
    gc.disable()  # a cycle would hold them until it comes round
    try:
        stream = epoch_of(f"{server.url}/{TRAIN}", shuffle_buffer=0)
        assert len(keys_of(stream)) == 48
        files = [readlink(file) for file in Path("/proc/self/fd").iterdir()]
    finally:
        gc.enable()
    assert sum(file.startswith(str(cache)) for file in files) <= 2


def readlink(file: Path) -> str:
    return os.readlink(file) if file.is_symlink() else ""


def test_what_a_killed_process_leaves_is_never_taken_for_whole(tmp_path):
    cache, parent = Cache(tmp_path, 1000), os.getpid()

    def parts():
        yield b"x" * 60
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        yield b"x" * 40

    if not (child := os.fork()):
        cache.open("piece", 100, parts)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.glob("piece*")] == ["piece.partial"]
    assert os.pread(cache.open("piece", 100, parts), 100, 0) == b"x" * 100
    assert [path.name for path in tmp_path.glob("piece*")] == ["piece"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bit_that_flips_in_the_cache_is_never_read(tiny_shards, server, cache, num_workers):
    def epoch() -> tuple[list, ShardStream]:
        stream = epoch_of(f"{server.url}/{TRAIN}", num_workers=num_workers)
        return [(batch["keys"], batch["pixels"].tolist()) for batch in stream], stream

    whole, _ = epoch()
    asked, found = fetched(server), RemoteFile(Address(f"{server.url}/train-000002.tar"))
    flip(cache / f"{found.key}-0")
    remove_byte(cache / f"{RemoteFile(Address(f'{server.url}/train-000001.tar')).key}-0")
    with pytest.warns(UserWarning, match="damaged") as told:
        again, stream = epoch()
    assert again == whole
    assert fetched(server) == asked + 2
    ours = [each for each in told if "DataLoader" not in str(each.message)]  # PyTorch's, where cores are few
    assert [str(each.message) for each in ours] == [
        f"{cache}/{found.key}-0 was damaged and has been fetched again: check its disk"
    ]
    assert "48 samples read, 1 damaged cache piece fetched again, 0 skipped" in stream.tally.describe()
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", "This DataLoader will create")
        assert epoch()[0] == whole


def fetched(server: FileServer) -> int:
    return sum(count for name, count in server.requests.items() if name.endswith(".tar"))


def flip(piece: Path) -> None:
    """Changes a bit in the last tenth of a file, last used yesterday, as disks do."""
    content, times = bytearray(piece.read_bytes()), piece.stat()
    content[len(content) * 9 // 10] ^= 8
    piece.write_bytes(content)
    yesterday = times.st_mtime_ns - 24 * 3600 * 10**9
    os.utime(piece, ns=(yesterday, yesterday))


def remove_byte(piece: Path) -> None:
    piece.write_bytes(piece.read_bytes()[:-1])


def test_damage_in_the_cache_is_noticed_however_it_came(tmp_path, server):
    cache = Cache(tmp_path / "own", 10_000)
    fetch = mock.Mock(side_effect=lambda: [b"ab", b"c" * 98])
    piece = cache.folder / "piece"

    def read() -> bytes:
        file = cache.open("piece", 100, fetch)
        try:
            return os.pread(file, 100, 0)
        finally:
            os.close(file)

    for harm in (
        None,
        flip,
        lambda path: path.write_bytes(bytes(104)),
        lambda path: path.write_bytes(b"x" * 100),
    ):
        if harm:
            harm(piece)
        assert read() == read() == b"ab" + b"c" * 98
    assert fetch.call_count == 4
    assert take_damaged() == [str(piece)] * 2  # one that is too short was never whole


def test_what_is_read_from_front_to_back_is_checked_and_told_too(server, cache, tiny_shards):
    shard = Address(f"{server.url}/train-000002.tar")
    whole = list(read_shard(shard))
    (piece,) = cache.glob("*-0")
    flip(piece)
    with pytest.warns(UserWarning, match=f"1 damaged cache piece fetched again, such as {piece}"):
        assert list(read_shard(shard)) == whole
    flip(piece)
    os.close(RemoteFile(shard).open(0))
    with warnings.catch_warnings(action="error"):
        assert list(read_shard(shard)) == whole
    assert take_damaged() == [str(piece)]  # left to the stream of samples that found it


def test_a_piece_is_fetched_by_one_process_while_others_wait(tmp_path):
    cache = Cache(tmp_path / "pieces", 10_000)

    def parts():
        with (tmp_path / "log").open("a") as log:
            log.write("fetched\n")
        time.sleep(0.1)
        yield b"x" * 100

    children = []
    for _ in range(4):
        if not (child := os.fork()):
            try:
                for number in range(3):
                    assert os.pread(cache.open(f"piece-{number}", 100, parts), 100, 0) == b"x" * 100
            finally:
                os._exit(sys.exc_info()[0] is not None)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "log").read_text().count("fetched") == 3


@pytest.mark.parametrize("step", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_named_and_leaves_nothing_half(tmp_path, step):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, step, side_effect=full), pytest.raises(UserError) as caught:
        Cache(tmp_path, 1000).open("piece", 100, lambda: [b"x" * 100])
    assert str(caught.value).startswith(
        f"no space left in {tmp_path} for pieces of shards: free some, or choose"
    )
    assert not [*tmp_path.glob("piece*")]


def test_a_cache_that_is_too_small_says_how_large_it_has_to_be(server, monkeypatch):
    monkeypatch.setenv("MMVIT_CACHE_SIZE", "0.07MB")
    with pytest.raises(UserError, match=r"data.cache_size: 70,000 bytes are too few, \d+,\d+ are read"):
        next(iter(epoch_of(f"{server.url}/{TRAIN}")))


# Compressed shards


@pytest.fixture
def compressed(tiny_shards, tmp_path) -> Path:
    for shard in tiny_shards.glob("train-*.tar"):
        (tmp_path / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes(), 1))
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_remote", [False, True])
def test_compressed_shards_give_the_batches_of_others_and_are_unpacked_once(
    tiny_shards, compressed, cache, num_workers, is_remote
):
    def epoch(place: object) -> list:
        stream = epoch_of(f"{place}/{TRAIN}{'' if place == tiny_shards else '.gz'}", num_workers=num_workers)
        return [(batch["keys"], batch["pixels"].tolist()) for batch in stream]

    expected = epoch(tiny_shards)
    with served(compressed) if is_remote else nullcontext() as server:
        assert epoch(server.url if is_remote else compressed) == expected
        with mock.patch("mmvit.streams.packed.unpack", side_effect=AssertionError):
            assert epoch(server.url if is_remote else compressed) == expected
        pieces = [*cache.glob("*-unpacked-0")]
        assert len(pieces) == 5
        pieces[1].unlink()
        assert epoch(server.url if is_remote else compressed) == expected
        assert {*cache.glob("*-unpacked-0")} == {*pieces}


@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_compressed_shard_that_disappears_is_named(compressed, is_indexed):
    stream = epoch_of(f"{compressed}/{TRAIN}.gz")
    assert not is_indexed or stream.samples == 48
    gone = compressed / "train-000003.tar.gz"
    gone.unlink()
    with pytest.raises(UserError, match=f"cannot open shard {gone}: No such file or directory"):
        keys_of(stream)


def test_compressed_shards_in_a_list_are_read_as_such(compressed):
    write_list(compressed, {f"train-{number:06d}.tar.gz": (10, 0) for number in range(4)})
    with served(compressed) as server:
        for place, count in ((f"{server.url}/{TRAIN}.gz", 48), (f"{server.url}/shards.json", 40)):
            assert len(keys_of(epoch_of(place))) == count


@pytest.mark.parametrize("has_ranges", [True, False, None], ids=["remote", "remote without ranges", "local"])
def test_unpacked_shards_stay_within_the_size_of_the_cache(compressed, cache, monkeypatch, has_ranges):
    """Remote ones have to be unpacked while unpacked ones fill it: there is no room for what is fetched."""
    sizes = [index_of(shard).shard.length for shard in sorted(compressed.glob("*.gz"))]
    size = 2 * max(sizes) + 1000
    monkeypatch.setenv("MMVIT_CACHE_SIZE", f"{size / 10**6}MB")
    with served(compressed) if has_ranges is not None else nullcontext() as server:
        if server:
            server.has_ranges = has_ranges
        place = f"{server.url if server else compressed}/{TRAIN}.gz"
        with pytest.raises(UserError, match=r"data.cache_size: .* bytes are too few"):
            keys_of(epoch_of(place, shuffle_buffer=40))
        assert len(keys_of(epoch_of(place, shuffle_buffer=0))) == 48
    assert sum(path.stat().st_size for path in cache.iterdir() if path.name != TOTAL) <= size


def test_one_piece_may_fill_the_cache(tmp_path):
    cache = Cache(tmp_path, 1000)
    for name in "ab":
        os.close(cache.open(name, 1000 - SUM, lambda: [b"x" * (1000 - SUM)]))
