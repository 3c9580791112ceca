"""The data room: the stream covers, mixes, resumes and reports; pictures and captions are read right."""

import gzip
import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.codes import check_codes_fit, pack_codes, unpack_codes
from mmvit.data.plan import plan_epoch, shuffled
from mmvit.data.samples import CaptionCodesSample, CaptionPixelsSample, ClassifierSample, PixelsSample
from mmvit.data.shards import BadSample, Sample, expand_shards, read_shard
from mmvit.data.stream import ShardStream
from mmvit.data.writing import Outcome, ShardWriter, write_dataset_card
from mmvit.errors import UserError

TRAIN = "train-{000000..000004}.tar"
AUGMENT = AugmentConfig(crop_padding=2, flip=0.5, erase=0.5)


def stream_of(folder: Path, decode=None, batch_size=4, **settings) -> ShardStream:
    decode = decode or ClassifierSample((16, 16), 4, AUGMENT)
    return ShardStream(folder / TRAIN, decode, batch_size, **{"shuffle_buffer": 20, **settings})


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def take(stream: ShardStream, count: int) -> list[dict]:
    """The next `count` batches. (A for loop over zip would draw one too many.)"""
    batches = iter(stream)
    return [next(batches) for _ in range(count)]


def write(folder: Path, samples: list[dict[str, bytes]], split: str = "train") -> Path:
    with ShardWriter(folder, split, samples_per_shard=1000) as writer:
        for number, files in enumerate(samples):
            writer.write(f"{number:04d}", files)
    return folder / f"{split}-000000.tar"


def png_of(mode: str = "RGB", size: tuple[int, int] = (16, 16), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


class KeyOnly:
    """Decodes nothing; makes tests of order fast."""

    def __call__(self, sample, rng):
        return {"draw": rng.random()}


# Coverage and order


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_cover_every_sample_once(tiny_shards, num_workers):
    seen = Counter()
    for rank in range(2):
        stream = stream_of(
            tiny_shards, KeyOnly(), rank=rank, world_size=2, num_workers=num_workers, repeat=False
        )
        seen.update(keys_of(stream))
    assert seen == {f"train-{number:03d}": 1 for number in range(48)}


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5, 7, 12, 16])
@pytest.mark.parametrize("shuffle", [True, False])
def test_plan_gives_every_sample_to_exactly_one_reader(num_readers, shuffle):
    shards = [Path(f"{number}.tar") for number in range(5)]
    for epoch in range(3):
        taken = Counter()
        for reader in range(num_readers):
            for part in plan_epoch(shards, 7, epoch, reader, num_readers, shuffle):
                taken.update((part.shard, number) for number in range(20) if number % part.step == part.first)
        assert taken == {(shard, number): 1 for shard in shards for number in range(20)}


def test_plan_permutes_the_shards_anew_in_every_epoch():
    shards = [Path(f"{number}.tar") for number in range(20)]
    orders = [[part.shard for part in plan_epoch(shards, 0, epoch, 0, 1, True)] for epoch in range(2)]
    assert orders[0] != orders[1]
    assert [part.shard for part in plan_epoch(shards, 0, 0, 0, 1, False)] == shards


def test_one_shard_is_mixed_differently_in_every_epoch(tiny_shards):
    stream = ShardStream(tiny_shards / "train-000000.tar", KeyOnly(), 10, shuffle_buffer=20)
    first, second = take(stream, 2)
    assert sorted(first["keys"]) == sorted(second["keys"])
    assert first["keys"] != second["keys"]


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_the_same_seed(tiny_shards):
    def two_epochs(seed):
        keys = keys_of(take(stream_of(tiny_shards, KeyOnly(), seed=seed), 24))
        return keys[:48], keys[48:]

    first, second = two_epochs(seed=0)
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second
    assert (first, second) == two_epochs(seed=0)
    assert first != two_epochs(seed=1)[0]


def test_no_shuffle_buffer_keeps_the_order_of_the_shards(tiny_shards):
    stream = stream_of(tiny_shards, KeyOnly(), shuffle_buffer=0, repeat=False)
    assert keys_of(stream) == [f"train-{number:03d}" for number in range(48)]
    assert keys_of(stream) == [f"train-{number:03d}" for number in range(48)]  # once more from the beginning


