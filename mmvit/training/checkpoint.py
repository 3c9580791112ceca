"""Checkpoints: folders `step-00001000/`, written whole or not at all; the last few are kept."""

import hashlib
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from mmvit.errors import UserError
from mmvit.files import check_unpacked_size, whole_file, write_json
from mmvit.training.disk import put_in_place, put_right, remove, writing
from mmvit.training.distributed import Processes

MANIFEST = "manifest.json"
VERSION = 2  # of the manifest, which from then on vouches for itself
KEYS = {"step", "bytes", "sha256"}  # of version 1; before that, there were no checksums


class Checkpoints:
    """The checkpoints of one run, in `root`."""

    def __init__(self, root: Path, keep: int, processes: Processes):
        self.root, self.keep, self.processes = root, keep, processes

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Calls `write(folder)` in every process with a temporary folder, then moves it into place at once.

        Earlier checkpoints stay as they are if that is killed or fails (UserError, where the disk is full).
        """
        final = self.root / f"step-{step:08d}"
        partial = writing(final)

        def begin() -> None:
            put_right(self.root)
            partial.mkdir(parents=True)

        def finish() -> None:
            write_manifest(partial, step)
            put_in_place(final)
            upto = [folder for folder in self.complete() if folder <= final]  # newer ones are damaged
            for old in upto[: -self.keep]:
                remove(old)

        try:
            self.processes.on_main(begin)
            self.processes.together(lambda: write(partial))
            self.processes.on_main(finish)
        except BaseException:
            if self.processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(folder for folder in self.root.iterdir() if re.fullmatch(r"step-\d+", folder.name))

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is as it was written, and what is wrong with newer ones; None if there
        is none."""
        problems = []
        for folder in reversed(self.complete()):
            if not (problem := problem_of(folder)):
                return folder, problems
            problems.append(f"the checkpoint {folder} is damaged: {problem}")
        return None, problems


def problem_of(folder: Path) -> str:
    """How the files of a checkpoint differ from its manifest; "" if they do not."""
    try:
        return difference(folder)
    except OSError as error:  # of a disk that fails
        return f"{Path(error.filename or '').name or 'a file'} cannot be read ({error.strerror})"


def difference(folder: Path) -> str:
    """As `problem_of`; raises OSError if a file cannot be read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return f"{MANIFEST} is missing or unreadable"
    sizes = manifest.get("bytes") if isinstance(manifest, dict) else None
    if not isinstance(sizes, dict):
        return f"{MANIFEST} lists no files"
    if not is_as_written(manifest) or manifest["step"] != int(folder.name[5:]):
        return f"the content of {MANIFEST} has changed since it was written"
    found = sizes_of(folder)
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes, not {size}"
    checksums = manifest.get("sha256", {})
    found = checksums_of(folder) if checksums else {}
    for name in checksums:
        if found[name] != checksums[name]:
            return f"the content of {name} has changed since it was written"
    return ""


def write_manifest(folder: Path, step: int) -> None:
    """Lists the files of `folder`, with their sizes and checksums."""
    manifest = {"version": VERSION, "step": step, "bytes": sizes_of(folder), "sha256": checksums_of(folder)}
    write_json({**manifest, "own_sha256": digest_of(manifest)}, folder / MANIFEST)


def is_as_written(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is one of this version or of an earlier one, without any damage that it can tell."""
    if manifest.keys() == KEYS - {"sha256"}:
        return True
    checksums = manifest.get("sha256")
    if not (isinstance(checksums, dict) and checksums.keys() == manifest["bytes"].keys()):
        return False
    rest = {key: value for key, value in manifest.items() if key != "own_sha256"}
    return manifest.keys() == KEYS or (
        manifest.get("version") == VERSION and manifest.get("own_sha256") == digest_of(rest)
    )


def digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise damaged(path.parent, f"{path.name} is missing or unreadable") from None


def write_state(state: dict[str, Any], path: Path) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from None  # torch's own message does not say that the disk is full


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote: tensors, numbers, strings and containers; nothing else is unpickled."""
    if not path.is_file():  # a device would never end
        raise damaged(path.parent, f"{path.name} is missing")
    try:
        check_unpacked_size(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:  # its text advises to load the file unsafely
        raise damaged(path.parent, f"{path.name} cannot be read (not what mmvit writes)") from None
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise damaged(path.parent, f"{path.name} cannot be read ({reason})") from None


def damaged(folder: Path, problem: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged: {problem}; delete that folder to resume from an earlier one"
    )


def sizes_of(folder: Path) -> dict[str, int]:
    """The size in bytes of every file of a checkpoint, by relative name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in files_of(folder)}


def checksums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by relative name; several are read at a time."""
    with ThreadPoolExecutor() as pool:
        names = [str(path.relative_to(folder)) for path in files_of(folder)]
        return dict(zip(names, pool.map(checksum_of, files_of(folder)), strict=True))


def checksum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All files under `folder` but the manifest."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that models use, in types that `read_state` accepts."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """A context after which the random generators are as before, for evaluations."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
