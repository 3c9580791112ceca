"""Writing shards: whole or not at all, the same bytes for the same input, with progress and a table."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from webdataset.writer import TarWriter

from mmvit.data.images import measure_image
from mmvit.data.shards import HELD_OUT, OLD_HELD_OUT, BadShard, Sample, read_shard
from mmvit.errors import UserError
from mmvit.hub import write_json

Item = TypeVar("Item")


class ShardWriter:
    """Writes one split as `folder/split-000000.tar`, ... A context manager.

    The shards appear under their names when the block ends without an exception, in place of earlier ones of
    this split; otherwise nothing changes. The same samples give the same bytes.
    """

    def __init__(self, folder: Path, split: str, samples_per_shard: int = 500):
        if samples_per_shard < 1:
            raise UserError(f"{samples_per_shard} samples per shard make no shards; give 1 or more")
        self.folder = Path(folder)
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self.keys: set[str] = set()
        self.partial: list[Path] = []
        self.tar: TarWriter | None = None

    def __enter__(self) -> "ShardWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Adds a sample: `files` maps an extension to its bytes.

        Raises:
            ValueError: for a key that was written before, has a dot in its basename (readers would cut it
                there), or no files.
        """
        if not key or "." in key.rpartition("/")[2]:
            raise ValueError(f"sample key {key!r} is empty or has a dot")
        if key in self.keys:
            raise ValueError(f"sample key {key!r} is already in {self.split}")
        if not files:
            raise ValueError(f"sample {key!r} has no files")
        if self.num_samples % self.samples_per_shard == 0:
            self.next_shard()
        self.tar.write({"__key__": key, **files})
        self.keys.add(key)
        self.num_samples += 1

    def next_shard(self) -> None:
        if self.tar is not None:
            self.tar.close()
        path = self.folder / f".{self.split}-{len(self.partial):06d}.tar.partial"
        self.partial.append(path)
        # A fixed time and owner, and no encoder: bytes in, the same bytes out.
        self.tar = TarWriter(str(path), encoder=False, mtime=0, user="", group="", compress=False)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.tar is not None:
            self.tar.close()
        if kind is not None:
            for path in self.partial:
                path.unlink(missing_ok=True)
            return
        for name in (self.split, OLD_HELD_OUT) if self.split == HELD_OUT else (self.split,):
            for old in self.folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
                old.unlink()
        for path in self.partial:
            path.rename(path.with_name(path.name.removeprefix(".").removesuffix(".partial")))


