"""Writing shards, whole or not at all, the same bytes for the same input; progress and a closing table."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table
from webdataset.writer import TarWriter

from mmvit.data.images import ImageFacts, measure_image
from mmvit.data.lock import sole_writer
from mmvit.errors import UserError, refuse_source
from mmvit.files import read_bounded, write_json
from mmvit.streams.address import Address, place
from mmvit.streams.index import beside, samples_promised, save_index, scan
from mmvit.streams.remote import read_file
from mmvit.streams.shard_lists import LIST
from mmvit.streams.shards import HELD_OUT, OLD_HELD_OUT, BadShard, Sample, read_shard

DERIVED = {"image_tokenizer", "share"}  # what encode and subset add to dataset.json
MOST_CLASSES = 40  # in the closing table


class WholeShard:
    """A shard that is written under a hidden name, and gets its own, with an index beside it, once it is
    whole. The same samples give the same bytes."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:  # a fixed time and owner, and no encoder: bytes in, the same bytes out
            self.tar = TarWriter(str(self.partial), encoder=False, mtime=0, user="", group="", compress=False)
        except OSError as error:
            raise self.failed(error) from None

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Adds a sample. Raises UserError when the disk is full or cannot be written."""
        try:
            self.tar.write({"__key__": key, **files})
        except OSError as error:
            raise self.failed(error) from None

    def finish(self) -> None:
        """Writes what is still in memory. Raises UserError when the disk is full."""
        try:
            if self.tar is not None:
                self.tar.close()
        except OSError as error:
            raise self.failed(error) from None
        finally:
            self.tar = None

    def publish(self) -> None:
        """Replaces what has the shard's name, and its index."""
        index = scan(self.partial)
        forget_index(self.path)
        self.partial.replace(self.path)
        index.shard = self.path
        with suppress(OSError):  # on a full disk: a shard without an index is as good
            save_index(index, beside(self.path))

    def discard(self) -> None:
        with suppress(UserError):  # what the last buffer holds does not fit either
            self.finish()
        self.partial.unlink(missing_ok=True)

    def failed(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror or error}")


class ShardWriter:
    """A context manager that writes one split as `folder/split-000000.tar`, ...

    If the block ends without an exception, the shards get their names and replace earlier ones of this split;
    otherwise nothing changes. The same samples give the same bytes.
    """

    def __init__(self, folder: Path, split: str, samples_per_shard: int = 500):
        if samples_per_shard < 1:
            raise UserError(f"samples per shard: expected 1 or more, got {samples_per_shard}")
        self.folder = Path(folder)
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self.keys: set[str] = set()
        self.shards: list[WholeShard] = []
        self.lock = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self.lock.enter_context(sole_writer(self.folder))
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Adds a sample: `files` maps an extension to its bytes.

        Raises:
            ValueError: for a key that was written before or has a dot in its basename (readers would cut it
                there), and for a sample without files.
            UserError: when the disk is full or cannot be written.
        """
        if not key or "." in key.rpartition("/")[2]:
            raise ValueError(f"sample key {key!r} is empty or has a dot")
        if key in self.keys:
            raise ValueError(f"sample key {key!r} is already in {self.split}")
        if not files:
            raise ValueError(f"sample {key!r} has no files")
        if self.num_samples % self.samples_per_shard == 0:
            self.finish()
            self.shards.append(WholeShard(self.folder / f"{self.split}-{len(self.shards):06d}.tar"))
        self.shards[-1].write(key, files)
        self.keys.add(key)
        self.num_samples += 1

    def finish(self) -> None:
        """Writes what is still in memory, so that several writers can fail before the first replaces shards.
        Raises UserError when the disk is full."""
        if self.shards:
            self.shards[-1].finish()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with self.lock:
            try:
                if kind is None:
                    self.finish()
                    self.publish()
            finally:
                for shard in self.shards:
                    shard.discard()

    def publish(self) -> None:
        for shard in self.shards:
            shard.publish()
        new = {shard.path for shard in self.shards}
        for split in (self.split, OLD_HELD_OUT) if self.split == HELD_OUT else (self.split,):
            for old in {*self.folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")} - new:
                remove_shard(old)


def remove_shard(shard: Path) -> None:
    shard.unlink()
    forget_index(shard)


def forget_index(shard: Path) -> None:
    """Removes what a shard's folder says about the samples in it, which may not be true any longer."""
    for stale in (beside(shard), shard.parent / LIST):
        stale.unlink(missing_ok=True)


