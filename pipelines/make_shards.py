"""Makes shards of your own images, each with a caption, a class, or both; or neither, with --unlabelled.

    python pipelines/make_shards.py photos/ data/photos        # photos/a.jpg with photos/a.txt beside it
    python pipelines/make_shards.py pets/ data/pets            # class folders: pets/cat/1.jpg, pets/dog/2.jpg
    python pipelines/make_shards.py list.csv data/list         # columns: path, caption and/or class
    python pipelines/make_shards.py list.jsonl data/list --max-side 512      # the same as JSON lines
    python pipelines/make_shards.py scans/ data/scans --unlabelled           # pictures alone, to pre-train on

A folder's captions are used where there are .txt files beside the images; otherwise the folder names are
classes. Paths in a list are relative to it; `captions` in JSON lines may hold {language: caption}. Images
keep their bytes, unless they are larger than --max-side or not JPEG, PNG or WebP. A share of them, chosen by
a hash of the key, is held out as split `held-out`; of two or more, always at least one.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmvit.data.images import MAX_PIXELS, open_image
from mmvit.data.shards import BadSample
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    refuse_other_data,
    with_progress,
    write_dataset_card,
)
from mmvit.errors import UserError, refuse_source, run_script
from mmvit.hub import shorten

STORED_AS_IS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
CONVERTED = (".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Entry:
    """An image file, and what is known of it."""

    path: Path
    key: str
    caption: str | None = None
    captions: dict[str, str] | None = None  # by language
    label: str | None = None  # the name of its class


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder, a .csv or a .jsonl")
    parser.add_argument("out", type=Path, help="folder to write the shards to")
    parser.add_argument(
        "--held-out-share", type=float, default=0.05, help="share of the samples in the split held-out"
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="pictures alone, without captions and classes"
    )
    parser.add_argument("--max-side", type=int, help="scale images down so that no side is longer, in pixels")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    arguments = parser.parse_args()
    if not 0 <= arguments.held_out_share < 1:
        raise UserError(f"--held-out-share {arguments.held_out_share} is not in [0, 1)")
    if arguments.max_side is not None and arguments.max_side < 1:
        raise UserError(f"--max-side {arguments.max_side} is not a size in pixels")

    refuse_source(arguments.out, arguments.source)

    outcome = Outcome()
    entries = drop_duplicates(find_entries(arguments.source, arguments.unlabelled, outcome), outcome)
    if not entries:
        raise UserError(f"nothing usable in {arguments.source}: {describe_skipped(outcome)}")
    write(entries, arguments, outcome)
    outcome.print(arguments.out)
    if arguments.held_out_share and not outcome.written.get("held-out"):
        print("no image is held out: there is one alone; a recipe's data.held_out needs some")


def find_entries(source: Path, unlabelled: bool, outcome: Outcome) -> list[Entry]:
    """All entries of a folder or list. Raises UserError if `source` is neither."""
    if source.is_dir():
        images = images_of_folder(source)
        if unlabelled:
            return [Entry(path, key_of(path.relative_to(source))) for path in images]
        return entries_of_folder(source, images, outcome)
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of images, a .csv or a .jsonl")
    if source.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{source} is neither a folder nor a .csv nor a .jsonl")
    try:
        return entries_of_list(source, unlabelled, outcome)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def images_of_folder(folder: Path) -> list[Path]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*STORED_AS_IS, *CONVERTED))
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join([*STORED_AS_IS, *CONVERTED])})")
    return images


def entries_of_folder(folder: Path, images: list[Path], outcome: Outcome) -> list[Entry]:
    captioned = any(path.with_suffix(".txt").is_file() for path in images)
    entries = []
    for path in images:
        name = str(path.relative_to(folder))
        entry = Entry(path, key_of(path.relative_to(folder)))
        text = path.with_suffix(".txt")
        if captioned and not text.is_file():
            outcome.skip("no .txt beside the image", name)
            continue
        if captioned:
            try:
                entry.caption = text.read_bytes().decode("utf-8-sig").strip()
                if not entry.caption:
                    outcome.note("the caption is empty, which stands for any picture", name)
            except UnicodeDecodeError:
                outcome.skip("caption is not UTF-8", str(text.relative_to(folder)))
                continue
        elif path.parent == folder:
            outcome.skip("neither .txt nor class folder", name)
            continue
        else:
            entry.label = path.parent.relative_to(folder).parts[0]
        entries.append(entry)
    return entries


def entries_of_list(source: Path, unlabelled: bool, outcome: Outcome) -> list[Entry]:
    entries = []
    for line, row in read_rows(source):
        where = f"{source.name}:{line}"
        if not isinstance(row, dict):
            outcome.skip("line is not a JSON object", where)
            continue
        path, caption, captions, label = (row.get(name) for name in ("path", "caption", "captions", "class"))
        if not isinstance(path, str) or not path:
            outcome.skip("no path", where)
        elif unlabelled:
            entries.append(Entry(source.parent / path, key_of(Path(path))))
        elif not isinstance(caption, str | None):
            outcome.skip("caption is not text", where)
        elif caption is None and not captions and label in (None, ""):
            outcome.skip("neither caption nor class", where)
        elif captions is not None and not isinstance(captions, dict):
            outcome.skip("captions are not {language: caption}", where)
        else:
            label = None if label in (None, "") else str(label)
            entries.append(Entry(source.parent / path, key_of(Path(path)), caption, captions, label))
    return entries


def read_rows(source: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, row) of a CSV with a header, or of JSON lines (None if a line is not JSON)."""
    with source.open(encoding="utf-8-sig", newline="") as lines:
        if source.suffix == ".csv":
            reader = csv.DictReader(lines)
            if "path" not in (reader.fieldnames or []):
                found = ", ".join(reader.fieldnames or []) or "nothing"
                raise UserError(f"{source} has no column `path`, but {found}; expected path, caption, class")
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError:
                    yield number, None


