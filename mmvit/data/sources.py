"""Your own images, found in a folder or a list, with the caption, class, split and group of each."""

import csv
import difflib
import itertools
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from mmvit.data.captions import check_text, read_text
from mmvit.data.writing import Outcome, printable
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.shards import HELD_OUT, BadSample, Sample

STORED_AS_IS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
# Of several formats of one image the first is used: lossless ones, then the others.
FORMATS = (".png", ".tif", ".tiff", ".bmp", ".webp", ".jpg", ".jpeg", ".gif")
CONVERT = "convert them to JPEG or PNG first"
NOT_READ = {
    **dict.fromkeys((".svg", ".svgz", ".eps", ".pdf"), "render them to PNG first, e.g. with resvg"),
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".xcf", ".tga", ".exr"), CONVERT),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf"), CONVERT),
}
LISTS = (".csv", ".tsv", ".jsonl")
LONGEST_LINE = 2**22  # characters of a list
MOST_BYTES = 2**28  # of an image or text
COLUMNS = ("path", "caption", "captions", "class", "split", "group")
OTHER_NAMES = {  # of these columns in other people's lists
    **dict.fromkeys(("label", "labels", "category", "target"), "class"),
    **dict.fromkeys(("text", "description", "prompt"), "caption"),
    **dict.fromkeys(("fold", "subset", "partition"), "split"),
}
SPLITS = {
    "train": ("train", "training", "trainval"),
    HELD_OUT: (
        *("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
        *(HELD_OUT, "heldout", "hold-out", "holdout"),
    ),
    "test": ("test", "tests", "testing"),
}
SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
BEFORE_SPLIT = r"^(seg|images?|imgs?|data|dataset)[-_ ]"  # seg_train
AFTER_SPLIT = r"[-_ ]?(set|dataset|images|imgs|data|split|\d{1,4})$"  # train_images, val2017, test1
# Tux Paint's stamps: a line in English, then `de.utf8=Ein Apfel`, `pt_BR.utf8=...`, ...
TRANSLATION = re.compile(r"([a-z]{2,3}(?:_[A-Z]{2})?(?:@\w+)?)\.utf8=(.*)")
CaptionLines = Literal["first", "all"]


@dataclass
class Entry:
    """An image file, and what is known of it."""

    path: Path
    name: str  # in messages: the path as the source has it
    key: str = ""
    caption: str | None = None
    captions: dict[str, str] | None = None  # by language
    label: str | None = None  # the name of its class
    split: str | None = None
    group: str | None = None  # images that belong on the same side of a random split


def find_entries(
    source: Path, outcome: Outcome, unlabelled: bool = False, caption_lines: CaptionLines = "first"
) -> list[Entry]:
    """All images of a folder or list, each with a key of its own; what cannot be used is counted.

    Args:
        unlabelled: ignores captions and classes.
        caption_lines: which lines of a .txt beside an image are its caption.

    Raises:
        UserError: if `source` is neither a folder nor a list, or holds no images.
    """
    if source.is_dir():
        entries = entries_of_folder(source, unlabelled, caption_lines, outcome)
    elif not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of images, a .csv or a .jsonl")
    elif source.suffix.lower() not in LISTS:
        raise UserError(f"expected a folder, a .csv or a .jsonl, got {source}")
    else:
        entries = entries_of_list(source, unlabelled, outcome)
    return with_keys(entries, source if source.is_dir() else source.parent, outcome)


# Folders


def entries_of_folder(
    folder: Path, unlabelled: bool, caption_lines: CaptionLines, outcome: Outcome
) -> list[Entry]:
    """Captions are used if there are .txt files beside images, otherwise folder names are classes."""
    images, texts = files_of_folder(folder, outcome)
    captioned = not unlabelled and any(path.with_suffix("") in texts for path in images)
    if captioned:
        for stem in sorted(texts.keys() - {path.with_suffix("") for path in images}):
            outcome.skip("captions without an image", str(texts[stem].relative_to(folder)))
    folders = {path: path.parent.relative_to(folder).parts for path in images}
    if wrapper := find_wrapper(folders.values(), 1 if captioned or unlabelled else 2):
        folders = {path: parts[wrapper:] for path, parts in folders.items()}
    level = find_split_level(folder, folders.values(), outcome)
    entries = []
    for path in with_progress(images, len(images), "reading captions") if captioned else images:
        entry, parts = Entry(path, str(path.relative_to(folder))), folders[path]
        if level is not None and len(parts) > level:
            entry.split = split_named(parts[level])
            parts = parts[:level] + parts[level + 1 :]
        if captioned:
            text = texts.get(path.with_suffix(""))
            if text is None:
                outcome.skip("no .txt beside the image", entry.name)
                continue
            try:
                read_caption_beside(entry, text, caption_lines, outcome)
            except BadSample as bad:
                outcome.skip(bad.reason, str(text.relative_to(folder)))
                continue
        elif not unlabelled:
            if not parts:
                outcome.skip("neither .txt nor class folder", entry.name)
                continue
            entry.label = unicodedata.normalize("NFC", printable(parts[0]))
        entries.append(entry)
    return entries


def files_of_folder(folder: Path, outcome: Outcome) -> tuple[list[Path], dict[Path, Path]]:
    """The images, and the .txt files by their path without the extension; hidden files are passed over."""
    found: dict[Path, list[Path]] = {}
    texts: dict[Path, Path] = {}
    not_read: list[Path] = []
    for place, names in with_progress(walk(folder, outcome), None, "searching folders"):
        for name in names:
            path = place / name
            suffix = path.suffix.lower()
            if suffix in FORMATS:
                found.setdefault(path.with_suffix(""), []).append(path)
            elif suffix == ".txt":
                texts.setdefault(path.with_suffix(""), path)
            elif suffix in NOT_READ:
                not_read.append(path)
    images = []
    for alike in found.values():
        first, *others = sorted(alike, key=lambda path: FORMATS.index(path.suffix.lower()))
        images.append(first)
        for path in others:
            outcome.skip(
                "another format of the same image", f"{path.relative_to(folder)} ({first.name} is used)"
            )
    not_read = [path for path in not_read if path.with_suffix("") not in found]
    for path in not_read:
        outcome.skip(f"{path.suffix.lower()} files", str(path.relative_to(folder)))
        texts.pop(path.with_suffix(""), None)  # counted with its image
    for suffix, count in Counter(path.suffix.lower() for path in not_read).items():
        outcome.remark(f"Skipped {count:,} {suffix}: {NOT_READ[suffix]}.")
    if not images:
        formats = ", ".join(suffix.removeprefix(".") for suffix in FORMATS)
        raise UserError(" ".join([f"{folder} holds no images ({formats}).", *outcome.remarks]))
    return sorted(images), texts


def walk(folder: Path, outcome: Outcome) -> Iterator[tuple[Path, list[str]]]:
    """Every folder in `folder` with the names of its files, sorted; hidden ones are passed over."""

    left = [str(folder)]  # a stack, as folders may lie deeper in one another than calls of a function
    while left:
        place, names, folders = left.pop(), [], []
        try:
            with os.scandir(place) as found:
                for entry in found:
                    if entry.name[0] != ".":
                        is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
                        (folders if is_folder else names).append(entry.name)
        except OSError as error:
            outcome.skip("unreadable folder", f"{place}: {error.strerror}")
        for path in sorted((os.path.join(place, name) for name in folders), reverse=True):
            if os.path.islink(path):
                outcome.skip("link to a folder, not followed", path)
            else:
                left.append(path)
        yield Path(place), sorted(names)


def find_wrapper(places: Iterable[Sequence[str]], deeper: int) -> int:
    """How many folders lie one in another, with nothing beside them, around folders of splits: 1 for
    photos/train/cat, photos/val/cat. Below them `deeper` levels of folders are needed. 0 if there are none.
    """
    places = list(places)
    shared = len(os.path.commonprefix(places))  # noqa: RUF071 (of tuples, not of strings)
    top = places[0][:shared]
    is_around = all(len(parts) >= shared + deeper and split_named(parts[shared]) for parts in places)
    return shared if is_around and not any(map(split_named, top)) else 0


def find_split_level(folder: Path, places: Iterable[Sequence[str]], outcome: Outcome) -> int | None:
    """The level of the folders that are splits: 0 for train/cat, val/cat, 1 for cat/train, cat/val, None if
    there are none.

    Raises:
        UserError: for folders named like splits beside others.
    """
    places = [parts for parts in places if parts]
    names = {parts[0] for parts in places}
    splits = {name for name in names if split_named(name)}
    if splits and splits == names:
        return 0
    if splits:
        found, others = ", ".join(sorted(splits)), printable(", ".join(sorted(names - splits)[:3]))
        if len({split_named(name) for name in splits}) > 1:
            raise UserError(
                f"{folder} holds folders of splits ({found}) beside others ({others}): move them, or list "
                "the images in a CSV with the columns path, class and split"
            )
        outcome.remark(
            f"The folder {found} is not taken for a split, as there are others beside it: {others}."
        )
    inner = [split_named(parts[1]) if len(parts) > 1 else None for parts in places]
    if len({*inner} - {None}) < 2:
        return None
    if strays := sorted(
        {"/".join(parts[:2]) for parts, split in zip(places, inner, strict=True) if not split}
    ):
        raise UserError(
            f"{folder} holds folders of splits in those of classes, but also images in "
            f"{printable(', '.join(strays[:3]))}: move them, or list the images in a CSV with the columns "
            "path, class and split"
        )
    return 1


def split_named(name: str) -> str | None:
    """`val`, `Validation`, `val2017` → `held-out`; None for a name that is not a split's."""
    name = re.sub(AFTER_SPLIT, "", re.sub(BEFORE_SPLIT, "", name.strip().lower()))
    return SPLIT_OF_NAME.get(name.replace("_", "-").replace(" ", "-"))


def read_caption_beside(entry: Entry, path: Path, lines: CaptionLines, outcome: Outcome) -> None:
    """Sets the caption, or captions by language, from the .txt beside an image. Raises BadSample."""
    text = read_text(Sample(entry.name, path, {"txt": read_file(path)}), "txt")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        outcome.note("the caption is empty, which stands for any image", entry.name)
    translations = [TRANSLATION.fullmatch(line) for line in found]
    if any(translations):
        by_language = {match[1]: match[2].strip() for match in translations if match and match[2].strip()}
        entry.captions = by_language if translations[0] else {"en": found[0], **by_language}
        if translations[0]:
            found = [by_language.get("en") or next(iter(by_language.values()), "")]
        outcome.note("captions in several languages", f"{entry.name} ({len(entry.captions)})")
    elif len(found) > 1 and lines == "first":
        outcome.note("only the first line of the .txt is used (--caption-lines all joins them)", entry.name)
    entry.caption = " ".join(found if lines == "all" and not entry.captions else found[:1])


# Lists


def entries_of_list(source: Path, unlabelled: bool, outcome: Outcome) -> list[Entry]:
    entries: list[Entry] = []
    ignored: dict[str, None] = {}
    for line, row in with_progress(read_rows(source), None, "reading the list"):
        where = f"{source.name}:{line}"
        if isinstance(row, dict):
            if unknown := row.keys() - {*COLUMNS, *ignored}:
                ignored |= dict.fromkeys(sorted(unknown))
                refuse_misspelt_columns(where, sorted(unknown), row.keys(), unlabelled)
            if not unlabelled and not (is_name(row.get("class")) or row.get("class") is None):
                raise UserError(f"{where}: expected text or a number as class, got {row['class']!r}")
        try:
            entries.append(entry_of_row(row, source.parent, unlabelled))
        except BadSample as bad:
            outcome.skip(bad.reason, where)
    if ignored:
        outcome.remark(f"Ignored columns: {printable(', '.join(ignored))}.")
    return entries


def refuse_misspelt_columns(
    where: str, unknown: Iterable[str], there: Collection[str], unlabelled: bool
) -> None:
    """Raises UserError for an unknown column that seems to be a known one, if that one is not there."""
    known = ("path", "split", "group") if unlabelled else COLUMNS
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        meant = OTHER_NAMES.get(name) or next(iter(near), None)
        if meant in known and meant not in there:
            raise UserError(
                f"{where}: unknown column {printable(name)}: did you mean {meant}? Rename or remove it"
            )


def is_name(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def entry_of_row(row: Any, folder: Path, unlabelled: bool) -> Entry:
    if not isinstance(row, dict):
        raise BadSample("line is not a JSON object", "")
    path, caption, captions = (row.get(name) for name in ("path", "caption", "captions"))
    label, split, group = (
        None if row.get(name) is None else str(row[name]).strip() or None
        for name in ("class", "split", "group")
    )
    label = label and unicodedata.normalize("NFC", label)
    if not isinstance(path, str) or not Path(path).name:
        raise BadSample("no path", "")
    if split is not None:
        split = split_named(split) or split.strip()
        if not re.fullmatch(r"\w[\w-]*", split):
            raise BadSample("the split is not a name of letters and digits", split)
    entry = Entry(folder / path, path, split=split, group=group)
    if unlabelled:
        check_text(path, group or "")
        return entry
    if not isinstance(caption, str | None):
        raise BadSample("caption is not text", "")
    if captions is not None and not (
        isinstance(captions, dict) and all(isinstance(text, str) for text in captions.values())
    ):
        raise BadSample("captions are not {language: caption}", "")
    if caption is None and not captions and label is None:
        raise BadSample("neither caption nor class", "")
    check_text(path, group or "", caption or "", label or "", *(captions or {}), *(captions or {}).values())
    entry.caption, entry.captions, entry.label = caption, captions, label
    return entry


def read_rows(source: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, row) of a CSV with a header, or of JSON lines (None if a line is not JSON).

    The names of columns are in lower case and without spaces around them.
    """
    try:
        with source.open(encoding="utf-8-sig", newline="") as lines:
            is_json = source.suffix.lower() == ".jsonl"
            rows = read_json(bounded(lines, source)) if is_json else read_csv(source, lines)
            for number, row in rows:
                if isinstance(row, dict):
                    row = {tidy(name): value for name, value in row.items()}
                    row.pop("", None)  # a comma at the end of the header
                yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{source} is not a CSV file: {error}") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None


def bounded(lines: TextIO, source: Path) -> Iterator[str]:
    """The lines of a list. Raises UserError for one that is none: it would be read into memory whole."""
    for number in itertools.count(1):
        if not (line := lines.readline(LONGEST_LINE + 1)):
            return
        if len(line) > LONGEST_LINE:
            raise UserError(f"{source}:{number}: expected a line of at most {LONGEST_LINE:,} characters")
        yield line


def tidy(column: str) -> str:
    return column.strip().lower()


def read_csv(source: Path, lines: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_LINE)  # the default is 131,072
    header = lines.readline(LONGEST_LINE)
    lines.seek(0)
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(bounded(lines, source), delimiter=delimiter, skipinitialspace=True)
    if "path" not in map(tidy, reader.fieldnames or []):
        found = ", ".join(reader.fieldnames or []) or "nothing"
        raise UserError(
            f"{source}: expected the columns path and caption or class (and maybe split, group), got {found}"
        )
    for row in reader:
        beyond = row.pop(None, [])
        if any(map(str.strip, beyond)):
            expected = len(reader.fieldnames)
            raise UserError(
                f"{source}:{reader.line_num}: expected {expected} fields, as in the header, got "
                f"{expected + len(beyond)}; the last is {printable(beyond[-1])!r}. Put double quotes around "
                f"a field that contains {delimiter!r}"
            )
        yield reader.line_num, row


def read_json(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):  # also numbers of thousands of digits, and deep nesting
                yield number, None


# Keys and files


def with_keys(entries: list[Entry], folder: Path, outcome: Outcome) -> list[Entry]:
    """Gives every entry its own key; the second and later mentions of a file are skipped."""
    folder = Path(os.path.abspath(folder))
    places = {Path(os.path.abspath(entry.path)): entry for entry in reversed(entries)}  # the first one wins
    outside = [path.parent for path in places if not path.is_relative_to(folder)]
    top = Path(os.path.commonpath(outside)) if outside else folder
    by_key: dict[str, Entry] = {}
    for path, entry in reversed(places.items()):
        key = key_of(path.relative_to(folder if path.is_relative_to(folder) else top))
        entry.key, number = key, 1
        while entry.key in by_key:
            number += 1
            entry.key = f"{key}-{number}"
        by_key[entry.key] = entry
    for entry in entries:
        if not entry.key:
            outcome.skip("listed before", entry.name)
    return list(by_key.values())


def key_of(path: Path) -> str:
    """A shard key made from a relative path: no extension, and only letters, digits, `_` and `-`."""
    if not path.name:
        return "image"
    return re.sub(r"[^\w-]+", "_", "/".join(path.with_suffix("").parts)).strip("_") or "image"


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file. Raises BadSample for anything else: a pipe would wait for ever, a device
    never end."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())  # of what was opened: its name may be another file's by now
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("not an ordinary file", str(path))
            if status.st_size > MOST_BYTES:
                raise BadSample(f"more than {MOST_BYTES:,} bytes", str(path))
            return file.read(MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadSample("missing or unreadable file", str(error)) from None