class Outcome:
    """What a script has written and skipped, and why."""

    def __init__(self, expected: Mapping[str, int] | None = None) -> None:
        self.expected = dict(expected or {})
        self.written: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.of_class: dict[str, Counter[str]] = {}  # by split
        self.sizes: Counter[tuple[int, int]] = Counter()  # (height, width) of images
        self.modes: Counter[str] = Counter()
        self.originals: Counter[ImageFacts] = Counter()  # what images were before they were stored
        self.remarks: list[str] = []

    def wrote(self, split: str, image: bytes | None = None, label: str | None = None) -> None:
        """Counts a written sample, and for dataset.json its class and the size of its image."""
        self.written[split] += 1
        if label is not None:
            self.of_class.setdefault(split, Counter())[label] += 1
        if image is not None:
            facts = measure_image(image)
            self.sizes[facts.size] += 1
            self.modes[facts.mode] += 1

    def skip(self, reason: str, example: str, number: int = 1) -> None:
        """Counts skipped samples; the first three examples of each reason are shown."""
        self.skipped[reason] += number
        self.show(reason, example)

    def note(self, fact: str, example: str) -> None:
        """Counts a sample that is used in a way the user should know; shown like the skipped ones."""
        self.noted[fact] += 1
        self.show(fact, example)

    def show(self, reason: str, example: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(printable(example))

    def remark(self, text: str) -> None:
        """A sentence to print below the closing table."""
        self.remarks.append(text)

    def counted(self) -> dict[str, Any]:
        """The counts and examples as plain values."""
        return {
            **{name: dict(getattr(self, name)) for name in ("written", "skipped", "noted", "modes")},
            "examples": self.examples,
            "of_class": {split: dict(members) for split, members in self.of_class.items()},
            "sizes": [[*size, number] for size, number in self.sizes.items()],
            "originals": [[*facts, number] for facts, number in self.originals.items()],
        }

    @classmethod
    def of(cls, counted: Mapping[str, Any]) -> Self:
        """The inverse of `counted`."""
        outcome = cls()
        for name in ("written", "skipped", "noted", "modes"):
            getattr(outcome, name).update(counted[name])
        outcome.examples = dict(counted["examples"])
        outcome.of_class = {split: Counter(members) for split, members in counted["of_class"].items()}
        outcome.sizes = Counter({(height, width): number for height, width, number in counted["sizes"]})
        outcome.originals = Counter(
            {ImageFacts(tuple(size), *facts): number for size, *facts, number in counted["originals"]}
        )
        return outcome

    def add(self, other: "Outcome") -> None:
        """Adds what another part of the work has counted."""
        for name in ("written", "skipped", "noted", "sizes", "modes", "originals"):
            getattr(self, name).update(getattr(other, name))
        for split, members in other.of_class.items():
            self.of_class.setdefault(split, Counter()).update(members)
        for reason, examples in other.examples.items():
            for example in examples:
                self.show(reason, example)

    def reasons(self) -> str:
        """Why samples were skipped, for an error message."""
        return "; ".join(
            f"{count} x {reason}, for example {self.examples[reason][0]}"
            for reason, count in self.skipped.items()
        )

    def print(self, folder: Path) -> None:
        """Prints the closing tables: what was written and skipped, and the samples of each class."""
        table = Table(title=f"samples in {folder}", title_justify="left")
        table.add_column("")
        table.add_column("samples", justify="right")
        table.add_column("examples", overflow="fold")
        for split in in_order(self.written):
            count = self.written[split]
            lacking = f" of {self.expected[split]:,}" if self.expected.get(split, count) != count else ""
            table.add_row(f"written: {split}", f"{count:,}{lacking}", "")
        for fact, count in self.noted.most_common():
            table.add_row(f"of these: {fact}", f"{count:,}", ", ".join(self.examples[fact]))
        for reason, count in self.skipped.most_common():
            table.add_row(f"skipped: {reason}", f"{count:,}", ", ".join(self.examples[reason]))
        if not self.skipped:
            table.add_row("skipped", "0", "")
        console = Console(width=None if sys.stdout.isatty() else 110, markup=False)  # names may have brackets
        console.print(table)
        if self.of_class:
            console.print(self.class_table())
        for text in self.remarks:
            console.print(text, highlight=False)

    def class_table(self) -> Table:
        """Samples by class and split; of many classes the first."""
        splits = in_order(self.of_class)
        names = list(dict.fromkeys(name for members in self.of_class.values() for name in sorted(members)))
        table = Table(title=f"{len(names):,} classes", title_justify="left")
        table.add_column("class", overflow="fold")
        for split in splits:
            table.add_column(split, justify="right")
        for name in names[:MOST_CLASSES]:
            table.add_row(name, *(f"{self.of_class[split][name]:,}" for split in splits))
        if len(names) > MOST_CLASSES:
            table.add_row(f"and {len(names) - MOST_CLASSES:,} more", *("" for _ in splits))
        return table


def in_order(splits: Iterable[str]) -> list[str]:
    """Train, then held-out, then the others by name."""
    return sorted(splits, key=lambda split: (split != "train", split != HELD_OUT, split))


def printable(text: str) -> str:
    """Text that can be printed and stored as UTF-8: a file name may hold bytes that are not."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_samples(shards: Iterable[Path], outcome: Outcome) -> Iterator[Sample]:
    """The samples of `shards`, one after another. Those that are lost in a damaged shard are counted, as far
    as the index beside it says how many there were; otherwise the shard is."""
    for shard in shards:
        number = 0
        try:
            for sample in read_shard(shard):
                number += 1
                yield sample
        except BadShard as error:
            if (promised := samples_promised(shard)) is None:
                outcome.skip("damaged shard, unknown losses", str(error))
            else:
                outcome.skip("lost in a damaged shard", str(error), max(0, promised - number))


def write_dataset_card(folder: Path, outcome: Outcome, **facts: Any) -> None:
    """Writes `dataset.json` beside the shards: samples per split and class, image sizes, and facts such as
    classes, source and licence."""
    counts: dict[str, Any] = {
        "samples": {split: outcome.written[split] for split in in_order(outcome.written)}
    }
    if outcome.of_class:
        counts["samples_per_class"] = {
            split: dict(sorted(outcome.of_class[split].items())) for split in in_order(outcome.of_class)
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
    """Raises UserError if `folder` holds shards made from another source, which would be lost."""
    found = read_dataset_card(folder).get("source")
    if found is None or source is None or found == source:
        return
    if Path(found).exists() and Path(found).resolve() == Path(source).resolve():
        return
    raise UserError(
        f"{folder} holds shards made from {found}; those of {source} would replace them: name another "
        "folder, or remove this one"
    )


def refuse_other_options(folder: Path, before: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises UserError if an option of the shards in `folder` was another one `before`."""
    changed = [
        f"--{name.replace('_', '-')} was {said(before[name])}, is {said(value)}"
        for name, value in options.items()
        if before.get(name, value) != value
    ]
    if changed:
        raise UserError(
            f"{folder} holds shards made with other options ({'; '.join(changed)}): remove that folder, or "
            "name another"
        )


def said(value: Any) -> str:
    return "not given" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def inherited_facts(source: Path, out: Path, adds: str = "") -> dict[str, Any]:
    """What the dataset.json of shards also says about those made from them in `out`: everything but the
    counts and options.

    Args:
        adds: the fact of `DERIVED` that the caller adds.

    Raises:
        UserError: if `out` is the source itself, or holds shards from another one, or made from it otherwise.
    """
    refuse_source(out, source)
    own = ("samples", "samples_per_class", "options")
    facts = {name: fact for name, fact in read_dataset_card(source).items() if name not in own}
    refuse_other_data(out, facts.get("source"))
    before = read_dataset_card(out)
    if before and DERIVED & before.keys() != DERIVED & {*facts, adds} and [*out.glob("*.tar")]:
        raise UserError(
            f"{out} holds shards that another command made from {facts.get('source', source)}: name another "
            "folder, or remove this one"
        )
    return facts


def read_dataset_card(folder: Path | Address) -> dict[str, Any]:
    """The `dataset.json` of a folder of shards; {} if there is none.

    Raises:
        UserError: if it is not JSON, or what this library reads of it has another form.
    """
    path = place(folder) / "dataset.json"
    is_remote = isinstance(path, Address)
    try:
        data = read_file(path) if is_remote else read_bounded(path) if path.is_file() else None
        if data is None:
            return {}
        card = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); prepare the data again or delete it") from None
    if not isinstance(card, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {card!r:.60}; prepare the data again or delete it"
        )
    for name, (expected, fits) in CARD_FACTS.items():
        if card.get(name) is not None and not fits(card[name]):
            raise UserError(
                f"{path}: expected {expected} as {name}, got {card[name]!r:.60}; prepare the data again or "
                "correct it"
            )
    return card


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_count(side) and side for side in value)


def is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def counts_samples(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_count, value.values()))


# What is read of a dataset.json: in words, and the check of its form.
CARD_FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "classes": ("a list of names", is_list_of_names),
    "samples": ("{split: number of samples}", counts_samples),
    "image_size": ("[height, width]", is_size),
    "image_size_median": ("[height, width]", is_size),
    "image_tokenizer": ("an object", lambda value: isinstance(value, dict)),
    "options": ("an object", lambda value: isinstance(value, dict)),
    "source": ("text", lambda value: isinstance(value, str)),
}
