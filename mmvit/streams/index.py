"""Where the samples of a shard lie, so that any of them can be read without those before it."""

import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from mmap import PROT_READ, mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.cache import key_of, xdg_cache
from mmvit.streams.pieces import RemoteFile, opened
from mmvit.streams.remote import facts_of
from mmvit.streams.shards import groups_of, open_shard, summary
from mmvit.streams.tar import BLOCK, CHUNK

FORMAT = "mmvit-index-1"
MOST_HEADER = 2**20
MOST_UNPACKED = 2**30  # bytes that any compressed shard may have unpacked
MOST_RATIO = 200  # to its own size, for larger ones: zeros pack to a thousandth
SUFFIX = ".index"
KEPT_FROM = 2**23  # bytes of a shard: smaller ones are indexed again faster than this is worth


@dataclass
class Index:
    """The number of a shard's samples, and what could not be read.

    `shard` is the file that they lie in: for a compressed one, its unpacked copy.
    """

    shard: Path
    samples: int
    problem: str = ""
    path: Path | None = None  # where the ranges are, from byte `start` on, until they are needed
    start: int = 0
    checksum: int | None = None  # of some headers; None if they need not be compared

    @cached_property
    def ranges(self) -> np.ndarray:
        """Where each sample begins and ends, in bytes, (samples, 2)."""
        if not self.samples:
            return np.empty((0, 2), "<i8")
        with open(self.path, "rb") as file:
            content = mmap(file.fileno(), 0, prot=PROT_READ)
        ranges = np.frombuffer(content, "<i8", offset=self.start).reshape(-1, 2)
        if self.checksum is not None and self.checksum != headers_checksum(self.shard, ranges):
            raise UserError(f"{self.path} is not of {self.shard} as it is now: run mmvit index again")
        return ranges

    def fits(self) -> bool:
        """Whether the ranges are of the shard as it is now, as far as the headers of three samples tell."""
        try:
            return self.ranges is not None
        except (UserError, OSError):
            return False

    def __reduce__(self):
        if self.path is None:
            return Index.of, (self.shard, self.ranges, self.problem)
        return Index, (self.shard, self.samples, self.problem, self.path, self.start, self.checksum)

    @classmethod
    def of(cls, shard: Path, ranges: np.ndarray, problem: str = "") -> "Index":
        index = cls(shard, len(ranges), problem)
        index.ranges = ranges
        return index


def index_of(shard: Path) -> Index:
    """A shard's index: from the file beside it (`mmvit index`), from the cache, or made now.

    Raises:
        UserError: if the shard cannot be opened, or unpacked.
    """
    is_packed = shard.suffix != ".tar"
    if not is_packed and (found := load_index(beside(shard), shard)):
        return found
    place = cache("shards", shard).with_suffix(".tar") if is_packed else shard
    cached = cache("index", shard)
    if found := load_index(cached, place):
        return found
    problem = unpack(shard, place) if is_packed else ""
    index = scan(place)
    index.problem = summary([text for text in (problem, index.problem) if text])
    if is_packed or place.stat().st_size >= KEPT_FROM:
        with suppress(OSError):  # a cache is no duty
            save_index(index, cached)
    return index


def beside(shard: Path) -> Path:
    """The place of a shard's index beside it."""
    return shard.with_name(shard.name + SUFFIX)


def write_index(shard: Path, path: Path | None = None) -> tuple[int, str]:
    """Writes the index of a local shard, by default beside it, unless one that fits is there; returns the
    number of samples, and what could not be read.

    Raises:
        UserError: if it cannot be written.
    """
    path = path or beside(shard)
    try:
        index = load_index(path, shard)
        if index is None or path.stat().st_mtime_ns < shard.stat().st_mtime_ns or not index.fits():
            index = scan(shard)
            save_index(index, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return index.samples, index.problem


def scan(shard: Path) -> Index:
    """Makes the index of an uncompressed shard from its headers."""
    problems: list[str] = []
    ranges = []
    with open_shard(shard) as stream:
        for group in groups_of(stream, problems, wanted=()):
            ranges.append((group[0].start, group[-1].end))
    return Index.of(shard, np.array(ranges, dtype="<i8").reshape(-1, 2), summary(problems))


def save_index(index: Index, path: Path) -> None:
    """Writes an index, whole or not at all; several processes may do so at once."""
    head = {
        "format": FORMAT,
        "size": length_of(index.shard),
        "samples": index.samples,
        "headers": headers_checksum(index.shard, index.ranges) if index.checksum is None else index.checksum,
        "problem": index.problem,
    }
    with whole_copy(path, index.shard) as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.write(index.ranges.tobytes())


@contextmanager
def whole_copy(path: Path, shard: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is written, for those who may read `shard`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as file:
        try:
            yield file
            file.flush()
            with suppress(OSError, TypeError):  # a file system without modes, or an address
                shutil.copymode(shard, file.name)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load_index(path: Path, shard: Path) -> Index | None:
    """The index in `path`; None if there is none, or it is not of a shard of this size."""
    try:
        with open(path, "rb") as file:
            head = json.loads(file.readline(MOST_HEADER))
            start = file.tell()
            length = os.fstat(file.fileno()).st_size - start
        samples, problem, checksum = head["samples"], head["problem"], head["headers"]
        if (head["format"], head["size"], samples * 16) != (FORMAT, length_of(shard), length):
            return None
        return Index(shard, int(samples), str(problem), path, start, checksum)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def length_of(shard: Path | Address) -> int:
    return facts_of(shard).size if isinstance(shard, Address) else shard.stat().st_size


def headers_checksum(shard: Path, ranges: np.ndarray) -> int:
    """Of the headers at which the first, the middle and the last sample begin."""
    checksum, file = 0, opened(shard)
    for number in {0, len(ranges) // 2, len(ranges) - 1} if len(ranges) else ():
        start = int(ranges[number][0])
        if 0 <= start < file.length:  # that of a false index may be anything
            checksum ^= zlib.crc32(file.peek(start, start + BLOCK))
    return checksum


def unpack(shard: Path, path: Path) -> str:
    """Writes what can be unpacked of a compressed shard to `path`; returns why the rest cannot, or ""."""
    most = max(MOST_UNPACKED, MOST_RATIO * shard.stat().st_size)
    try:
        with open_shard(shard) as packed, gzip.open(packed) as file, whole_copy(path, shard) as copy:
            while True:
                try:
                    chunk = file.read1(CHUNK)  # `read` would lose what comes just before damage
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    return str(error)
                if not chunk:
                    return ""
                if shutil.disk_usage(path.parent).free < 2 * CHUNK:
                    raise UserError(f"no space left in {path.parent} to unpack {shard}: unpack it yourself")
                if copy.tell() + len(chunk) > most:
                    return f"it unpacks to more than {most:,} bytes"
                copy.write(chunk)
    except OSError as error:
        raise UserError(
            f"cannot unpack {shard} into {path.parent}: {error.strerror or error}; unpack it yourself, or "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def cache(kind: str, shard: Path) -> Path:
    """A path in the cache for this state of a shard."""
    if isinstance(shard, Address):
        return xdg_cache() / kind / RemoteFile(shard).key
    state = shard.stat()
    name = f"{shard.resolve()}/{state.st_size}/{state.st_mtime_ns}"
    return xdg_cache() / kind / key_of(name)
