"""Samples made to break their readers: each costs one sample and is counted, whatever its decoder raised."""

import io
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmvit.data.captions import LONGEST_WORD, MOST_BYTES, TextTokenizer
from mmvit.data.codes import pack_codes, unpack_codes
from mmvit.data.images import open_image, to_rgb, whole_to_rgb
from mmvit.data.samples import CaptionSample, ClassifierSample, PixelsSample
from mmvit.data.writing import ShardWriter
from mmvit.errors import UserError
from mmvit.streams.shards import BadSample, Sample
from mmvit.streams.stream import ShardStream

# Decoders that raise


class Raising(ClassifierSample):
    def __init__(self, error: Exception, *keys: str):
        super().__init__((16, 16), 4)
        self.error, self.keys = error, keys

    def __call__(self, sample, rng):
        if sample.key in self.keys:
            raise self.error
        return super().__call__(sample, rng)


@pytest.mark.parametrize("error", [MemoryError("no"), RecursionError("no"), KeyError("no"), UserError("no")])
def test_a_sample_is_bad_whatever_its_decoder_raised(tiny_shards, error):
    stream = ShardStream(tiny_shards / "train-*.tar", Raising(error, "train-013"), 4, repeat=False)
    with pytest.warns(UserWarning, match=r"train-013 in .*train-000001\.tar: '?no"):
        assert sum(len(batch["keys"]) for batch in stream) == 47
    [reason] = stream.report()["skipped"]
    kind = f"{type(error).__name__} in test_hostile_samples.py:"
    assert reason.startswith("does not fit" if isinstance(error, UserError) else kind)


def test_what_no_sample_of_a_shard_fits_ends_the_stream(tiny_shards):
    decode = Raising(UserError("of another size"), *(f"train-{number:03d}" for number in range(10, 20)))
    with pytest.raises(UserError, match=r"^train-01\d in .*train-000001\.tar: of another size"):
        list(ShardStream(tiny_shards / "train-*.tar", decode, 4, repeat=False))


# Images


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    *chunks: bytes, width: int = 4, height: int = 4, depth: int = 8, kind: int = 2, rows: int = 0
) -> bytes:
    """A grey PNG of one colour, with chunks before its pixels."""
    line = bytes(1 + width * {0: 1, 2: 3, 6: 4}[kind] * depth // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(line * (rows or height)))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, pixels, chunk(b"IEND", b"")])


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


MEGABYTES = zlib.compress(bytes(2**26))  # 64 MiB of zeros, in 65 KB
EVIL_IMAGES = {
    "tiff": saved(Image.new("RGB", (4, 4)), "TIFF"),  # its tiles may claim gigabytes for one pixel
    "text bomb": png(chunk(b"zTXt", b"a\0\0" + MEGABYTES)),
    "profile bomb": png(chunk(b"iCCP", b"a\0\0" + MEGABYTES)),
    "of no size": png(width=0, rows=1),
    "gif in a huge frame": b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;",
    "half of a header": png()[:20],
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", EVIL_IMAGES)
def test_an_evil_image_is_a_bad_sample_and_takes_little_memory(name):
    decode = PixelsSample((16, 16))
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match=r"undecodable image|oversize image"):
            decode(Sample("key", Path("x.tar"), {"png": EVIL_IMAGES[name]}), random.Random(0))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "1", "CMYK"])
def test_a_large_image_is_converted_in_bands_to_the_same_pixels(mode, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA")
    image = (
        Image.fromarray(noise.view(np.uint32)[:, :, 0].astype(np.uint16))
        if mode == "I;16"
        else image.convert(mode)
    )
    if mode == "P":
        image.info["transparency"] = 3
    monkeypatch.setattr("mmvit.data.images.BAND", 7 * 30)
    assert image.mode == mode
    assert np.array_equal(to_rgb(image), whole_to_rgb(image))


def test_an_image_as_large_as_allowed_takes_at_most_12_bytes_a_pixel(monkeypatch):
    copies = []  # Pillow's memory is not Python's: count the pixels of whole images that are made
    of_size = Image.core.new

    def new(mode, size):
        copies.append(size[0] * size[1])
        return of_size(mode, size)

    monkeypatch.setattr(Image.core, "new", new)
    image = open_image(png(width=3000, height=2000, kind=6))
    assert image.size == (3000, 2000)
    assert sum(count == 6_000_000 for count in copies) <= 2


# Captions


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": rb'{"captions": {"en": "half \ud83d"}}'}, "text with a lone surrogate"),
        ({"json": rb'{"captions": {"\udfff": "x"}}'}, "text with a lone surrogate"),
        ({"txt": b"a" * (MOST_BYTES + 1)}, "text is too long: txt has 1,048,577 bytes"),
        ({"json": b" " * (MOST_BYTES + 1)}, "text is too long: json has 1,048,577 bytes"),
        ({"json": b'{"captions": {"en": ' + b"1" * 5000 + b"}}"}, "json is invalid"),
        ({"json": b'{"captions": ' + b'{"a":' * 50_000}, "json is invalid"),
    ],
)
def test_an_evil_caption_is_a_bad_sample(files, reason):
    with pytest.raises(BadSample, match=reason):
        CaptionSample()(Sample("key", Path("x.tar"), files), random.Random(0))


