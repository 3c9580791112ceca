"""Images of shards, decoded ahead by workers: the pixels that an image tokenizer encodes, with augmented
copies."""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import read_caption, read_captions
from mmvit.data.finished import describe_file, stamps_of
from mmvit.data.images import decode_image, has_shape, measure_image
from mmvit.data.samples import IMAGE_EXTENSIONS, image_bytes
from mmvit.data.writing import Outcome, read_samples
from mmvit.errors import UserError
from mmvit.streams.shards import BadSample, Sample, split_of

FIRST_JOINED = "\u0590"  # Hebrew, Arabic, Indic, Thai, Chinese, ...: behind Latin, Greek and Cyrillic
AT_ONCE = 16  # samples that a worker is given


@dataclass
class Part:
    """Consecutive samples of a shard. The last part has none, but says what the shard, the `source`, was."""

    shard: Path
    samples: list[Sample] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)  # of each sample, uint8
    outcome: Outcome = field(default_factory=Outcome)
    num_read: int = 0
    stamps: list[int] | None = None  # of the last part: the shard's before it was read
    source: dict[str, Any] | None = None


def split_for(shard: Path) -> str:
    """The split of a shard; train for those that have nothing but a number, as img2dataset names them."""
    split = split_of(shard)
    return "train" if split.isdecimal() else split


def read_parts(shards: Iterable[Path]) -> Iterator[Part]:
    """The samples of `shards`; samples lost in damaged shards are counted."""
    for shard in shards:
        outcome, stamps = Outcome(), stamps_of(shard)
        samples = read_samples([shard], outcome)
        while some := list(itertools.islice(samples, AT_ONCE)):
            yield Part(shard, some)
        yield Part(shard, outcome=outcome, stamps=stamps)


@dataclass(frozen=True)
class Copies:
    """How many augmented copies an image gets, how far each is shifted (pixels, each way), and which
    beginnings of words in a caption forbid flipping every second one. Without such words none is flipped."""

    number: int = 0
    shift: int = 0
    flip_unless: tuple[str, ...] = ()

    def of(self, sample: Sample, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (height, width, 3) → the image and its copies, drawn from a generator seeded by its key."""
        rng = random.Random(sample.key)
        may_flip = False
        if self.number and self.flip_unless:
            captions = [read_caption(sample, (), rng)] if "txt" in sample.files else []
            captions += read_captions(sample).values() if "json" in sample.files else []
            if not captions:
                raise BadSample("no caption", "neither a txt nor captions in a json say whether to flip it")
            text = normalized(" ".join(captions))
            may_flip = not any(re.search(beginning(word), text) for word in self.flip_unless)
        images = [pixels]
        for number in range(self.number):
            flip = float(may_flip and number % 2 == 1)
            images.append(Augment(AugmentConfig(crop_padding=self.shift, flip=flip))(pixels, rng))
        return images


def normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def beginning(word: str) -> str:
    """A pattern for where a word begins; for anywhere in scripts that join words or write them together."""
    word = normalized(word)
    is_joined = any(character >= FIRST_JOINED for character in word)
    return ("" if is_joined else r"(?<!\w)") + re.escape(word)


@dataclass(frozen=True)
class DecodeImages:
    """Replaces the image files of a part by the `pixels` of each image and its copies,
    (1 + copies, height, width, 3); samples without a readable image are counted.

    Args:
        copies: of the images of a split, by its name; others get none.
    """

    size: tuple[int, int]
    copies: Mapping[str, Copies]

    def __call__(self, part: Part) -> Part:
        if part.stamps is not None:
            part.source = describe_file(part.shard)
            if part.source["stamps"] != part.stamps:
                raise UserError(f"{part.shard} changed while it was read: start again when it is complete")
            return part
        decoded = Part(part.shard, num_read=len(part.samples))
        for sample in part.samples:
            try:
                pixels = self.decode(sample, decoded.outcome)
            except BadSample as bad:
                decoded.outcome.skip(bad.reason, sample.key)
                continue
            except Exception as error:
                error.add_note(f"while decoding {sample.key} in {sample.shard}")
                raise
            files = {name: kept for name, kept in sample.files.items() if name not in IMAGE_EXTENSIONS}
            decoded.samples.append(Sample(sample.key, sample.shard, files))
            decoded.pixels.append(pixels)
        return decoded

    def decode(self, sample: Sample, outcome: Outcome) -> np.ndarray:
        data = image_bytes(sample)
        copies = self.copies.get(split_for(sample.shard), Copies())
        images = copies.of(sample, decode_image(data, self.size))
        if not has_shape(measure_image(data).size, self.size):
            outcome.note("cropped around the centre (mmvit shards --fit pad keeps all)", sample.key)
        return np.stack(images)
