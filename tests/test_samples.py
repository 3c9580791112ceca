"""What becomes of a sample's files: images, augmentation, captions and codes."""

import io
import json
import pickle
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import TextTokenizer, caption_lengths, read_caption, read_caption_file
from mmvit.data.codes import check_codes_fit, pack_codes, unpack_codes
from mmvit.data.images import (
    images_from_pixels,
    measure_image,
    open_image,
    pixels_from_images,
    to_unit_range,
)
from mmvit.data.samples import CaptionCodesSample, CaptionPixelsSample, PixelsSample
from mmvit.data.writing import Outcome, ShardWriter, write_dataset_card
from mmvit.errors import UserError
from mmvit.streams.shards import BadSample, Sample, read_shard
from mmvit.streams.stream import ShardStream

AUGMENT = AugmentConfig(crop_padding=2, flip=0.5, erase=0.5)


def png_of(mode: str = "RGB", size: tuple[int, int] = (16, 16), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


# Images


def decode(data: bytes, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """(height, width, 3) in [0, 255] through the decoder of samples."""
    pixels = PixelsSample(size)(Sample("key", Path("x.tar"), {"png": data}), random.Random(0))["pixels"]
    return (pixels.transpose(1, 2, 0) + 1) * 127.5


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_pixels_give_every_level_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    (image,) = images_from_pixels(torch.from_numpy(to_unit_range(levels)).unsqueeze(0))
    assert np.array_equal(np.asarray(image), levels)


def test_exif_orientation_turns_the_image_upright():
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 16))  # the top half
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    pixels = decode(saved(image, "JPEG", exif=exif, quality=95))
    assert pixels[:7].min() > 200
    assert pixels[9:].max() < 50


def test_an_exif_orientation_that_is_no_number_is_ignored():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x0112, 7, 4, b"\x06abc") + bytes(4)
    data = saved(Image.new("RGB", (32, 16)), "JPEG", exif=exif)
    assert isinstance(Image.open(io.BytesIO(data)).getexif()[0x0112], bytes)
    assert measure_image(data).size == open_image(data).size[::-1] == (16, 32)
    assert not measure_image(data).is_turned


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (16, 16), (0, 0)), (255, 255, 255)),
        (Image.new("L", (16, 16), 77), (77, 77, 77)),
        (Image.new("1", (16, 16), 1), (255, 255, 255)),
        (Image.new("RGB", (16, 16), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.fromarray(np.full((16, 16), 32896, np.uint16)), (128, 128, 128)),
    ],
    ids=["transparent", "half transparent", "grey with alpha", "grey", "bilevel", "palette", "16 bits"],
)
def test_png_of_every_mode_becomes_rgb(image, expected):
    assert decode(saved(image, "PNG")) == pytest.approx(np.full((16, 16, 3), expected), abs=0.6)


def test_palette_with_a_transparent_colour_is_laid_over_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 255] + [0] * 765)
    assert decode(saved(image, "PNG", transparency=0)).min() == pytest.approx(255)


def test_cmyk_jpeg_becomes_rgb():
    pixels = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert pixels[8, 8] == pytest.approx([255, 0, 0], abs=8)


def test_resizing_keeps_the_centre_and_does_not_alias():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96:2] = 255  # finer than the result can show, in the middle square
    pixels = decode(saved(Image.fromarray(stripes), "PNG"), (8, 8))
    assert pixels.shape == (8, 8, 3)
    assert pixels[:, 1:-1] == pytest.approx(127.5, abs=12)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_without_losing_sharpness():
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image = coarse.resize((128, 128), Image.Resampling.BICUBIC).resize((64, 64))
    data = saved(image, "JPEG", quality=95)
    whole = np.asarray(open_image(data).resize((16, 16), Image.Resampling.BICUBIC), float)
    error = np.abs(decode(data) - whole).mean()
    assert 0 < error < 4  # decoded at 32x32; 0 would be at 64x64, 16x16 gives 6


