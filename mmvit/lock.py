"""A lock file: one process holds it at a time; it says which, and ends with it however that dies."""

import errno
import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmvit.errors import UserError, without_secrets

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


def take_lock(path: Path, use: str, advice: str) -> int:
    """Holds `path` for this process, until `release_lock` of what is returned. Data workers do not inherit
    that, as they would a lock of `flock`.

    Raises:
        UserError: if another process holds it, such as "runs/one is in use by process 12 on node7 since
            2026-11-30 12:00:00 (mmvit train one); wait for it to end"; or if nothing can be written there.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write in the folder {path.parent}: {error.strerror}") from None
        owner = read_owner(file)
        held = f"{path.parent} {use} {describe(owner)}"
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(file)
                raise UserError(f"{held}; {advice}") from None
            if may_live(owner):  # the file system has no locks, so its word counts
                os.close(file)
                raise UserError(f"{held}; {advice}. If that has ended, remove {path}") from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(this_process()).encode(), 0)
            return file
        os.close(file)  # its earlier holder removed it in between


def release_lock(path: Path, file: int) -> None:
    path.unlink(missing_ok=True)
    os.close(file)


def this_process() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    command = without_secrets(command)[:200]
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def read_owner(file: int) -> dict[str, Any]:
    with suppress(ValueError, OSError):
        owner = json.loads(os.pread(file, 10_000, 0))
        if isinstance(owner, dict):
            return owner
    return {}


def describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    named = {name: owner.get(name, "?") for name in ("process", "host", "since", "command")}
    return "process {process} on {host} since {since} ({command})".format(**named)


def may_live(owner: dict[str, Any]) -> bool:
    """Whether the process in question may still be there; of another host, this cannot tell."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["process"]), 0)
    except PermissionError:
        return True  # of another user
    except (ProcessLookupError, KeyError, ValueError, TypeError):
        return False
    return owner["process"] != os.getpid()