def test_shuffle_buffer_mixes_and_loses_nothing():
    mixed = list(shuffled(iter(range(1000)), 100, random.Random(0)))
    assert sorted(mixed) == list(range(1000))
    moved = [abs(place - item) for place, item in enumerate(mixed)]
    assert np.mean(moved) > 50


def test_randomness_of_a_sample_depends_on_neither_rank_nor_worker(tiny_shards):
    def draws(**settings):
        batches = list(stream_of(tiny_shards, KeyOnly(), repeat=False, seed=3, **settings))
        return {
            key: draw.item()
            for batch in batches
            for key, draw in zip(batch["keys"], batch["draw"], strict=True)
        }

    alone = draws()
    assert len(set(alone.values())) == 48
    assert draws(rank=0, world_size=2) | draws(rank=1, world_size=2) == alone


# Position


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("done", [0, 3, 13, 24])
def test_resumed_stream_gives_the_batches_of_an_uninterrupted_one(tiny_shards, num_workers, done):
    whole = take(stream_of(tiny_shards, batch_size=5, num_workers=num_workers), done + 12)
    first = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    second.load_state_dict(state)
    for expected, found in zip(whole[done:], take(second, 12), strict=True):
        assert found["keys"] == expected["keys"]
        assert torch.equal(found["pixels"], expected["pixels"])
        assert torch.equal(found["labels"], expected["labels"])
    reads = stream_of(tiny_shards, batch_size=5, num_workers=num_workers)
    take(reads, done + 12)
    assert second.report() == reads.report()


def test_interrupted_evaluation_goes_on_where_it_was(tiny_shards):
    stream = stream_of(tiny_shards, KeyOnly(), num_workers=2, repeat=False, batch_size=5)
    whole = keys_of(stream)
    part = keys_of(take(stream, 4))
    assert part + keys_of(stream) == whole


def test_position_of_another_layout_warns_and_takes_the_next_epoch(tiny_shards):
    saved = stream_of(tiny_shards, KeyOnly())
    take(saved, 2)
    stream = stream_of(tiny_shards, KeyOnly(), world_size=2)
    with pytest.warns(UserWarning, match="other world_size: going on with epoch 1"):
        stream.load_state_dict(saved.state_dict())
    assert stream.positions[0].epoch == 1


def test_stream_with_workers_leaves_the_global_generator_alone(tiny_shards):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(stream_of(tiny_shards, KeyOnly(), num_workers=1), 1)
    assert torch.rand(1) == expected


# Bad samples


