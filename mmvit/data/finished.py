"""Shards made one by one, each from its own source alone, so that an interrupted command keeps those that are
finished, and goes on."""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmvit.data.writing import Outcome, WholeShard
from mmvit.errors import UserError
from mmvit.files import write_json
from mmvit.streams.address import Address
from mmvit.streams.remote import facts_of

STAMPS = ("st_size", "st_mtime_ns", "st_ctime_ns")


class FinishedShards:
    """The finished shards of a folder. Each has a record: of what it was made and how, its checksum, and what
    was counted.

    Args:
        records: the folder of the records, in `folder`; its name tells commands apart.
        how: all that shards depend on beside their source.
        card: what dataset.json will say of that.
    """

    def __init__(self, folder: Path, records: str, how: dict[str, Any], card: dict[str, Any] | None = None):
        self.folder, self.records, self.card = folder, folder / records, card or {}
        self.how = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()

    def find(self, name: str, fits: Callable[[Any], bool]) -> Outcome | None:
        """What was counted when the shard `name` was made; None if it is to be made again.

        Args:
            fits: whether a recorded source is still the shard's.
        """
        try:
            record = json.loads(self.record(name).read_text(encoding="utf-8"))
            if record["how"] != self.how or not fits(record["source"]):
                return None
            return Outcome.of(record["counted"]) if is_file(self.folder / name, record["shard"]) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None  # a record that is damaged is none

    def add(self, shard: WholeShard, source: Any, outcome: Outcome) -> None:
        """Gives a shard its name, and keeps what was counted when it was made of `source`."""
        shard.finish()
        shard.publish()
        made = {"how": self.how, "card": self.card, "source": source, "shard": describe_file(shard.path)}
        self.records.mkdir(exist_ok=True)
        write_json({**made, "counted": outcome.counted()}, self.record(shard.path.name))

    def card_before(self) -> dict[str, Any]:
        """What dataset.json would have said of the shards that are finished; {} if there are none."""
        for record in sorted(self.records.glob("*.json")):
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                return dict(json.loads(record.read_text(encoding="utf-8"))["card"])
        return {}

    def forget_all_but(self, names: Collection[str]) -> None:
        """Removes records of other shards."""
        for record in self.records.glob("*.json"):
            if record.stem not in names:
                record.unlink()

    def record(self, name: str) -> Path:
        return self.records / f"{name}.json"


@contextmanager
def kept_when_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with a line on what that means."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        said = "interrupted: finished shards are kept, and the same command goes on from there"
        print(said, file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)


def refuse_lacking(paths: Iterable[Path]) -> None:
    """Raises UserError for the first of `paths` that is not there, though a process has written it."""
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} is not there: see that all processes write to the same disk, and start the same "
                "command again"
            )


def describe_file(path: Path | Address) -> dict[str, Any]:
    """A file's size, times and checksum."""
    before = stamps_of(path)
    if isinstance(path, Address):  # its version changes with its content
        return {"stamps": before, "sha256": None}
    with open(path, "rb") as file:
        return {"stamps": before, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def stamps_of(path: Path | Address) -> list[int | str]:
    """What changes when a file does, but also when it is only copied or given other rights."""
    if isinstance(path, Address):
        facts = facts_of(path)
        return [facts.size, facts.version]
    found = path.stat()
    return [getattr(found, name) for name in STAMPS]


def is_file(path: Path | Address, described: dict[str, Any]) -> bool:
    """Whether `path` holds what `describe_file` saw; it is read only where the size is the same but the times
    are not."""
    stamps = stamps_of(path)
    if stamps == described["stamps"]:
        return True
    if stamps[0] != described["stamps"][0] or isinstance(path, Address):
        return False
    return describe_file(path)["sha256"] == described["sha256"]
