"""Where the samples of a shard lie, so that any of them can be read without those before it."""

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
from mmvit.streams.packed import Unpacked, UnpackedStream, cache, length_of, opened
from mmvit.streams.remote import read_file
from mmvit.streams.shards import groups_of, open_shard, summary
from mmvit.streams.tar import BLOCK, CHUNK

FORMAT = "mmvit-index-1"
MOST_HEADER = 2**20
SUFFIX = ".index"
KEPT_FROM = 2**23  # bytes of a shard: smaller ones are indexed again faster than this is worth


@dataclass
class Index:
    """The number of a shard's samples, and what could not be read. `shard` is the file that holds the
    samples."""

    shard: Path | Address | Unpacked
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


def index_of(shard: Path | Address) -> Index:
    """A shard's index: from the file beside it (`mmvit index`), from the cache, or made now.

    Raises:
        UserError: if the shard cannot be opened.
    """
    is_packed = shard.suffix != ".tar"
    if not is_packed and (found := load_index(beside(shard), shard)):
        return found
    cached = cache("index", shard)
    if found := load_index(cached, shard):
        return found
    index = scan_packed(shard) if is_packed else scan(shard)
    if is_packed or length_of(shard) >= KEPT_FROM:
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


def scan_packed(shard: Path | Address) -> Index:
    """Makes the index of a compressed shard."""
    problems: list[str] = []
    stream = UnpackedStream(shard)
    groups = groups_of(stream, problems, wanted=())
    ranges = [(group[0].start, group[-1].end) for group in groups]
    while stream.read(CHUNK):  # what follows the end of the archive
        pass
    index = Index.of(Unpacked(shard, stream.length), np.array(ranges, dtype="<i8").reshape(-1, 2))
    index.problem, index.checksum = summary([*stream.problems, *problems]), 0
    return index


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
        if shard.suffix != ".tar":
            shard, checksum = Unpacked(shard, head["size"]), None  # its place in the cache says its state
        if (head["format"], head["size"], samples * 16) != (FORMAT, length_of(shard), length):
            return None
        return Index(shard, int(samples), str(problem), path, start, checksum)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def samples_promised(shard: Path | Address) -> int | None:
    """The samples that a shard had when the index beside it was made, whatever became of it since; None
    without such an index, and if the shard was damaged already."""
    try:
        if isinstance(shard, Address):
            head = (read_file(beside(shard)) or b"").partition(b"\n")[0]
        else:
            with open(beside(shard), "rb") as file:
                head = file.readline(MOST_HEADER)
        found = json.loads(head)
        return found["samples"] if found["format"] == FORMAT and not found["problem"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def headers_checksum(shard: Path, ranges: np.ndarray) -> int:
    """Of the headers at which the first, the middle and the last sample begin."""
    checksum, file = 0, opened(shard)
    for number in {0, len(ranges) // 2, len(ranges) - 1} if len(ranges) else ():
        start = int(ranges[number][0])
        if 0 <= start < file.length:  # that of a false index may be anything
            checksum ^= zlib.crc32(file.peek(start, start + BLOCK))
    return checksum
