"""Images of your own packed into shards, each a function of its entries alone; all are published together,
once the last one is finished."""

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from operator import eq
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mmvit.data.finished import FinishedShards
from mmvit.data.images import MAX_PIXELS, Fit, ImageFacts, fit_image, formats_of, measure_image, open_image
from mmvit.data.sources import STORED_AS_IS, Entry, read_file
from mmvit.data.writing import Outcome, WholeShard, forget_index, remove_shard
from mmvit.errors import UserError
from mmvit.streams.index import beside
from mmvit.streams.shards import BadSample

STAGING = ".packed"  # a folder within that of the shards, for those that are finished before all are


class Shape(NamedTuple):
    """What is done to the shape of images before they are stored."""

    size: tuple[int, int] | None
    fit: Fit | None
    pad_colour: str
    max_side: int | None

    def apply(self, image: Image.Image) -> Image.Image:
        if self.max_side is not None:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
        if self.fit is None:
            return image
        side = max(image.size) if self.fit == "pad" else min(image.size)
        size = self.size or (side, side)
        if size[0] * size[1] > MAX_PIXELS:
            raise BadSample("too long to be padded", f"a side of {side:,} has over {MAX_PIXELS:,} pixels")
        return fit_image(image, size, self.fit, self.pad_colour)

    def changes(self, image: Image.Image) -> bool:
        fits = not self.fit or image.size == (self.size[::-1] if self.size else (image.width, image.width))
        return not fits or (self.max_side is not None and max(image.size) > self.max_side)


def image_files(path: Path, shape: Shape) -> tuple[dict[str, bytes], ImageFacts]:
    """The image to store under its extension, and what the file holds. Raises BadSample."""
    data, formats = read_file(path), formats_of(path)
    image = open_image(data, formats=formats)
    facts = measure_image(data, formats)
    extension = STORED_AS_IS.get(path.suffix.lower())
    if extension and not shape.changes(image):
        return {extension: data}, facts
    buffer = io.BytesIO()
    is_photo = extension in ("jpg", "webp")
    options = {"quality": 95} if is_photo else {}
    try:
        shape.apply(image).save(buffer, "JPEG" if is_photo else "PNG", **options)
    except (ValueError, OSError) as error:  # for one, a JPEG has at most 65,500 pixels a side
        raise BadSample("image that cannot be stored", str(error)) from None
    return {"jpg" if is_photo else "png": buffer.getvalue()}, facts


def text_files(entry: Entry, numbers: Mapping[str, int]) -> dict[str, bytes]:
    files = {}
    if entry.caption is not None:
        files["txt"] = entry.caption.encode()
    if entry.captions:
        files["json"] = json.dumps({"captions": entry.captions}, ensure_ascii=False, sort_keys=True).encode()
    if entry.label is not None:
        files["cls"] = str(numbers[entry.label]).encode()
    return files


class Plan(NamedTuple):
    """The entries of a shard."""

    name: str
    entries: list[Entry]


def plan_shards(entries: Iterable[Entry], samples_per_shard: int) -> list[Plan]:
    """The shards of all splits: of each split's entries so many, in their order."""
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: expected 1 or more, got {samples_per_shard}")
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        members.setdefault(entry.split, []).append(entry)
    return [
        Plan(f"{split}-{number:06d}.tar", own[number * samples_per_shard :][:samples_per_shard])
        for split, own in members.items()
        for number in range(-(-len(own) // samples_per_shard))
    ]


@dataclass(frozen=True)
class Pack:
    """Writes a planned shard, unless it is finished already, and returns what was counted.

    Args:
        numbers: of the classes, by name.
    """

    finished: FinishedShards
    shape: Shape
    numbers: Mapping[str, int]

    def __call__(self, plan: Plan) -> Outcome:
        source = self.describe(plan.entries)
        if outcome := self.finished.find(plan.name, partial(eq, source)):
            return outcome
        outcome, shard = Outcome(), WholeShard(self.finished.folder / plan.name)
        try:
            for entry in plan.entries:
                try:
                    image, facts = image_files(entry.path, self.shape)
                except BadSample as bad:
                    outcome.skip(bad.reason, entry.name)
                    continue
                shard.write(entry.key, {**image, **text_files(entry, self.numbers)})
                outcome.wrote(entry.split, *image.values(), label=entry.label)
                outcome.originals[facts] += 1
            self.finished.add(shard, source, outcome)
        finally:
            shard.discard()
        return outcome

    def describe(self, entries: Iterable[Entry]) -> str:
        """A digest of all that a shard is made of: of an image its size and when it was changed."""
        digest = hashlib.sha256(json.dumps([*self.shape, dict(self.numbers)]).encode())
        for entry in entries:
            own = [str(value) for value in asdict(entry).values()]
            digest.update(json.dumps([own, file_stamps(entry.path)]).encode())
        return digest.hexdigest()


def file_stamps(path: Path) -> list[int]:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return []
    return [found.st_size, found.st_mtime_ns]


def publish(staged: Path, folder: Path, names: Collection[str], splits: Iterable[str]) -> None:
    """Moves the shards of these names from `staged` to `folder`, in place of all shards there of `splits`."""
    for split in splits:
        for old in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
            if old.name not in names:
                remove_shard(old)
    (folder / "dataset.json").unlink(missing_ok=True)  # which is of the earlier ones
    for name in names:
        new, place = staged / name, folder / name
        forget_index(place)
        new.replace(place)
        if beside(new).exists():
            beside(new).replace(beside(place))