def test_bad_samples_are_skipped_counted_and_named(tiny_shards, tmp_path):
    good = next(iter(read_shard(tiny_shards / "heldout-000000.tar"))).files
    samples = [good] * 200
    samples[3] = {**good, "png": good["png"][:60]}
    samples[5] = {**good, "cls": b"4"}
    samples[8] = {**good, "cls": b"cat"}
    samples[199] = {"txt": b"no picture", "cls": b"1"}
    write(tmp_path, samples)
    for num_workers in (0, 1):
        decode = ClassifierSample((16, 16), 4)
        stream = ShardStream(tmp_path, decode, 8, repeat=False, shuffle_buffer=0, num_workers=num_workers)
        assert len(keys_of(stream)) == 196
        report = stream.report()
        assert report["read"] == 200
        assert report["skipped"] == {
            "undecodable image": 1,
            "class outside the range": 1,
            "unreadable class": 1,
            "missing file": 1,
        }
        assert report["examples"]["class outside the range"].startswith("0005 in ")
        assert "cls is 4, the classes are 0 to 3" in report["examples"]["class outside the range"]
        assert "needs jpg or png or webp or jpeg, has cls, txt" in report["examples"]["missing file"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_stops_at_too_many_bad_samples(tiny_shards, tmp_path, num_workers):
    good = next(iter(read_shard(tiny_shards / "heldout-000000.tar"))).files
    write(tmp_path, [{**good, "cls": b"9"} if number % 5 == 0 else good for number in range(100)])
    stream = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 8, num_workers=num_workers)
    with pytest.raises(
        UserError, match=r"^11 bad samples among \d+ read: 11 x class outside the range"
    ) as caught:
        keys_of(stream)
    assert "Traceback" not in str(caught.value)
    lenient = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 8, repeat=False, max_bad=0.5)
    assert len(keys_of(lenient)) == 80


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_without_the_needed_key_says_which_keys_it_has(tmp_path, num_workers):
    path = write(tmp_path, [{"png": png_of(), "txt": b"a"}] * 5)
    stream = ShardStream(tmp_path, ClassifierSample((16, 16), 4), 2, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        next(iter(stream))
    assert (
        str(caught.value)
        == f"no sample of {path} has the files that are needed here: needs cls, has png, txt"
    )


def test_truncated_shard_keeps_what_is_before_the_cut_and_is_reported(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "train-000002.tar"
    whole = cut.read_bytes()
    for length in (len(whole) // 2, len(whole) // 1024 * 512, 700):
        cut.write_bytes(whole[:length])
        stream = stream_of(tmp_path, KeyOnly(), repeat=False)
        keys = set(keys_of(stream))
        assert {f"train-{number:03d}" for number in range(48) if number // 10 != 2} <= keys
        assert len(keys) < 48
        report = stream.report()
        assert report["skipped"] == {"broken shard": 1}
        assert str(cut) in report["examples"]["broken shard"]


def test_archive_cut_between_two_files_or_overwritten_is_noticed(tiny_shards, tmp_path):
    whole = (tiny_shards / "train-000001.tar").read_bytes()
    with tarfile.open(tiny_shards / "train-000001.tar") as archive:
        offset = archive.getmembers()[10].offset
    for number, data in enumerate((whole[:offset], whole[:offset] + b"x" * 512 + whole[offset + 512 :])):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        stream = ShardStream(path, KeyOnly(), 2, repeat=False)
        assert len(keys_of(stream)) == 1  # of two whole samples the second is not known to be whole
        assert stream.report()["skipped"] == {"broken shard": 1}


def test_too_few_samples_for_the_readers_is_said(tmp_path):
    write(tmp_path, [{"txt": b"a"}] * 2)
    stream = ShardStream(tmp_path, KeyOnly(), 2, rank=2, world_size=3)
    with pytest.raises(UserError, match="reader 3 of 3"):
        next(iter(stream))


# Shards


def test_patterns_expand_to_shards(tiny_shards):
    train = [tiny_shards / f"train-{number:06d}.tar" for number in range(5)]
    assert expand_shards(tiny_shards / TRAIN) == train
    assert expand_shards(str(tiny_shards / "train-*.tar")) == train
    assert expand_shards(tiny_shards) == [tiny_shards / "heldout-000000.tar", *train]
    assert expand_shards([train[1], tiny_shards / "train-00000{0,3}.tar"]) == [train[1], train[0], train[3]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "train-{000003..000006}.tar",
            "2 of 4 shards do not exist, the first is .*train-000005.tar; .* holds heldout-0",
        ),
        (
            "test-*.tar",
            "no shards match .*test-.*; .* holds heldout-000000.tar, train-000000.tar, .* and 2 more",
        ),
        ("nowhere/train-*.tar", "no shards match .*nowhere"),
        ("train-{5..2}.tar", "runs backwards"),
        ("train-{a}.tar", "neither a range"),
    ],
)
def test_pattern_without_shards_says_what_is_there(tiny_shards, pattern, message):
    with pytest.raises(UserError, match=message):
        expand_shards(tiny_shards / pattern)


@pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "https://example.org/x.tar", ""])
def test_pipes_and_urls_are_refused(pattern):
    with pytest.raises(UserError, match=r"from files only|is empty"):
        expand_shards(pattern)


def test_compressed_shard_reads_like_a_plain_one(tiny_shards, tmp_path):
    plain = tiny_shards / "heldout-000000.tar"
    packed = tmp_path / "heldout.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [(s.key, s.files) for s in read_shard(packed)] == [(s.key, s.files) for s in read_shard(plain)]


def test_same_samples_give_the_same_bytes(tmp_path):
    samples = [{"png": png_of(), "txt": str(number).encode()} for number in range(20)]
    first, second = write(tmp_path / "a", samples), write(tmp_path / "b", samples)
    assert first.read_bytes() == second.read_bytes()