class Outcome:
    """What a preparing script has written and skipped, and why."""

    def __init__(self, expected: Mapping[str, int] | None = None) -> None:
        self.expected = dict(expected or {})
        self.written: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.of_class: dict[str, Counter[str]] = {}  # by split
        self.sizes: Counter[tuple[int, int]] = Counter()  # (height, width) of images
        self.modes: Counter[str] = Counter()

    def wrote(self, split: str, image: bytes | None = None, label: str | None = None) -> None:
        """Counts a written sample, and for dataset.json its class and the size of its image."""
        self.written[split] += 1
        if label is not None:
            self.of_class.setdefault(split, Counter())[label] += 1
        if image is not None:
            facts = measure_image(image)
            self.sizes[facts.size] += 1
            self.modes[facts.mode] += 1

    def skip(self, reason: str, example: str) -> None:
        """Counts a skipped sample; the first three examples of a reason are shown."""
        self.skipped[reason] += 1
        self.show(reason, example)

    def note(self, fact: str, example: str) -> None:
        """Counts a sample that is used, but of which one should know; shown like the skipped ones."""
        self.noted[fact] += 1
        self.show(fact, example)

    def show(self, reason: str, example: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(example)

    def print(self, folder: Path) -> None:
        """Prints the closing table."""
        table = Table(title=f"samples in {folder}", title_justify="left")
        table.add_column("")
        table.add_column("samples", justify="right")
        table.add_column("examples", overflow="fold")
        for split, count in self.written.items():
            lacking = f" of {self.expected[split]:,}" if self.expected.get(split, count) != count else ""
            table.add_row(f"written: {split}", f"{count:,}{lacking}", "")
        for fact, count in self.noted.most_common():
            table.add_row(f"of these: {fact}", f"{count:,}", ", ".join(self.examples[fact]))
        for reason, count in self.skipped.most_common():
            table.add_row(f"skipped: {reason}", f"{count:,}", ", ".join(self.examples[reason]))
        if not self.skipped:
            table.add_row("skipped", "0", "")
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def with_progress(items: Iterable[Item], total: int | None, what: str) -> Iterator[Item]:
    """Yields `items` and shows how far it is: a bar on a terminal, a line every ten seconds elsewhere.

    `total` is their number, None if unknown.
    """
    if sys.stdout.isatty():
        yield from track(items, description=what, total=total)
        return
    start = shown = time.monotonic()
    number = 0
    for item in items:
        yield item
        number += 1
        if time.monotonic() - shown >= 10:
            shown = time.monotonic()
            print(progress_line(what, number, total, shown - start), flush=True)
    print(progress_line(what, number, total, time.monotonic() - start), flush=True)


def progress_line(what: str, number: int, total: int | None, seconds: float) -> str:
    of_total = f" of {total:,}" if total is not None else ""
    return f"{what}: {number:,}{of_total}, {number / max(seconds, 1e-9):,.0f}/s"


def read_samples(shards: Iterable[Path], outcome: Outcome) -> Iterator[Sample]:
    """The samples of `shards`, one after the other; a shard that breaks off is counted as skipped."""
    for shard in shards:
        try:
            yield from read_shard(shard)
        except BadShard as error:
            outcome.skip("truncated or damaged shard", str(error))


def write_dataset_card(folder: Path, outcome: Outcome, **facts: Any) -> None:
    """Writes `dataset.json` beside the shards: samples per split and class, image sizes, and facts such as
    classes, source and licence."""
    counts: dict[str, Any] = {"samples": dict(outcome.written)}
    if outcome.of_class:
        counts["samples_per_class"] = {
            split: dict(sorted(members.items())) for split, members in outcome.of_class.items()
        }
    card = counts | facts | describe_sizes(outcome)
    write_json(card, Path(folder) / "dataset.json")


def describe_sizes(outcome: Outcome) -> dict[str, Any]:
    """`image_size` [height, width] where all images have one, else its median, minimum and maximum in each
    direction; and how many images have which of Pillow's modes. {} without images."""
    if not outcome.sizes:
        return {}
    modes = {"image_modes": dict(outcome.modes.most_common())}
    if len(outcome.sizes) == 1:
        return {"image_size": list(next(iter(outcome.sizes))), **modes}
    sizes = np.array(list(outcome.sizes.elements()))
    return {
        "image_size_median": np.median(sizes, axis=0).astype(int).tolist(),
        "image_size_min": sizes.min(axis=0).tolist(),
        "image_size_max": sizes.max(axis=0).tolist(),
        **modes,
    }


def refuse_other_data(folder: Path, source: str | None) -> None:
    """Raises UserError where `folder` holds shards whose dataset.json tells of another source: they would be
    lost."""
    found = read_dataset_card(folder).get("source")
    if found is None or source is None or found == source:
        return
    if Path(found).exists() and Path(found).resolve() == Path(source).resolve():
        return
    raise UserError(
        f"{folder} holds data of {found}, which those of {source} would replace: name another folder, or "
        "remove this one"
    )


def inherited_facts(folder: Path) -> dict[str, Any]:
    """What dataset.json of a source says of shards made from it, too: all but the counts."""
    counts = ("samples", "samples_per_class")
    return {name: fact for name, fact in read_dataset_card(folder).items() if name not in counts}


def read_dataset_card(folder: Path) -> dict[str, Any]:
    """Reads `dataset.json` of a folder of shards; {} if there is none."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); prepare the data again or delete it") from None
