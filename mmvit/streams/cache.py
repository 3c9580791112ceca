"""A bounded folder of pieces of remote files, which the processes of a machine share.

A piece is fetched once, by one process while the others wait for it, into a partial file that is locked, and
gets its name once it is whole, with a checksum at its end. One that the disk has damaged since is fetched
again. The least recently used ones make room; one that is open stays readable.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import sha256
from pathlib import Path
from zlib import crc32

from mmvit.errors import UserError
from mmvit.streams.remote import CHUNK, Failed

FOLDER, SIZE = "MMVIT_CACHE", "MMVIT_CACHE_SIZE"  # environment variables, which workers inherit
DEFAULT_SIZE = "50GB"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
ROOM = 0.05  # share of the cache that is freed at a time
TOTAL, PARTIAL = "total", ".partial"
SUM = 4  # bytes of the checksum at the end of a piece
TRUSTED = 60 * 10**9  # nanoseconds after its last use in which a piece is not checked again
MARKED = 10**6  # nanoseconds, of which times set by `touch` are multiples; by writing, none in a million
damaged: list[str] = []  # pieces that were removed, for `take_damaged`
in_progress: set[int] = set()  # descriptors of locked files, which a forked process must not keep locked


class InProgress(Exception):
    """Another process or thread fetches the piece."""


def close_in_progress() -> None:
    for file in in_progress:
        os.close(file)
    in_progress.clear()
    damaged.clear()  # the parent reports them


os.register_at_fork(after_in_child=close_in_progress)


def parse_size(text: object) -> int:
    """`50GB` → 50,000,000,000. Raises ValueError if it is no number with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", str(text).strip().upper())
    if found is None or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise ValueError(f'expected a size such as "50GB" ({", ".join(UNITS)}), got {text!r}')
    return size


def checked_size(text: object) -> object:
    parse_size(text)
    return text


def xdg_cache() -> Path:
    """The folder of mmvit's caches; none can be made for a user without a home, as in containers."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if root.startswith("~") else root, "mmvit")


@contextmanager
def used_cache(folder: str | None, size: str | None) -> Iterator[None]:
    """Sets the cache of this process and of those that it starts; None leaves it as it is."""
    given = {name: value for name, value in ((FOLDER, folder), (SIZE, size)) if value is not None}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def the_cache() -> "Cache":
    """The cache that the environment names. Raises UserError if its size is no size."""
    try:
        size = parse_size(os.environ.get(SIZE) or DEFAULT_SIZE)
    except ValueError as error:
        raise UserError(f"{SIZE}: {error}") from None
    return Cache(Path(os.environ.get(FOLDER) or xdg_cache() / "remote"), size)


def key_of(*parts: object) -> str:
    return sha256("/".join(map(str, parts)).encode("utf-8", "backslashreplace")).hexdigest()[:32]


class Cache:
    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.damaged = folder, size, damaged

    def open(self, name: str, length: int, fetch: Callable[[], Iterable[bytes]], wait: bool = True) -> int:
        """Opens a piece, fetched first if it is not there, or damaged, and returns its descriptor.

        Args:
            fetch: gives the bytes in parts; what it raises is passed on, and nothing is kept.
            wait: False raises InProgress where another process or thread fetches the piece already.

        Raises:
            UserError: if the cache cannot be written, or has no room.
            Failed: if its folder is removed meanwhile.
        """
        path = self.folder / name
        while True:
            with self.on_disk():
                file = open_whole(path, length, self.damaged)
            if file is not None:
                return file
            with self.claim(path, wait) as partial:
                if partial is None or path.exists():
                    continue
                with self.on_disk():
                    while not self.make_room(length + SUM, partial):
                        time.sleep(0.05)  # until other processes are done with theirs
                place = checksum = 0
                for part in fetch():
                    checksum = crc32(part, checksum)
                    with self.on_disk():
                        place += write(partial, part, place)
                if place != length:
                    raise EOFError(f"{place:,} of {length:,} bytes")
                with self.on_disk():
                    write(partial, checksum.to_bytes(SUM), place)
                    touch(partial)
                    os.fsync(partial)  # else it may hold zeros after a power failure
                    os.replace(f"{path}{PARTIAL}", path)

    @contextmanager
    def claim(self, path: Path, wait: bool) -> Iterator[int | None]:
        """The locked file to write a piece to; None if it has changed hands since it was opened."""
        place = f"{path}{PARTIAL}"
        with self.on_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        with locked(file, wait):
            try:
                yield file if is_at(place, file) else None
            finally:
                if is_at(place, file):
                    os.unlink(place)

    def make_room(self, length: int, partial: int) -> bool:
        """Takes `length` bytes of the disk for `partial`, and evicts pieces if the cache is full or the disk;
        returns False if what is being fetched just now fills the cache.

        Raises:
            UserError: if no cache of this size holds the piece.
        """
        if length > self.size:
            raise UserError(
                f"data.cache_size: {self.size:,} bytes hold no piece of {length:,}; make it larger "
                f"(or {SIZE} in the environment)"
            )
        file = os.open(self.folder / TOTAL, os.O_RDWR | os.O_CREAT, 0o644)
        with locked(file):
            text = os.read(file, 32).strip()
            total = int(text) if text.isdigit() else self.size
            if total + length > self.size:
                total = self.evict(self.size * (1 - ROOM) - length)
            try:
                allocate(partial, length)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                total = self.evict(total * (1 - 2 * ROOM) - length)  # the disk is smaller
                allocate(partial, length)
            if total + length > self.size:
                os.ftruncate(partial, 0)
                return False
            os.pwrite(file, f"{total + length:<31}\n".encode(), 0)
        return True

    def evict(self, most: float) -> int:
        """Removes the least recently used pieces until `most` bytes are left, and what processes that were
        killed have left; returns how many there are."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name == TOTAL:
                    continue
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda each: (not each[2].endswith(PARTIAL), each)):
            if path.endswith(PARTIAL):
                total -= size if remove_abandoned(path) else 0
                continue
            if total <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Turns a disk's errors into UserErrors, but the lack of the folder, which the next try makes again,
        into `Failed`."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOENT:  # someone empties the cache
                raise Failed(f"the folder {self.folder} has been removed") from None
            how = f"choose another folder with data.cache (or {FOLDER} in the environment)"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left in {self.folder} for pieces of shards: free some, or {how}"
                ) from None
            raise UserError(f"cannot use the folder {self.folder}: {error.strerror}; {how}") from None


