"""A remote shard as a file: any part of it, or all from front to back, read in pieces through the cache."""

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.cache import InProgress, key_of, open_whole, the_cache, touch
from mmvit.streams.remote import CHUNK, facts_of, read_part, tried
from mmvit.streams.tally import fetched_again

PIECE = 2**23  # bytes; a server that gives no parts of a file is asked for all of it
THREADS = 4  # that fetch ahead
TOUCH_EVERY = 5  # seconds
OPEN_PIECES = 2  # of a shard


class LocalFile:
    """An open file; closed when nothing refers to it any more."""

    def __init__(self, path: Path):
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot open shard {path}: {error.strerror}") from None
        self.length = os.fstat(self.file.fileno()).st_size

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.file.fileno(), end - start, start)

    peek = read


class RemoteFile:
    """Any part of a shard, at any time, for one thread; any may `fetch`.

    Raises:
        UserError: here and when reading, if the shard cannot be read, or the cache not be used.
    """

    def __init__(self, shard: Address):
        self.shard, self.facts = shard, facts_of(shard)
        self.length = self.facts.size
        self.piece = PIECE if self.facts.has_ranges else max(1, self.length)
        of_state = self.facts.version or shard.with_secrets  # which may tell files of one name apart
        self.key = key_of(shard, self.length, of_state)
        self.cache = the_cache()
        self.recent: dict[int, Piece] = {}  # the last read one last

    @property
    def pieces(self) -> int:
        return -(-self.length // self.piece)

    def size_of(self, number: int) -> int:
        return min(self.piece, self.length - number * self.piece)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, fewer at the end of the file."""
        end = min(end, self.length)
        parts = []
        for number in range(start // self.piece, -(-end // self.piece) if end > start else 0):
            first = number * self.piece
            parts.append(self.opened(number).read(max(start, first) - first, min(end - first, self.piece)))
        return b"".join(parts)

    def peek(self, start: int, end: int) -> bytes:
        """A few bytes, for which no whole piece is fetched where the server gives them alone."""
        end = min(end, self.length)
        if not self.facts.has_ranges or self.piece >= self.length:
            return self.read(start, end)
        return tried(self.shard, lambda: b"".join(read_part(self.shard, self.facts, start, end)))

    def fetch(self, number: int) -> None:
        """Brings a piece into the cache, unless someone else does, or it cannot be had now."""
        with suppress(InProgress, UserError):  # who reads it will be told
            os.close(self.open(number, wait=False))

    def open(self, number: int, wait: bool = True) -> int:
        def attempt() -> int | None:
            try:
                return self.cache.open(
                    f"{self.key}-{number}", self.size_of(number), partial(self.parts, number), wait
                )
            except InProgress:  # not to be tried again
                return None

        if (file := tried(self.shard, attempt)) is None:
            raise InProgress
        return file

    def parts(self, number: int) -> Iterator[bytes]:
        """The bytes of a piece from the server."""
        start = number * self.piece
        return read_part(self.shard, self.facts, start, start + self.size_of(number))

    def straight(self) -> Iterator[bytes]:
        """The bytes of all pieces, without bringing any into the cache: who holds room there to fill it must
        not wait for more."""
        for number in range(self.pieces):
            length = self.size_of(number)
            path = self.cache.folder / f"{self.key}-{number}"
            if (file := open_whole(path, length, self.cache.damaged)) is not None:
                piece = Piece(file)
                yield from (piece.read(at, min(at + CHUNK, length)) for at in range(0, length, CHUNK))
            elif self.facts.has_ranges:
                yield tried(self.shard, lambda: b"".join(self.parts(number)))  # noqa: B023
            else:
                yield from self.parts(number)

    def opened(self, number: int) -> "Piece":
        piece = self.recent.pop(number, None) or Piece(self.open(number))
        self.recent[number] = piece
        if len(self.recent) > OPEN_PIECES:
            del self.recent[next(iter(self.recent))]
        return piece


class Piece:
    """An open piece; closed when nothing refers to it any more."""

    def __init__(self, file: int):
        self.file, self.touched = file, time.monotonic()

    def read(self, start: int, end: int) -> bytes:
        if time.monotonic() - self.touched > TOUCH_EVERY:
            self.touched = time.monotonic()
            touch(self.file)
        return os.pread(self.file, end - start, start)

    def __del__(self):
        os.close(self.file)


class Fetchers:
    """Threads that do what they are told, in turn, and keep no process from ending."""

    def __init__(self, number: int = THREADS):
        self.todo: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.is_closed = False
        for _ in range(number):
            Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while not self.is_closed:
            self.todo.get()()
        self.todo.put(int)  # nothing, to wake the next one

    def do(self, task: Callable[[], None]) -> None:
        self.todo.put(task)

    def close(self) -> None:
        """Drops what is not begun."""
        self.is_closed = True
        self.todo.put(int)


class RemoteStream(io.RawIOBase):
    """A shard from front to back; the next pieces are fetched meanwhile."""

    def __init__(self, shard: Address):
        super().__init__()
        self.remote, self.place, self.asked = RemoteFile(shard), 0, 1
        self.remote.cache.damaged = []  # its own, for `close`, rather than the process's
        self.fetchers = Fetchers() if self.remote.pieces > 1 else None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        end = self.remote.length if size < 0 else min(self.place + size, self.remote.length)
        ahead = min(self.remote.pieces, end // self.remote.piece + 1 + THREADS)
        while self.fetchers and self.asked < ahead:
            self.fetchers.do(partial(self.remote.fetch, self.asked))
            self.asked += 1
        data = self.remote.read(self.place, end)
        self.place += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self.fetchers and not self.closed:
            self.fetchers.close()
        if not self.closed and (damaged := self.remote.cache.damaged):
            told = f"{fetched_again(len(damaged))}, such as {damaged[0]}: check its disk"
            warnings.warn(told, stacklevel=2)
        super().close()
