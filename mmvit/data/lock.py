"""One process writes in a folder of shards at a time; its lock ends with it, however it dies."""

import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmvit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

LOCK = ".writing.lock"  # holds the process id and host, for the message
held: Counter[Path] = Counter()  # by this process


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes from writing shards there; may be nested.

    Raises:
        UserError: if another process writes there, or the folder cannot be written.
    """
    folder, lock = Path(folder).resolve(), None
    if not held[folder]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder {folder}: {error.strerror}") from None
        lock = take_lock(folder)
        for left in folder.glob(".*.tar*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
    held[folder] += 1
    try:
        yield
    finally:
        held[folder] -= 1
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(lock)


def take_lock(folder: Path) -> int | None:
    """The open lock of `folder`; None where the system or the disk has no locks."""
    path = folder / LOCK
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write in the folder {folder}: {error.strerror}") from None
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            process, _, host = os.read(file, 300).decode(errors="replace").partition(" ")
            os.close(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                path.unlink(missing_ok=True)
                return None
            raise UserError(
                f"{folder} is being written to by process {process or 'of unknown id'}"
                f"{host and f' on {host}'}; wait until it ends, or name another folder"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()} {socket.gethostname()}".encode())
            return file
        os.close(file)  # its earlier holder removed it in between