def test_failed_writing_leaves_the_earlier_shards_alone(tmp_path):
    before = write(tmp_path, [{"txt": b"old"}]).read_bytes()

    def fail_half_way() -> None:
        with ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
            writer.write("0", {"txt": b"new"})
            writer.write("1", {"txt": b"new"})
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_fewer_shards_replace_all_earlier_ones_of_the_split(tmp_path):
    with ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
        for number in range(3):
            writer.write(str(number), {"txt": b""})
    write(tmp_path, [{"txt": b"a"}])
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("key", "files"), [("a.b", {"txt": b""}), ("", {"txt": b""}), ("a", {}), ("twice", {"txt": b""})]
)
def test_writer_refuses_keys_that_readers_would_misread(tmp_path, key, files):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("twice", {"txt": b""})
        with pytest.raises(ValueError, match="sample"):
            writer.write(key, files)


# Images


def decode(data: bytes, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """(height, width, 3) in [0, 255] through the decoder of samples."""
    pixels = PixelsSample(size)(Sample("key", Path("x.tar"), {"png": data}), random.Random(0))["pixels"]
    return (pixels.transpose(1, 2, 0) + 1) * 127.5


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_exif_orientation_turns_the_picture_upright():
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 16))  # the top half
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    pixels = decode(saved(image, "JPEG", exif=exif, quality=95))
    assert pixels[:7].min() > 200
    assert pixels[9:].max() < 50


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


def test_oversize_image_is_refused_before_it_is_decompressed():
    png = png_of()
    for size in (60_000, 9_000):  # Pillow refuses the first by itself
        header = b"IHDR" + struct.pack(">II", size, size) + png[24:29]
        bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
        with pytest.raises(BadSample, match="oversize image"):
            decode(bomb)
    small = Sample("key", Path("x.tar"), {"png": png_of(size=(40, 30))})
    with pytest.raises(BadSample, match="40x30 pixels, the cap is 1,000"):
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
    shares = []
    for seed in range(100):
        erased = Augment(AugmentConfig(erase=1))(ramp, random.Random(seed))
        shares.append((erased != ramp).any(axis=2).mean())
    assert 0.01 < min(shares) < 0.06
    assert 0.25 < max(shares) < 0.4


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
    stream = stream_of(tiny_shards, decode, repeat=False)
    batches = list(stream)
    batch = batches[0]
    assert batch["caption_ids"].shape == (4, 1)
    assert batch["codes"].shape == (4, 4)
    assert batch["codes"].dtype == batch["caption_ids"].dtype == torch.int64
    assert stream.report()["captions"] == 48
    assert stream.report()["captions cut"] == 48


def test_codes_of_another_grid_or_codebook_stop_the_run(tiny_shards, tokenizer):
    for settings, message in (
        ({"grid": (4, 4)}, "codes are 2x2, the model expects 4x4"),
        ({"codebook_size": 2}, "ends at 1"),
    ):
        decode = CaptionCodesSample(tokenizer, 8, **{"grid": (2, 2), "codebook_size": 4, **settings})
        with pytest.raises(UserError, match=message):
            list(stream_of(tiny_shards, decode, repeat=False))


def test_codes_keep_their_values_and_pickles_are_refused():
    codes = np.array([[0, 65535], [7, 8]])
    assert np.array_equal(unpack_codes(pack_codes(codes), (2, 2), 65536), codes)
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), b"", pack_codes(codes)[:-3]):
        with pytest.raises(BadSample, match="unreadable codes"):
            unpack_codes(data, (2, 2), 65536)


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not say which image tokenizer"):
        check_codes_fit(tmp_path, (8, 8), 1024, "abc")
    made = {"grid": [8, 8], "codebook_size": 1024, "fingerprint": "abc"}
    write_dataset_card(tmp_path, Outcome(), image_tokenizer=made)
    check_codes_fit(tmp_path, (8, 8), 1024, "abc")
    with pytest.raises(UserError, match="of fingerprint abc, the tokenizer in use has def"):
        check_codes_fit(tmp_path, (8, 8), 1024, "def")