def test_a_word_without_end_is_merged_in_time_that_grows_with_its_length(tokenizer, monkeypatch):
    longest = 0
    merge = TextTokenizer.merge

    def watched(self, word, dropout, rng):
        nonlocal longest
        longest = max(longest, len(word))
        return merge(self, word, dropout, rng)

    monkeypatch.setattr(TextTokenizer, "merge", watched)
    ids, num_cut = tokenizer.encode(["a" * 5000], 8, dropout=0.1, rng=random.Random(0))
    assert (num_cut, longest) == (1, LONGEST_WORD)
    assert set(tokenizer.decode(ids[0])) == {"a"}


# Codes


def npy(header: str, data: bytes = bytes(8), version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text + data


def header(shape: str, dtype: str = "'<u2'", is_fortran: bool = False) -> str:
    return f"{{'descr': {dtype}, 'fortran_order': {is_fortran}, 'shape': {shape}, }}"


EVIL_CODES = {
    "of terabytes": npy(header("(99999999, 99999999)")),
    "of 4 GB": npy(header("(2, 1000000000)")),
    "of negative size": npy(header("(-2, -2)")),
    "of objects": npy(header("(2, 2)", "'|O'")),
    "of fields": npy(header("(2, 2)", "[('a', '<u2')]")),
    "of nothing": npy(header("(2, 2)", "'<V0'"), b""),
    "of a dtype that is a bomb": npy(header("(2, 2)", "'(99999,99999)<u2'")),
    "in another order of bytes": npy(header("(2, 2)", "'<u2'"), bytes(7)),
    "with more behind them": npy(header("(2, 2)"), bytes(9)),
    "version 3": npy(header("(2, 2)"), version=3),
    "version 9": npy(header("(2, 2)"), version=9),
    "a header of megabytes": npy(header("(2, 2)") + " " * 2**22, version=2),
    "a header nested deep": npy("(" * 5000),
    "a header that computes": npy(header("(9**9**9, 2)")),
    "a header in the wrong place": npy("")[:8],
}


@pytest.mark.parametrize("name", EVIL_CODES)
def test_evil_codes_are_a_bad_sample_and_take_no_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match="unreadable codes"):
            unpack_codes(EVIL_CODES[name], (2, 2), 16)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_codes_in_any_order_of_bytes_and_axes_are_read(tmp_path):
    codes = np.arange(6).reshape(2, 3)
    for array in (codes, codes.astype(">i8"), np.asfortranarray(codes.astype("<u2")), codes.astype("<u2")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert np.array_equal(unpack_codes(buffer.getvalue(), (2, 3), 6), codes)


def test_one_sample_of_wrong_codes_costs_one_sample(tmp_path):
    good = pack_codes(np.zeros((2, 2), int))
    wrong = {
        "of another grid": pack_codes(np.zeros((3, 2), int)),
        "beyond the codebook": pack_codes(np.full((2, 2), 99)),
    }
    with ShardWriter(tmp_path, "train") as writer:
        for name, codes in {"good": good, **wrong}.items():
            writer.write(name, {"codes.npy": codes, "txt": b"red"})

    stream = ShardStream(tmp_path, CodesSample(), 1, repeat=False)
    with pytest.warns(UserWarning, match="does not fit"):
        assert [batch["keys"] for batch in stream] == [["good"]]
    assert stream.report()["skipped"] == {"does not fit": 2}


class CodesSample:
    def __call__(self, sample, rng):
        return {"codes": unpack_codes(sample.files["codes.npy"], (2, 2), 16)}