def test_padding_keeps_what_cropping_cuts_off():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (0, 0, 5, 20))
    cropped, padded = (
        (pixels_from_images([wide], 20, 20, fit=fit)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        for fit in ("crop", "pad")
    )
    assert cropped == pytest.approx(decode(saved(wide, "PNG"), (20, 20)))
    assert cropped[:, :, 2].max() < 30
    assert padded[10, 0] == pytest.approx([0, 0, 255])
    assert padded[0, 10] == pytest.approx([255, 255, 255])


def test_oversize_image_is_refused_before_it_is_decompressed():
    png = png_of()
    for size in (60_000, 9_000):  # Pillow refuses the first by itself
        header = b"IHDR" + struct.pack(">II", size, size) + png[24:29]
        bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
        with pytest.raises(BadSample, match="oversize image"):
            decode(bomb)
    small = Sample("key", Path("x.tar"), {"png": png_of(size=(40, 30))})
    with pytest.raises(BadSample, match="40x30 pixels, the limit is 1,000"):
        PixelsSample((16, 16), max_pixels=1000)(small, random.Random(0))


@pytest.mark.parametrize("data", [b"", b"hello", png_of()[:50], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_undecodable_image_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="undecodable image"):
        decode(data)


# Augmentation


def test_augmentation_is_the_same_for_the_same_generator_and_off_by_default():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert Augment(AugmentConfig())(pixels, random.Random(0)) is pixels
    results = [Augment(AUGMENT)(pixels, random.Random(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert all(result.shape == pixels.shape and result.dtype == np.uint8 for result in results)


def test_crop_flip_and_erase_do_what_they_say():
    ramp = np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3))
    flipped = Augment(AugmentConfig(flip=1))(ramp, random.Random(0))
    assert np.array_equal(flipped[:, ::-1], ramp)
    offsets = {
        int(Augment(AugmentConfig(crop_padding=2))(ramp, random.Random(seed))[0, 10, 0]) for seed in range(60)
    }
    assert offsets == {8, 9, 10, 11, 12}
    upright = np.tile(np.arange(20, dtype=np.uint8)[:, None, None], (1, 16, 3))
    offsets = {
        int(Augment(AugmentConfig(crop_padding=2))(upright, random.Random(seed))[10, 0, 0])
        for seed in range(60)
    }
    assert offsets == {8, 9, 10, 11, 12}
    shares, everywhere = [], np.zeros((16, 20))
    for seed in range(100):
        erased = Augment(AugmentConfig(erase=1))(ramp, random.Random(seed))
        is_erased = (erased != ramp).any(axis=2)
        shares.append(is_erased.mean())
        everywhere += is_erased
        assert erased[is_erased].std() > 40  # noise, 74 on average
    assert 0.01 < min(shares) < 0.06
    assert 0.25 < max(shares) < 0.4
    assert everywhere.min() > 0  # also in the corners


# Captions


CAPTIONS = [
    "woman astronaut: dark skin tone",
    "red  apple",
    "",
    "Ünïcode ﬁ 笑顔 🎈",
    "[PAD]",
    "o'clock-3 & co.",
    "  x ",
]


def test_decoding_gives_back_the_normalized_caption(tokenizer):
    normalized = [
        "woman astronaut: dark skin tone",
        "red apple",
        "",
        "ünïcode fi 笑顔 🎈",
        "[pad]",
        "o'clock-3 & co.",
        "x",
    ]
    ids, num_cut = tokenizer.encode(CAPTIONS, 64)
    assert num_cut == 0
    assert ids.dtype == torch.int64
    assert ids.shape == (7, 64)
    assert [tokenizer.decode(row) for row in ids] == normalized


def test_empty_caption_is_all_pads_and_pad_is_in_no_caption(tokenizer):
    assert tokenizer.pad_id == 0
    assert tokenizer.encode([""], 8)[0].tolist() == [[0] * 8]
    assert tokenizer.pad_id not in tokenizer.tokenize("[PAD] [pad] pad")


def test_long_captions_are_cut_and_counted(tokenizer):
    long = "a very long caption about nothing in particular " * 4
    ids, num_cut = tokenizer.encode([long, "apple"], 6)
    assert num_cut == 1
    assert ids[0].tolist() == tokenizer.tokenize(long)[:6]
    assert tokenizer.encode([long], len(tokenizer.tokenize(long)))[1] == 0
    assert tokenizer.encode([long], len(tokenizer.tokenize(long)) - 1)[1] == 1


def test_how_many_captions_will_be_cut_is_known_beforehand(tokenizer, tmp_path):
    captions = {"fits": "red apple", "long": "an apple " * 40, "longer": "a pear " * 60, "mute": ""}
    with ShardWriter(tmp_path, "train", samples_per_shard=2) as writer:
        for key, caption in captions.items():
            by_language = json.dumps({"captions": {"de": "ein Apfel"} if key == "long" else {}}).encode()
            writer.write(key, {"png": b"unread", "txt": caption.encode(), "json": by_language})
        writer.write("silent", {"png": b"unread"})
    found = caption_lengths(tmp_path, tokenizer, 32)
    longest = len(tokenizer.tokenize(captions["longer"]))
    assert found == (4, 2, longest, "longer", 32)
    assert found.describe() == (
        f"50.0% of the first 4 captions are longer than model.text_length (32 tokens) and will be cut; "
        f"the longest has {longest} (longer)"
    )
    assert caption_lengths(tmp_path, tokenizer, longest).describe() == ""
    assert caption_lengths(tmp_path, tokenizer, 32, ("de",)).num_cut == 1  # longer falls back to txt
    assert caption_lengths(tmp_path, tokenizer, 32, most=3).captions == 2  # one a shard; the third has none


def test_languages_that_no_caption_has_are_refused(tokenizer, tiny_shards, tmp_path):
    with pytest.raises(UserError, match=r"languages: no caption of .* is in ge; .* in .*de"):
        caption_lengths(tiny_shards, tokenizer, 32, ("ge",))
    with pytest.raises(UserError, match=r"languages: no caption of .* is in ge; .* in .*de"):
        caption_lengths(tiny_shards, tokenizer, 32, ("en", "ge", "de"))
    with ShardWriter(tmp_path / "rare", "train") as writer:
        for key, language in (("a", "de"), ("b", "de"), ("c", "gsw")):
            writer.write(key, {"json": json.dumps({"captions": {language: "x"}}).encode()})
    caption_lengths(tmp_path / "rare", tokenizer, 32, ("de", "gsw"), most=1)
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("egg", {"txt": b"ein Ei"})
    assert caption_lengths(tmp_path, tokenizer, 32, ("de",)).captions == 1  # of no known language


def test_dropout_close_to_zero_equals_the_library(tokenizer):
    captions = [
        *CAPTIONS,
        "couple with heart woman man medium-light skin tone dark skin tone",
        "耳の不自由な女性 やや薄い肌色",
    ]
    for caption in captions:
        assert tokenizer.tokenize(caption, 1e-12, random.Random(0)) == tokenizer.tokenize(caption)


def test_dropout_is_seeded_splits_words_and_decodes_to_the_same_text(tokenizer):
    caption = "woman astronaut medium-dark skin tone"
    ids = [tokenizer.tokenize(caption, 0.3, random.Random(seed)) for seed in (5, 5, 6)]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) > len(tokenizer.tokenize(caption))
    assert {tokenizer.decode(row) for row in ids} == {caption}
    assert (
        len(tokenizer.tokenize(caption, 1.0, random.Random(0))) == len(caption) + 1
    )  # single bytes, and the space


def test_tokenizer_survives_pickling(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize("[PAD] red apple") == tokenizer.tokenize("[PAD] red apple")


def test_a_tokenizer_that_pads_by_another_token_is_refused(tokenizer):
    facts = json.loads(tokenizer.tokenizer.to_str())
    swapped = {0: 1, 1: 0}
    vocabulary = facts["model"]["vocab"]
    facts["model"]["vocab"] = {token: swapped.get(place, place) for token, place in vocabulary.items()}
    facts["added_tokens"] = [{**token, "id": 1} for token in facts["added_tokens"]]
    with pytest.raises(UserError, match=r"^mine: expected \[PAD\] as token 0, .* got token 1"):
        TextTokenizer(Tokenizer.from_str(json.dumps(facts)), "mine")


def test_tokens_around_a_caption_are_left_out_with_and_without_dropout(tokenizer):
    framing = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    framing.post_processor = TemplateProcessing("[PAD] $A [PAD]", special_tokens=[("[PAD]", 0)])
    framed = TextTokenizer(framing)
    assert framed.tokenizer.encode("red apple").ids != tokenizer.tokenize("red apple")
    assert framed.tokenize("red apple") == tokenizer.tokenize("red apple")
    assert framed.tokenize("red apple", 1e-12, random.Random(0)) == tokenizer.tokenize("red apple")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    sample = Sample("one", tmp_path, {"txt": b"\xef\xbb\xbfred apple"})
    assert read_caption(sample, (), random.Random(0)) == "red apple"
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbfred apple\npear\n")
    assert read_caption_file(tmp_path / "captions.txt") == ["red apple", "pear"]


def test_language_is_drawn_from_those_wanted_and_present(tiny_shards):
    sample = next(iter(read_shard(tiny_shards / "train-000000.tar")))

    def captions(*languages):
        decode = CaptionPixelsSample((16, 16), languages)
        return {decode(sample, random.Random(seed))["captions"] for seed in range(30)}

    assert captions("en", "de", "xx") == {"red square", "Quadrat red"}
    assert captions("de") == {"Quadrat red"}
    assert captions("xx") == {"red square"}  # falls back to txt


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"txt": b"caf\xe9"}, "caption is not UTF-8: byte 0xe9 at position 3 of txt"),
        ({"json": b"{"}, "json is invalid"),
        ({"json": b'{"captions": "x"}'}, "json is invalid"),
        ({"json": b'{"captions": {"fr": "x"}}'}, "no caption: has no txt, and no caption in en"),
    ],
)
def test_bad_captions_are_bad_samples(files, reason):
    with pytest.raises(BadSample, match=reason):
        CaptionPixelsSample((16, 16))(
            Sample("k", Path("x.tar"), {"png": png_of(), **files}), random.Random(0)
        )


