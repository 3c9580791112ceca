"""Codes made from images: their tokenizer, augmented copies and grids, and what is refused."""

import contextlib
import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from generator_scripts import refused

from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.codes import pack_codes, unpack_codes
from mmvit.data.encoding import Copies
from mmvit.data.images import decode_image, to_unit_range
from mmvit.data.samples import CaptionCodesSample
from mmvit.data.writing import ShardWriter
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.vq import VQModel
from mmvit.places import load_script
from mmvit.recipes.caption_codes import open_caption_codes
from mmvit.recipes.data import CaptionCodesConfig
from mmvit.streams.index import beside
from mmvit.streams.shards import BadSample, BadShard, Sample, read_shard
from mmvit.streams.stream import ShardStream


def test_code_shards_say_which_tokenizer_made_them(encoded):
    made = json.loads((encoded / "codes" / "dataset.json").read_text())["image_tokenizer"]
    assert made["grid"] == [2, 2]
    assert made["codebook_size"] == 16
    assert len(made["fingerprint"]) == 16


def test_images_are_encoded_at_the_size_of_the_tokenizers_run(encoded, tiny_shards, run_script, tmp_path):
    shutil.copytree(encoded / "tokenizer", tmp_path / "run" / "best")
    (tmp_path / "run" / "config.toml").write_text("[data]\nimage_size = [16, 24]\n")
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", tmp_path / "run")
    assert run_script("pipelines/encode_images.py", *arguments).returncode == 0
    made = json.loads((tmp_path / "codes" / "dataset.json").read_text())["image_tokenizer"]
    assert (made["size"], made["grid"]) == ([16, 24], [2, 3])


def test_encoding_refuses_what_it_cannot_do(encoded, tiny_shards, run_script, tmp_path):
    tokenizer = encoded / "tokenizer"
    script = "pipelines/encode_images.py"
    refused(run_script(script, tiny_shards, tiny_shards, "--tokenizer", tokenizer), "is the source itself")
    refused(
        run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 20), "multiples of 8"
    )
    refused(run_script(script, tmp_path / "none", tmp_path, "--tokenizer", tokenizer), "none")
    refused(
        run_script(script, tiny_shards, tmp_path, "--size", "64x"),
        "--size: expected a side or HEIGHTxWIDTH in pixels, such as 64 or 64x96, got 64x",
    )
    (tmp_path / "test-000000.tar").touch()
    no_codes = run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 16)
    refused(no_codes, f"{tmp_path} holds shards that mmvit encode did not make")
    (tmp_path / "dataset.json").write_text('{"image_tokenizer": {}}')
    refused(
        run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 16), "shards of test"
    )


