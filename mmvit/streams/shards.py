"""Shards: the tar files that a pattern names, and the samples in one, grouped by key."""

import difflib
import fnmatch
import glob
import gzip
import re
import zlib
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BeforeValidator, Field, PlainSerializer

from mmvit.errors import MissingData, UserError, without_secrets
from mmvit.streams.address import Address, place
from mmvit.streams.pieces import RemoteStream
from mmvit.streams.remote import files_in
from mmvit.streams.shard_lists import shards_listed
from mmvit.streams.tar import MOST_BYTES, NO_TAR, BadTar, File, Problem, read_files

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
HELD_OUT, OLD_HELD_OUT = "held-out", "heldout"  # the split's name now, and in shards made before 2026-12


class BadSample(Exception):
    """A sample that cannot be used: `reason` is a category to count by, `detail` what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BadShard(Exception):
    """A truncated or damaged shard, of which not all samples could be read."""

    def __init__(self, shard: Path, problem: object):
        found = str(problem)
        super().__init__(
            f"{shard} is {found}" if found.startswith(NO_TAR) else f"{shard} is truncated or damaged: {found}"
        )
        self.shard = shard


@dataclass(slots=True)
class Sample:
    """One sample as stored: `files` maps an extension (`png`, `txt`, `codes.npy`) to its bytes."""

    key: str
    shard: Path
    files: dict[str, bytes]
    copy: int = 0  # 0, 1, ...: a shard that an epoch names several times is read as several copies


# A setting that names shards by one pattern or several.
ShardPatterns = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(lambda patterns: [without_secrets(pattern) for pattern in patterns]),
    Field(
        min_length=1,
        description="folders, globs, tar files, or addresses; a shard named twice is read twice an epoch",
    ),
]


def expand_shards(pattern: str | Path | Address | list[str | Path | Address]) -> list[Path | Address]:
    """The shards that `pattern` names, sorted.

    Args:
        pattern: `dir/train-{000000..000003}.tar`, a glob `dir/train-*.tar` (not the shards of a split
            train-dev), a tar file, a folder (all of its shards), one of these at an address
            (`s3://bucket/dir`) or wids' list of shards there (`s3://bucket/dir/shards.json`), or a list of
            these, which may name a shard several times.

    Raises:
        UserError: if nothing matches, a local file of a brace range is missing, an address cannot be listed,
            or the pattern is a `pipe:`.
    """
    if isinstance(pattern, list):
        if not pattern:
            raise UserError("the list of shard patterns is empty; give a folder, a glob or a tar file")
        return [shard for part in pattern for shard in expand_shards(part)]
    if str(pattern).startswith("pipe:"):
        raise UserError(f"{pattern}: refused, as it would run a shell command; name the shards' address")
    if isinstance(path := place(pattern), Address):
        return remote_shards(path)
    text = str(path) if pattern else ""
    if not text:
        raise UserError("the shard pattern is empty; give a folder, a glob or dir/train-{000000..000003}.tar")
    if path.is_dir():
        shards = sorted(
            file for file in path.iterdir() if file.name.endswith(SHARD_SUFFIXES) and file.name[0] != "."
        )
    elif "{" in text:
        shards = [Path(name) for name in expand_braces(text)]
        if missing := [shard for shard in shards if not shard.is_file()]:
            found = f"{len(missing)} of {len(shards)} shards do not exist, the first is {missing[0]}"
            raise MissingData(f"{text}: {found}; {what_exists(path)}")
    else:
        shards = [path] if path.is_file() else matches(path)
        if not shards and path.name.startswith(f"{HELD_OUT}-"):
            shards = matches(path.with_name(path.name.replace(HELD_OUT, OLD_HELD_OUT, 1)))
    if not shards:
        raise MissingData(f"no shards match {text}; {what_exists(path)}")
    for shard in shards:
        refuse_special_file(shard)
    return shards


def matches(path: Path) -> list[Path]:
    """The files that a glob matches, sorted."""
    return of_split(path, sorted(Path(name) for name in glob.glob(str(path))))


def of_split(path: Path | Address, found: list[Path | Address]) -> list[Path | Address]:
    """Of the files that a glob matches, those of its split: `train-*.tar` means train-NUMBER.tar if there are
    any such, as those of a split train-dev are others."""
    split = path.name.removesuffix("-*.tar")
    if split == path.name or glob.has_magic(split):
        return found
    number = re.compile(rf"{re.escape(split)}-\d+\.tar")
    return [shard for shard in found if number.fullmatch(shard.name)] or found


def remote_shards(pattern: Address) -> list[Address]:
    """`expand_shards` of an address. A range needs no listing."""
    if "{" in pattern.parts[1]:
        return [Address(text) for text in expand_braces(pattern.text)]
    if pattern.name.endswith(SHARD_SUFFIXES) and not glob.has_magic(pattern.name):
        return [pattern]
    if pattern.suffix == ".json":
        if listed := shards_listed(pattern):
            return listed
        raise MissingData(
            f'{pattern}: expected a list such as {{"shardlist": [{{"url": NAME, "nsamples": 500}}]}}'
        )
    folder = pattern.parent if glob.has_magic(pattern.name) else pattern
    files = [file for file in files_in(folder) if file.name.endswith(SHARD_SUFFIXES)]
    found = files if folder == pattern else [f for f in files if fnmatch.fnmatchcase(f.name, pattern.name)]
    if not found:
        held = f"it holds {', '.join(file.name for file in files[:4])}" if files else "it holds no .tar files"
        raise MissingData(f"no shards match {pattern}; {held}")
    if unsafe := [file.name for file in found if "$" in file.name]:  # a server would be sent its value
        raise UserError(
            f"{folder} lists {unsafe[0]!r}: $ stands for an environment variable; rename the file"
        )
    return of_split(pattern, found)


def refuse_special_file(shard: Path) -> None:
    """Raises UserError for a named pipe, which would wait for ever, a device or a folder."""
    if shard.exists() and not shard.is_file():
        raise UserError(f"{shard} is not an ordinary file; move it away, or name the shards without it")


def shards_of(folder: Path | Address, split: str) -> list[Path | Address]:
    """The shards `SPLIT-NUMBER.tar` of a folder, sorted; `*` means all splits.

    A split whose name merely begins with `split` is another one. Raises UserError if there are no shards.
    """
    shards = expand_shards(place(folder) / f"{split}-*.tar")
    names = (split, OLD_HELD_OUT) if split == HELD_OUT else (split,)
    if own := [shard for shard in shards if split == "*" or split_of(shard) in names]:
        return own
    raise UserError(f"no shards of {split} in {folder}, only of splits whose names begin with it")


def split_of(shard: Path) -> str:
    """`held-out-000000.tar` → `held-out`."""
    return shard.stem.rpartition("-")[0] or shard.stem


def expand_braces(text: str) -> list[str]:
    """`a-{08..10}.tar` → `a-08.tar, a-09.tar, a-10.tar`; `{a,b}` → both. Several braces multiply."""
    found = re.search(r"(?<!\$)\{([^{}]*)\}", text)
    if not found:
        return [text]
    inner = found.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = span.groups()
        if int(first) > int(last):
            raise UserError(f"{text}: the range {inner} runs backwards; write {{{last}..{first}}}")
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise UserError(f"{text}: {{{inner}}} is neither a range {{000000..000003}} nor a list {{a,b}}")
    head, tail = text[: found.start()], text[found.end() :]
    return [head + choice + rest for rest in expand_braces(tail) for choice in choices]


def what_exists(path: Path) -> str:
    """For an error message, what is at or above `path`: the nearest existing folder and the shards in it."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(SHARD_SUFFIXES))
    if not names and folder != path and path.suffix not in SHARD_SUFFIXES:
        folders = sorted(inner.name for inner in folder.iterdir() if inner.is_dir())
        near = difflib.get_close_matches(path.name, folders, n=1)
        held = f"; it has {', '.join(folders[:8])}{' ...' if len(folders) > 8 else ''}" if folders else ""
        return f"{folder} has no {path.name}" + (f"; did you mean {folder / near[0]}?" if near else held)
    missing = path.parent
    if not names and not missing.is_dir():  # the nearest existing folder is further up
        while not missing.parent.is_dir():
            missing = missing.parent
        folders = sorted(inner.name for inner in folder.iterdir() if inner.is_dir())
        near = difflib.get_close_matches(missing.name, folders, n=1)
        return f"{missing} does not exist" + (f"; did you mean {folder / near[0]}?" if near else "")
    if not names:
        return f"{folder} exists but holds no .tar files"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder} holds {', '.join(names[:4])}{more}"