def key_of(path: Path) -> str:
    """A shard key of a relative path: no extension, and only letters, digits, `_` and `-`."""
    return re.sub(r"[^\w-]+", "_", "/".join(path.with_suffix("").parts)).strip("_") or "_"


def drop_duplicates(entries: list[Entry], outcome: Outcome) -> list[Entry]:
    """Keeps the first entry of each key."""
    by_key: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in by_key:
            outcome.skip("duplicate key", f"{entry.path} ({entry.key})")
        else:
            by_key[entry.key] = entry
    return list(by_key.values())


def name_classes(entries: list[Entry], source: Path) -> list[str]:
    """The names of the classes, sorted; by their number if all are different numbers.

    Raises:
        UserError: for a list whose numbers have a gap, and for one class alone where there are no captions.
    """
    names = {entry.label for entry in entries if entry.label is not None}
    captioned = any(entry.caption is not None or entry.captions for entry in entries)
    if len(names) == 1 and not captioned:
        raise UserError(
            f"{source} has one class alone, {min(names)!r}: a classifier needs two or more; give each its "
            "own folder or name, or leave it out (--unlabelled)"
        )
    numbers = {int(name) for name in names if name.isdecimal()}
    if len(numbers) < len(names) or not names:
        return sorted(names)
    if max(numbers) >= len(numbers) and not source.is_dir():  # folders may well be called 1999 and 2020
        missing = next(number for number in itertools.count() if number not in numbers)
        raise UserError(
            f"{source} numbers its classes up to {max(numbers)}, but class {missing} has no image: number "
            "them from 0 without gaps, or give names"
        )
    return sorted(names, key=int)


