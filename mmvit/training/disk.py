"""Folders on disk: replaced whole in one step, flushed, and put right after a kill."""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def writing(folder: Path) -> Path:
    """Where to write what will be `folder`."""
    return folder.with_name(f".writing-{folder.name}")


def put_in_place(folder: Path) -> None:
    """Moves what was written to `writing(folder)` to `folder`, and removes what was there.

    At any moment the one or the other is there, whole. Only where the system cannot exchange two folders
    (NFS, macOS) there is a gap between two renames, which `put_right` closes after a kill.
    """
    new, old = writing(folder), replaced(folder)
    flush_to_disk(new)
    if exchange(new, folder):
        old = new
    else:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_right(root: Path) -> None:
    """Puts back what a killed `put_in_place` had moved away, and removes what is left of it otherwise."""
    for old in root.glob(".replaced-*"):
        folder = old.with_name(old.name.removeprefix(".replaced-"))
        if not folder.exists():
            old.rename(folder)
    for left in [*root.glob(".replaced-*"), *root.glob(".writing-*")]:
        shutil.rmtree(left, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a folder; what a kill leaves of it is not taken for a whole one."""
    folder.rename(writing(folder))
    shutil.rmtree(writing(folder), ignore_errors=True)


def replaced(folder: Path) -> Path:
    return folder.with_name(f".replaced-{folder.name}")


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where that is impossible."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = [AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)]
    return renameat2 is not None and renameat2(*paths, RENAME_EXCHANGE) == 0


def flush_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that flush no folders
            raise
    finally:
        os.close(descriptor)