# Codes


def test_caption_and_codes_come_in_batches_and_cut_captions_are_counted(tiny_shards, tokenizer):
    decode = CaptionCodesSample(tokenizer, text_length=1, grid=(2, 2), codebook_size=4)
    stream = ShardStream(tiny_shards / "train-*.tar", decode, 4, repeat=False)
    batches = list(stream)
    batch = batches[0]
    assert batch["caption_ids"].shape == (4, 1)
    assert batch["codes"].shape == (4, 4)
    assert batch["codes"].dtype == batch["caption_ids"].dtype == torch.int64
    assert stream.report()["captions"] == 48
    assert stream.report()["captions cut"] == 48


def test_the_share_of_augmented_copies_is_kept_and_every_copy_is_drawn(tokenizer):
    copies = np.arange(1, 4)[:, None, None] * np.ones((3, 2, 2), int)
    files = {
        "txt": b"red",
        "codes.npy": pack_codes(np.zeros((2, 2), int)),
        "augmented.npy": pack_codes(copies),
    }
    decode = CaptionCodesSample(tokenizer, 8, (2, 2), 4, augmented=0.3)
    sample = Sample("one", Path("x.tar"), files)
    drawn = Counter(int(decode(sample, random.Random(seed))["codes"][0]) for seed in range(1000))
    assert drawn.keys() == {0, 1, 2, 3}
    assert 650 < drawn[0] < 750
    assert all(70 < drawn[copy] < 130 for copy in (1, 2, 3))