def write(entries: list[Entry], arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Writes both splits in an order mixed by the hash of the key, and `dataset.json`."""
    out, classes = arguments.out, name_classes(entries, arguments.source)
    refuse_other_data(out, str(arguments.source))
    numbers = {name: number for number, name in enumerate(classes)}
    hashes = {entry.key: hashlib.sha256(entry.key.encode()).digest() for entry in entries}
    entries = sorted(entries, key=lambda entry: hashes[entry.key])
    files_of = {entry.key: partial(image_files, entry.path, arguments.max_side) for entry in entries}
    chosen = choose_held_out(hashes, arguments.held_out_share, lambda key: is_usable(files_of[key]))
    with (
        ShardWriter(out, "train", arguments.samples_per_shard) as train,
        ShardWriter(out, "held-out", arguments.samples_per_shard) as held_out,
    ):
        used: set[str] = set()  # classes
        for entry in with_progress(entries, len(entries), "writing shards"):
            try:
                image = files_of[entry.key]()
            except BadSample as bad:
                outcome.skip(bad.reason, str(entry.path))
                continue
            writer = held_out if entry.key in chosen else train
            writer.write(entry.key, {**image, **text_files(entry, numbers)})
            outcome.wrote(writer.split, *image.values(), label=entry.label)
            used |= {entry.label} - {None}
        if not outcome.written:  # nothing has been replaced yet
            raise UserError(f"no image of {arguments.source} could be used: {describe_skipped(outcome)}")
        if empty := [name for name in classes if name not in used]:
            raise UserError(
                f"no image of the class{'es' if len(empty) > 1 else ''} {shorten(empty)} could be used: "
                f"{describe_skipped(outcome)}; mend them, or leave these classes out"
            )
    facts = {"classes": classes} if classes else {}
    write_dataset_card(out, outcome, source=str(arguments.source), **facts)


def choose_held_out(hashes: dict[str, bytes], share: float, is_usable: Callable[[str], bool]) -> set[str]:
    """The keys to hold out, by a rule of the key alone; where it would choose none or all of several, or none
    that is usable, the next one is held out or kept."""
    places = {key: int.from_bytes(hashlib.sha256(hashes[key]).digest()[:8]) / 2**64 for key in hashes}
    ranked = sorted(places, key=places.get)
    number = sum(place < share for place in places.values())
    if share > 0 and len(ranked) > 1:
        number = min(max(number, 1), len(ranked) - 1)
        while number < len(ranked) - 1 and not any(map(is_usable, ranked[:number])):
            number += 1
    return set(ranked[:number])


def is_usable(read: Callable[[], dict[str, bytes]]) -> bool:
    try:
        read()
    except BadSample:
        return False
    return True


def image_files(path: Path, max_side: int | None) -> dict[str, bytes]:
    """The image under its extension; decoded once to see that it can be. Raises BadSample."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample("missing or unreadable file", str(error)) from None
    image = open_image(data, max_pixels=MAX_PIXELS)
    extension = STORED_AS_IS.get(path.suffix.lower())
    if extension and (max_side is None or max(image.size) <= max_side):
        return {extension: data}
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    photo = extension in ("jpg", "webp")
    image.save(buffer, "JPEG" if photo else "PNG", **({"quality": 95} if photo else {}))
    return {"jpg" if photo else "png": buffer.getvalue()}


def text_files(entry: Entry, numbers: dict[str, int]) -> dict[str, bytes]:
    files = {}
    if entry.caption is not None:
        files["txt"] = entry.caption.encode()
    if entry.captions:
        files["json"] = json.dumps({"captions": entry.captions}, ensure_ascii=False, sort_keys=True).encode()
    if entry.label is not None:
        files["cls"] = str(numbers[entry.label]).encode()
    return files


def describe_skipped(outcome: Outcome) -> str:
    reasons = (
        f"{count} x {reason}, for example {outcome.examples[reason][0]}"
        for reason, count in Counter(outcome.skipped).items()
    )
    return "; ".join(reasons) or "it is empty"


if __name__ == "__main__":
    run_script(main)