def test_a_sample_whose_codes_do_not_fit_is_named(encoded, run_script, tokenizer, tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("good", {"codes.npy": pack_codes(np.zeros((2, 2))), "txt": b"red"})
        writer.write("bad", {"codes.npy": pack_codes(np.full((2, 2), 16)), "txt": b"red"})
    stream = ShardStream(tmp_path, CaptionCodesSample(tokenizer, 8, (2, 2), 16), 1, shuffle_buffer=0)
    with pytest.warns(UserWarning, match=r"does not fit: bad in .*000.tar: found code 16, but the codebook"):
        assert {batch["keys"][0] for batch in itertools.islice(stream, 3)} == {"good"}


def test_augmented_copies_are_shifted_and_flipped_where_the_caption_allows(
    encoded, tiny_shards, run_script, tokenizer, tmp_path
):
    out = tmp_path / "codes"
    arguments = (tiny_shards, out, "--tokenizer", encoded / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", *arguments, "--augmented", 3, "--flip-unless", "Red left")
    assert ran.returncode == 0, ran.stderr
    model = VQModel.from_pretrained(encoded / "tokenizer")
    shards = sorted(tiny_shards.glob("train-*.tar"))
    images = {sample.key: sample for shard in shards for sample in read_shard(shard)}
    moved = AugmentConfig(crop_padding=2)
    seen_flips = set()
    for sample in read_shard(next(out.glob("train-*0.tar"))):
        pixels, rng = decode_image(images[sample.key].files["png"], (16, 16)), random.Random(sample.key)
        copies = unpack_codes(sample.files["augmented.npy"], (2, 2), 16, augmented=True)
        is_flipped = not sample.files["txt"].startswith(b"red")
        seen_flips.add(is_flipped)
        for number in range(3):
            flip = moved.model_copy(update={"flip": float(is_flipped and number == 1)})
            expected = to_unit_range(Augment(flip)(pixels, rng))
            codes = model.encode(torch.from_numpy(expected.copy())[None])
            assert torch.equal(codes[0], torch.from_numpy(copies[number])), sample.key
    assert seen_flips == {True, False}
    (held_out,) = out.glob("held-out-*.tar")
    assert "augmented.npy" not in next(read_shard(held_out)).files

    sample = next(read_shard(next(out.glob("train-*0.tar"))))
    shape = (tokenizer, 8, (2, 2), 16)
    stored = sample.files.pop("augmented.npy")
    copies = unpack_codes(stored, (2, 2), 16, augmented=True).reshape(3, 4).tolist()
    for name in ("augmented.npy", "views.npy"):  # the second in shards of earlier versions
        old_or_new = Sample(sample.key, sample.shard, {**sample.files, name: stored})
        drawn = CaptionCodesSample(*shape, augmented=1.0)(old_or_new, random.Random(0))["codes"].tolist()
        assert drawn in copies
    plain = CaptionCodesSample(*shape)(sample, random.Random(0))["codes"].tolist()
    assert plain == unpack_codes(sample.files["codes.npy"], (2, 2), 16).reshape(-1).tolist()
    with pytest.raises(BadSample, match="no augmented copies"):
        CaptionCodesSample(*shape, augmented=1.0)(next(read_shard(held_out)), random.Random(0))


@pytest.mark.parametrize(
    ("english", "german", "words", "flips"),
    [
        ("leftwards hand", "nach rechts weisende Hand", ["left"], False),
        ("first quarter moon", "Halbmond, nach links", ["left", "Links"], False),
        ("copyright", "Copyright", ["left", "right"], True),
        ("copyright", "Copyright", [], False),
        ("hand", "手指朝左", ["左"], False),
        ("hand", "tro\u0309 tra\u0301i", ["trái"], False),
        ("upside-down face", "Gesicht", ["upside-down"], False),
        ("arrow", "السهم اليسار", ["يسار"], False),
    ],
)
def test_an_image_is_flipped_where_no_caption_forbids_it(english, german, words, flips):
    copies = Copies(2, 0, tuple(words))
    captions = json.dumps({"captions": {"en": english, "de": german}}).encode()
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    images = copies.of(Sample("one", Path("shard"), {"txt": english.encode(), "json": captions}), pixels)
    assert len(images) == 3
    assert np.array_equal(images[1], pixels)
    assert np.array_equal(images[2], pixels[:, ::-1] if flips else pixels)
    if words:
        with pytest.raises(BadSample, match="neither a txt nor captions"):
            copies.of(Sample("one", Path("shard"), {}), pixels)


def test_a_generator_is_evaluated_on_plain_captions_and_images(encoded):
    data = CaptionCodesConfig(
        train=[f"{encoded}/codes/train-*.tar"],
        held_out=[f"{encoded}/codes/held-out-*.tar"],
        image_tokenizer=str(encoded / "tokenizer"),
        languages=("en", "de"),
        bpe_dropout=0.5,
        augmented=0.25,
    )
    session = SimpleNamespace(
        processes=SimpleNamespace(device="cpu", rank=0, world_size=1),
        micro_batch_size=4,
        recipe=SimpleNamespace(train=SimpleNamespace(seed=0, num_workers=0)),
        evaluated=[],
        samples_per_epoch=0,
    )
    opened = open_caption_codes(session, data, GeneratorConfig(codebook_size=16, grid=(2, 2)))
    decode = opened.stream.reader.decode
    assert (decode.dropout, decode.augmented, decode.languages) == (0.5, 0.25, ("en", "de"))
    for batch in opened.held_out:
        ids, _ = opened.text_tokenizer.encode(batch["captions"], 32)
        assert torch.equal(batch["caption_ids"], ids)
        assert all("square" in caption for caption in batch["captions"])  # English
    assert opened.held_out.reader.decode.augmented == 0


def test_codes_that_are_being_replaced_do_not_say_whose_they_are(encoded, tiny_shards, run_script, tmp_path):
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    arguments = (shards, tmp_path / "codes", "--tokenizer", encoded / "tokenizer", "--size", 16)
    assert run_script("pipelines/encode_images.py", *arguments).returncode == 0
    shutil.copy(shards / "train-000001.tar", shards / "train-000000.tar")
    full = mock.patch.object(
        load_script("pipelines/encode_images.py"), "pack_codes", side_effect=OSError("the disk is full")
    )
    with full, pytest.raises(OSError, match="the disk is full"):
        run_script("pipelines/encode_images.py", *arguments)
    assert not (tmp_path / "codes/dataset.json").exists()


def test_codes_of_the_discrete_vae_are_encoded_and_named(tiny_shards, run_script, tmp_path):
    config = DiscreteVAEConfig(codebook_size=16, width=8, blocks_per_group=1, code_width=4)
    DiscreteVAE(config).save_pretrained(tmp_path / "dvae")
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", tmp_path / "dvae", "--size", 16)
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / "codes" / "dataset.json").read_text())["image_tokenizer"]
    assert (made["grid"], made["codebook_size"], len(made["fingerprint"])) == ([2, 2], 16, 16)


