"""Sample decoders: the files of one sample → the arrays that batches are stacked from."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import TextTokenizer, read_caption
from mmvit.data.codes import unpack_codes
from mmvit.data.images import MAX_PIXELS, decode_image, to_unit_range
from mmvit.streams.shards import BadSample, Sample

AUGMENTED = "augmented.npy"  # codes of shifted or flipped copies of the image, (copies, rows, columns)
OLD_AUGMENTED = "views.npy"  # the same, in shards encoded before 2026-12
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "jpeg")


class PixelsSample:
    """→ {"pixels": float32 (3, height, width) in [-1, 1]}."""

    needs = (IMAGE_EXTENSIONS,)

    def __init__(
        self,
        size: tuple[int, int],
        augment: AugmentConfig | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.size = size
        self.augment = Augment(augment or AugmentConfig())
        self.max_pixels = max_pixels

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        pixels = decode_image(image_bytes(sample), self.size, self.max_pixels)
        return {"pixels": to_unit_range(self.augment(pixels, rng))}


class ClassifierSample(PixelsSample):
    """→ {"pixels": as above, "labels": int64 ()}."""

    needs = (IMAGE_EXTENSIONS, ("cls",))

    def __init__(
        self,
        size: tuple[int, int],
        num_classes: int,
        augment: AugmentConfig | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(size, augment, max_pixels)
        self.num_classes = num_classes

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        label = read_class(sample.files["cls"], self.num_classes)
        return {**super().__call__(sample, rng), "labels": np.int64(label)}


class ClassSample:
    """→ {"labels": int64 ()}."""

    needs = (("cls",),)

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        return {"labels": np.int64(read_class(sample.files["cls"], self.num_classes))}


class CaptionSample:
    """→ {"captions": str}; see `read_caption`."""

    needs = (("txt", "json"),)

    def __init__(self, languages: Sequence[str] = ("en",), falls_back: bool = True):
        self.languages, self.falls_back = languages, falls_back

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        return {"captions": read_caption(sample, self.languages, rng, self.falls_back)}


class CaptionPixelsSample(PixelsSample):
    """→ {"pixels": as above, "captions": str}."""

    needs = (IMAGE_EXTENSIONS, ("txt", "json"))

    def __init__(
        self,
        size: tuple[int, int],
        languages: Sequence[str] = ("en",),
        augment: AugmentConfig | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(size, augment, max_pixels)
        self.languages = languages

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        return {**super().__call__(sample, rng), "captions": read_caption(sample, self.languages, rng)}


class CaptionIdsPixelsSample(CaptionPixelsSample):
    """→ {"pixels": as above, "captions": str, "caption_ids": int64 (text_length,)}; `report()` of the stream
    counts `captions` and `captions cut`."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_length: int,
        size: tuple[int, int],
        languages: Sequence[str] = ("en",),
        dropout: float = 0.0,
        augment: AugmentConfig | None = None,
    ):
        super().__init__(size, languages, augment)
        self.tokenizer, self.text_length, self.dropout = tokenizer, text_length, dropout

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        found = super().__call__(sample, rng)
        ids, num_cut = self.tokenizer.encode([found["captions"]], self.text_length, self.dropout, rng)
        return {**found, "caption_ids": ids[0], "counts": {"captions": 1, "captions cut": num_cut}}


class CaptionCodesSample:
    """→ {"caption_ids": int64 (text_length,), "codes": int64 (rows * cols,), "captions": str}.

    With probability `augmented` the codes are those of one of the image's augmented copies. `report()` of the
    stream counts `captions` and `captions cut`.
    """

    needs = (("codes.npy",), ("txt", "json"))

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_length: int,
        grid: tuple[int, int],
        codebook_size: int,
        languages: Sequence[str] = ("en",),
        dropout: float = 0.0,
        augmented: float = 0.0,
    ):
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.grid = grid
        self.codebook_size = codebook_size
        self.languages = languages
        self.dropout = dropout
        self.augmented = augmented

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        caption = read_caption(sample, self.languages, rng)
        ids, num_cut = self.tokenizer.encode([caption], self.text_length, self.dropout, rng)
        codes = unpack_codes(sample.files["codes.npy"], self.grid, self.codebook_size)
        if self.augmented and rng.random() < self.augmented:
            copies = unpack_codes(augmented_bytes(sample), self.grid, self.codebook_size, augmented=True)
            codes = rng.choice(copies)
        return {
            "caption_ids": ids[0],
            "codes": codes.reshape(-1),
            "captions": caption,
            "counts": {"captions": 1, "captions cut": num_cut},
        }


def image_bytes(sample: Sample) -> bytes:
    """The bytes of a sample's image. Raises BadSample if it has none."""
    for name in IMAGE_EXTENSIONS:
        if name in sample.files:
            return sample.files[name]
    raise BadSample("no image", f"{sample.key} has {', '.join(sorted(sample.files))}")


def augmented_bytes(sample: Sample) -> bytes:
    """The codes of a sample's augmented copies. Raises BadSample if it has none."""
    for name in (AUGMENTED, OLD_AUGMENTED):
        if name in sample.files:
            return sample.files[name]
    raise BadSample("no augmented copies", f"{sample.key}; mmvit encode --augmented 8 makes them")


def read_class(data: bytes, num_classes: int) -> int:
    """`b"3"` → 3; raises BadSample unless it is a number from 0 to `num_classes` - 1."""
    try:
        label = int(data)
    except ValueError:
        raise BadSample("unreadable class", f"cls is {data[:20]!r}, not a number") from None
    if not 0 <= label < num_classes:
        raise BadSample("class outside the range", f"cls is {label}, the classes are 0 to {num_classes - 1}")
    return label