def open_whole(path: Path, length: int, damaged: list[str]) -> int | None:
    """A piece's descriptor; None if it is not there, or not whole. Adds to `damaged` one that was whole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    has_all = os.fstat(file).st_size == length + SUM
    if has_all and is_intact(file, length):
        touch(file)
        return file
    if is_at(path, file):
        with suppress(FileNotFoundError):
            os.unlink(path)
            if has_all:
                damaged.append(str(path))
    os.close(file)
    return None


def is_intact(file: int, length: int) -> bool:
    """Whether a piece has its checksum; of one that has just been used, it is not computed."""
    changed = os.fstat(file).st_mtime_ns
    if changed % MARKED == 0 and 0 <= time.time_ns() - changed < TRUSTED:
        return True
    checksum = 0
    with suppress(OSError):  # of a sector that cannot be read
        for start in range(0, length, CHUNK):
            checksum = crc32(os.pread(file, min(CHUNK, length - start), start), checksum)
        return os.pread(file, SUM, length) == checksum.to_bytes(SUM)
    return False


def take_damaged() -> list[str]:
    """The damaged pieces that were found in this process, and not taken before."""
    found = [*damaged]
    del damaged[: len(found)]
    return found


def touch(file: int) -> None:
    """Makes a piece the most recently used one."""
    now = time.time_ns() // MARKED * MARKED
    with suppress(OSError):
        os.utime(file, ns=(now, now))


@contextmanager
def locked(file: int, wait: bool = True) -> Iterator[None]:
    """Holds the lock of an open file, which is closed at the end. Raises InProgress if it is held already."""
    in_progress.add(file)
    try:
        try:
            flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise InProgress from None
        except OSError:  # a file system without locks: at worst, a piece is fetched twice
            pass
        yield
    finally:
        if file in in_progress:  # else this is a forked process
            in_progress.discard(file)
            os.close(file)


def is_at(path: str, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def remove_abandoned(path: str) -> bool:
    """Removes a partial file unless a process is writing it; returns whether it did."""
    with suppress(OSError, InProgress), locked(os.open(path, os.O_RDWR), wait=False):
        os.unlink(path)
        return True
    return False


def allocate(file: int, length: int) -> None:
    os.ftruncate(file, 0)
    if hasattr(os, "posix_fallocate") and length:
        os.posix_fallocate(file, 0, length)


def write(file: int, data: bytes, place: int) -> int:
    """Writes all of `data` at `place`; returns its length."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, memoryview(data)[done:], place + done)
    return done