def test_images_of_any_shape_are_encoded_and_the_shards_say_their_grid(
    encoded, tiny_shards, run_script, tmp_path
):
    arguments = (tiny_shards, tmp_path, "--tokenizer", encoded / "tokenizer", "--size", "16x40")
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "dataset.json").read_text())["image_tokenizer"]["grid"] == [2, 5]
    told = " ".join(re.sub("[│─┼]", " ", ran.stdout).split())
    assert re.search(r"of these: cropped around the centre .* 56 held-out-000", told)  # all are squares
    sample = next(iter(read_shard(tmp_path / "held-out-000000.tar")))
    assert unpack_codes(sample.files["codes.npy"], (2, 5), 16).shape == (2, 5)


def test_samples_lost_in_damaged_shards_are_counted(tiny_shards, encoded, run_script, tmp_path):
    shards = [Path(shutil.copy(shard, tmp_path)) for shard in sorted(tiny_shards.glob("*.tar"))]
    for shard in shards[1:]:
        shutil.copy(beside(tiny_shards / shard.name), tmp_path)
    content = shards[1].read_bytes()
    shards[1].write_bytes(b"x" * 512 + content[512:])
    shards[2].write_bytes(shards[2].read_bytes()[:-20_000])
    lost = sum(10 - len(list(sound_samples(shard))) for shard in shards[1:3])
    assert lost > 2
    settings = ("--tokenizer", encoded / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", tmp_path, tmp_path / "codes", *settings)
    assert f"│ skipped: lost in a damaged shard │ {lost:7} │" in ran.stdout, ran.stderr
    assert "skipped: damaged shard" not in ran.stdout
    shards[0].write_bytes(shards[0].read_bytes()[:-9000])
    ran = run_script("pipelines/encode_images.py", tmp_path, tmp_path / "others", *settings)
    assert f"│ skipped: damaged shard, unknown losses │ {1:7} │" in ran.stdout


def sound_samples(shard: Path) -> Iterator[Sample]:
    with contextlib.suppress(BadShard):
        yield from read_shard(shard)
