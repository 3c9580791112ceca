"""One process writes in a folder of shards at a time; its lock ends with it, however it dies."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmvit.errors import UserError
from mmvit.lock import release_lock, take_lock

LOCK = ".writing.lock"
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
        advice = "wait until it ends, or name another folder"
        lock = take_lock(folder / LOCK, "is being written to by", advice)
        for left in folder.glob(".*.tar*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
    held[folder] += 1
    try:
        yield
    finally:
        held[folder] -= 1
        if lock is not None:
            release_lock(folder / LOCK, lock)
