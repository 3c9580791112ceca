"""Compressed shards (`.tar.gz`), of which any part can be read once all is unpacked into the cache."""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.cache import key_of, the_cache, xdg_cache
from mmvit.streams.pieces import LocalFile, Piece, RemoteFile
from mmvit.streams.remote import facts_of
from mmvit.streams.shards import open_shard
from mmvit.streams.tar import CHUNK

MOST_UNPACKED = 2**30  # bytes that any compressed shard may have unpacked
MOST_RATIO = 200  # to its own size, for larger ones: zeros pack to a thousandth


@dataclass(frozen=True)
class Unpacked:
    """The readable part of a compressed shard, `length` bytes unpacked."""

    shard: Path | Address
    length: int


def opened(shard: Path | Address | Unpacked) -> "LocalFile | RemoteFile":
    """Any part of a shard, by its `read`."""
    if isinstance(shard, Unpacked):
        return UnpackedFile(shard)
    return RemoteFile(shard) if isinstance(shard, Address) else LocalFile(shard)


class UnpackedFile(RemoteFile):
    """As if from a server that gives only whole files: one piece of the cache, which may be evicted and made
    again."""

    def __init__(self, unpacked: Unpacked):
        self.shard, self.length = unpacked.shard, unpacked.length
        self.piece = max(1, self.length)
        self.key = f"{state_of(self.shard)}-unpacked"
        self.cache = the_cache()
        self.recent: dict[int, Piece] = {}

    def parts(self, number: int) -> Iterator[bytes]:
        length = 0
        for part in unpack(self.shard, [], is_kept=False):
            length += len(part)
            yield part
        if length != self.length:
            with suppress(OSError):
                cache("index", self.shard).unlink()
            raise UserError(f"{self.shard} has changed since it was indexed: start again when it is complete")

    def peek(self, start: int, end: int) -> bytes:
        return self.read(start, end)


class PartsStream:
    """The bytes of an iterator from front to back; `length` of them have been read."""

    def __init__(self, parts: Iterator[bytes]):
        self.parts, self.left, self.length = parts, memoryview(b""), 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        while len(self.left) < size and (part := next(self.parts, b"")):
            self.left = memoryview(bytes(self.left) + part)
        data, self.left = bytes(self.left[:size]), self.left[size:]
        self.length += len(data)
        return data


class UnpackedStream(PartsStream):
    """A compressed shard from front to back. Why it cannot be read to its end is in `problems`."""

    def __init__(self, shard: Path | Address):
        self.problems: list[str] = []
        super().__init__(unpack(shard, self.problems))


def unpack(shard: Path | Address, problems: list[str], is_kept: bool = True) -> Iterator[bytes]:
    """What can be unpacked of a shard, in parts; adds to `problems` what is wrong with the rest.

    Args:
        is_kept: whether the pieces of a remote shard go into the cache.

    Raises:
        UserError: if the shard cannot be read now.
    """
    most, length = max(MOST_UNPACKED, MOST_RATIO * length_of(shard)), 0
    is_straight = isinstance(shard, Address) and not is_kept
    source = nullcontext(PartsStream(RemoteFile(shard).straight())) if is_straight else open_shard(shard)
    with source as packed, gzip.open(packed) as file:
        while True:
            try:
                part = file.read1(CHUNK)  # `read` would lose what comes just before damage
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                problems.append(str(error))
                return
            except OSError as error:
                if is_straight:  # the connection's, to be tried again
                    raise
                raise UserError(f"cannot read shard {shard}: {error.strerror}") from None
            if length + len(part) > most:
                problems.append(f"it unpacks to more than {most:,} bytes")
                return
            if not part:
                return
            length += len(part)
            yield part


def length_of(shard: Path | Address | Unpacked) -> int:
    if isinstance(shard, Unpacked):
        return shard.length
    return facts_of(shard).size if isinstance(shard, Address) else stat_of(shard).st_size


def stat_of(shard: Path) -> os.stat_result:
    """Raises UserError if the shard has disappeared."""
    try:
        return shard.stat()
    except OSError as error:
        raise UserError(f"cannot open shard {shard}: {error.strerror}") from None


def state_of(shard: Path | Address) -> str:
    """A name for this state of a shard in the cache."""
    if isinstance(shard, Address):
        return RemoteFile(shard).key
    state = stat_of(shard)
    return key_of(f"{shard.resolve()}/{state.st_size}/{state.st_mtime_ns}")


def cache(kind: str, shard: Path | Address) -> Path:
    """A path in the cache for this state of a shard."""
    return xdg_cache() / kind / state_of(shard)