def test_codes_of_another_grid_or_codebook_stop_the_run(tiny_shards, tokenizer):
    for settings, message in (
        ({"grid": (4, 4)}, "expected codes of 4x4, got 2x2"),
        ({"codebook_size": 2}, "ends at 1"),
    ):
        decode = CaptionCodesSample(tokenizer, 8, **{"grid": (2, 2), "codebook_size": 4, **settings})
        with pytest.raises(UserError, match=message):
            list(ShardStream(tiny_shards / "train-*.tar", decode, 4, repeat=False))


def test_codes_keep_their_values_and_pickles_are_refused():
    codes = np.array([[0, 65535], [7, 8]])
    assert np.array_equal(unpack_codes(pack_codes(codes), (2, 2), 65536), codes)
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    archive, empty = io.BytesIO(), io.BytesIO()
    np.savez(archive, codes)
    np.save(empty, np.zeros((0, 2), np.uint16))
    good = pack_codes(codes)
    shapes = (b"(9**9, 2)", b"(2, 99999999999999)", b"((((2, 2)", b"(2.5, 2)", b"'x'")
    evil = [good.replace(b"(2, 2), }" + b" " * 20, (b"%s, }" % shape).ljust(29)) for shape in shapes]
    assert all(len(data) == len(good) for data in evil)
    for data in (buffer.getvalue(), b"", good[:-3], archive.getvalue(), empty.getvalue(), *evil):
        with pytest.raises(BadSample, match="unreadable codes"):
            unpack_codes(data, (2, 2), 65536)


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not say which image tokenizer"):
        check_codes_fit(tmp_path, (8, 8), 1024, "abc")
    made = {"grid": [8, 8], "codebook_size": 1024, "fingerprint": "abc"}
    write_dataset_card(tmp_path, Outcome(), image_tokenizer=made)
    check_codes_fit(tmp_path, (8, 8), 1024, "abc")
    with pytest.raises(UserError, match=r"abc.*, but the tokenizer in use has def: set data.image_tokenizer"):
        check_codes_fit(tmp_path, (8, 8), 1024, "def")
