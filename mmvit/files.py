"""Files, whole or not at all: bounded when they are read, put in place when they are written."""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmvit.errors import UserError

MOST_JSON = 2**24  # bytes of a file of settings, and of the header of weights
MOST_PACKED = 2**28  # bytes that any archive may unpack to
MOST_RATIO = 16  # to its own size, for larger ones


def read_bounded(path: Path) -> bytes:
    """What is in a file of settings. Raises ValueError if it is far larger than any."""
    with path.open("rb") as file:
        if len(data := file.read(MOST_JSON + 1)) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON:,} bytes")
    return data


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read, is no JSON, or no text that could be
    written again: JSON may write half of a surrogate pair."""
    try:
        value = json.loads(read_bounded(path).decode())
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # too large, numbers of too many digits, nested too deep
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def write_json(value: Any, path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, with the same suffix, to write to; the file then takes its place.
    Makes the folder.

    Raises:
        UserError: if that fails, for instance on a full disk; `path` is then as before and nothing is left
            behind.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The name that `whole_file` gives a file while it is written."""
    return path.with_name(f".partial-{path.name}")


def check_unpacked_size(path: Path) -> None:
    """Raises UserError for an .npz, .pth or .bin that unpacks to far more than it is."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > max(MOST_PACKED, MOST_RATIO * path.stat().st_size):
        raise UserError(f"{path} unpacks to {size:,} bytes, which no weights do: it is not read")


def check_writable(path: Path, megabytes: float = 1) -> None:
    """Raises UserError if `path`, a file or folder to be, cannot be written, or its disk is full.

    Nothing is left behind: missing parent folders are made when there is something to write.
    """
    if path.is_dir():
        folder = path
    else:
        folder = path.parent
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(round(megabytes * 1e6)))
            probe.flush()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror} ({folder})") from None