def read_shard(path: Path, only: Collection[str] | None = None) -> Iterator[Sample]:
    """Yields the samples of a tar, reading it once from front to back.

    Consecutive files that share the name up to the first dot of the basename make a sample. A sample of which
    a file cannot be read is left out, and so are the two beside a damaged part, which may lack files.

    Args:
        only: extensions to read; files with others are skipped, and so are samples without any of these.

    Raises:
        BadShard: after all samples that can be read, if any could not.
        UserError: if the file cannot be opened, or is no ordinary file.
    """
    problems: list[str] = []
    with (
        open_shard(path) as stream,
        nullcontext(stream) if path.suffix == ".tar" else gzip.open(stream) as archive,
    ):
        wanted = None if only is None else [f".{extension}" for extension in only]
        for group in groups_of(archive, problems, wanted):
            if files := {split_name(file.name)[1]: file.data for file in group if file.data is not None}:
                yield Sample(split_name(group[0].name)[0], path, files)
    if problems:
        raise BadShard(path, summary(problems))


def open_shard(path: Path) -> BinaryIO:
    """Raises UserError if the file cannot be opened, or is no ordinary file."""
    if isinstance(path, Address):
        return RemoteStream(path)
    refuse_special_file(path)
    try:
        return open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from None


def groups_of(
    archive: BinaryIO, problems: list[str], wanted: Collection[str] | None = None
) -> Iterator[list[File]]:
    """The files of each sample that can be read whole; adds to `problems` what cannot.

    Args:
        wanted: as for `read_files`.
    """
    group: list[File] = []
    extensions: set[str] = set()
    key: str | None = None
    broken: str | None = None  # the key of a sample that lacks files
    is_after_damage = False
    for item in files_and_problems(archive, wanted):
        if isinstance(item, Problem):
            problems.append(item.text)
            is_after_damage = item.name is None
            broken = None if item.name is None else split_name(item.name)[0]
            if is_after_damage or key == broken:
                group = []
            continue
        own, extension = split_name(item.name)
        if is_after_damage:
            broken, is_after_damage = own, False
        if own == broken or not extension:
            continue
        if own != key or extension in extensions or not group:
            if group:
                yield group
            group, extensions, key = [], set(), own
        group.append(item)
        extensions.add(extension)
        if item.end - group[0].start > MOST_BYTES:
            problems.append(f"a sample of more than {MOST_BYTES:,} bytes at byte {group[0].start:,}")
            broken, group = own, []
    if group:
        yield group


def files_and_problems(archive: BinaryIO, wanted: Collection[str] | None) -> Iterator[File | Problem]:
    """`read_files`, with what ends it as the last problem."""
    try:
        yield from read_files(archive, wanted)
    except (BadTar, OSError, EOFError, zlib.error) as error:
        yield Problem(None, str(error))


def summary(problems: list[str]) -> str:
    more = f"; {len(problems) - 2:,} more such" if len(problems) > 2 else ""
    return "; ".join(problems[:2]) + more


def split_name(name: str) -> tuple[str, str]:
    """`dir/0001.codes.npy` → (`dir/0001`, `codes.npy`); the extension is in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
