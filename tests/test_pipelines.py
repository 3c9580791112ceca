"""The generator's scripts from shards to pictures on tiny data, and what they say to the user's mistakes."""

import itertools
import json
import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mmvit.core.transformer import TransformerConfig
from mmvit.data.augment import Augment, AugmentConfig
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import pack_codes, unpack_codes
from mmvit.data.images import decode_image, to_unit_range
from mmvit.data.samples import CaptionCodesSample, CaptionSample, PixelsSample
from mmvit.data.shards import BadSample, read_shard
from mmvit.data.stream import ShardStream
from mmvit.data.writing import ShardWriter
from mmvit.errors import UserError
from mmvit.evaluation.generator_report import Unseen, draw_worst_to_best, report_generator
from mmvit.evaluation.spaces import feature_space
from mmvit.evaluation.splits import read_split
from mmvit.hub import read_weights
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.generator import GeneratorTransformer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.sampling.generator import Generator
from mmvit.sampling.rerank import CaptionScorer

SMALL_MODEL = "--model.text_length 8 --model.core.width 32 --model.core.depth 1"
SHORT_RUN = "--train.steps 4 --train.batch_size 8 --train.num_workers 0 --train.evaluate_every 2"
SMALL = [*SMALL_MODEL.split(), "--model.core.num_heads=2", *SHORT_RUN.split(), "--train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_shards, run_script) -> Path:
    """A folder with an image tokenizer, codes made by it, and a config for them."""
    folder = tmp_path_factory.mktemp("pipelines")
    tokenizer = VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16)))
    tokenizer.save_pretrained(folder / "tokenizer")
    ran = run_script(
        "pipelines/encode_images.py",
        tiny_shards,
        folder / "codes",
        "--tokenizer",
        folder / "tokenizer",
        "--size",
        16,
    )
    assert ran.returncode == 0, ran.stderr
    root = Path(__file__).resolve().parent.parent
    (folder / "config.toml").write_text(
        f"""
        output = "{folder / "run"}"
        [data]
        train = "{folder}/codes/train-*.tar"
        held_out = "{folder}/codes/heldout-*.tar"
        image_tokenizer = "{folder}/tokenizer"
        text_tokenizer = "{root}/tokenizers/emoji-text"
        [samples]
        captions = ["red square"]
        """
    )
    return folder


@pytest.fixture(scope="module")
def run(place, run_script) -> Path:
    """A trained generator's run folder."""
    ran = run_script("pipelines/train_caption_to_image.py", place / "config.toml", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert "32 captions, 0 captions cut, 0 skipped" in ran.stdout
    return place / "run"


def refused(ran, *words: str) -> None:
    """The script ended with code 2 and a message of these words, without a traceback."""
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr


def test_code_shards_say_which_tokenizer_made_them(place):
    made = json.loads((place / "codes" / "dataset.json").read_text())["image_tokenizer"]
    assert made["grid"] == [2, 2]
    assert made["codebook_size"] == 16
    assert len(made["fingerprint"]) == 16


def test_a_run_leaves_models_curves_and_samples(run):
    for name in ("config.toml", "metrics.jsonl", "curves.png", "samples/step-000004.png"):
        assert (run / name).is_file(), name
    for part in ("model.safetensors", "text_tokenizer/tokenizer.json", "image_tokenizer/model.safetensors"):
        assert (run / "best" / part).is_file(), part
        assert (run / "last" / part).is_file(), part
    held_out = [
        line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "held_out"
    ]
    assert [line["step"] for line in held_out] == [2, 4]
    assert held_out[1]["image_loss"] < held_out[0]["image_loss"]


def test_evaluation_writes_figures_and_a_picture(run, tiny_shards, run_script, tmp_path):
    out = tmp_path / "sheet.png"
    ran = run_script("pipelines/evaluate.py", run, tiny_shards, "--split", "heldout", "--out", out)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((run / "evaluation-heldout.json").read_text())
    assert figures["captions"] == 8
    assert figures["candidates"] == 56
    assert 0 <= figures["retrieval@1"] <= figures["retrieval@5"] <= 1
    assert figures["held_out_loss_of_picture"] == pytest.approx(4 * figures["held_out_loss"])
    assert "frechet_distance_pixels-8x8" in figures
    assert out.is_file()
    generator = Generator.from_pretrained(run)  # what is not said is drawn as the run's samples are
    assert generator.defaults.temperature == figures["temperature"] == 0.7
    assert figures["guidance_scale"] == 1


def test_evaluation_by_a_clip_a_classifier_and_in_two_languages(run, tiny_shards, run_script, tmp_path):
    tokenizer = TextTokenizer.from_file(run / "best" / "text_tokenizer")
    core = TransformerConfig(width=16, depth=1, num_heads=1)
    image = ClassifierConfig(image_size=16, patch_size=8, num_classes=4, core=core)
    clip = CLIP(CLIPConfig(image=image, text=core, vocab_size=tokenizer.vocab_size))
    CaptionScorer(clip, tokenizer).save_pretrained(tmp_path / "clip")
    Classifier(image).save_pretrained(tmp_path / "classifier")
    arguments = (run, tiny_shards, "--split", "heldout", "--out", tmp_path / "sheet.png")
    more = (
        "--captioned",
        3,
        "--seeds",
        2,
        "--clip",
        tmp_path / "clip",
        "--classifier",
        tmp_path / "classifier",
    )
    ran = run_script("pipelines/evaluate.py", *arguments, *more, "--language", "en", "de")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((run / "evaluation-heldout.json").read_text())
    assert figures["languages"].keys() == {"en", "de"}
    assert figures["languages"]["en"]["held_out_loss"] == figures["held_out_loss"]
    assert figures["languages"]["de"]["held_out_loss"] != figures["held_out_loss"]
    assert -1 <= figures["clip_score"] <= 1
    assert figures["class_accuracy_of_real"] == 0.25  # its head is zero: all are of the first of four classes
    assert figures["with_class"] == 8
    assert figures["diversity"] > 0
    assert (figures["captioned"], figures["caption_candidates"]) == (
        3,
        4,
    )  # captions that are the same are one
    refused(run_script("pipelines/evaluate.py", *arguments, "--language", "xx"), "has no caption in xx")
    refused(run_script("pipelines/evaluate.py", *arguments, "--train", "trian"), "no shards", "trian-*.tar")
    refused(run_script("pipelines/evaluate.py", *arguments, "--scorer", "x"), "chooses among --candidates")
    refused(run_script("pipelines/evaluate.py", *arguments, "--captioned", -1), "-1: it is 0 or more")
    refused(run_script("pipelines/evaluate.py", *arguments, "--limit", 0), "--limit 0: it is 1 or more")


def test_a_part_of_a_split_is_spread_over_it(run, tiny_shards, run_script, tmp_path):
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    unseen = Unseen.of(read_split(tiny_shards, "train", CaptionSample()), real, [])
    part = unseen.spread(5)
    assert part.keys == [f"train-{number:03d}" for number in (0, 12, 24, 35, 47)]
    assert [unseen.captions[unseen.keys.index(key)] for key in part.keys] == part.captions
    assert torch.equal(part.pixels, unseen.pixels[[0, 12, 24, 35, 47]])
    assert unseen.spread(100).keys == unseen.keys
    out = tmp_path / "sheet.png"
    ran = run_script(
        "pipelines/evaluate.py", run, tiny_shards, "--split", "train", "--limit", 5, "--out", out
    )
    assert ran.returncode == 0, ran.stderr
    assert "of 5 captions of train" in ran.stdout


def test_a_part_of_a_split_is_chosen_by_its_keys(run, tiny_shards, run_script, tmp_path):
    arguments = (run, tiny_shards, "--split", "train", "--out", tmp_path / "sheet.png")
    ran = run_script("pipelines/evaluate.py", *arguments, "--keys", "n-0[01].$", "--limit", 8)
    assert ran.returncode == 0, ran.stderr
    assert "of 8 captions of train" in ran.stdout
    assert json.loads((run / "evaluation-train-8-of-keys.json").read_text())["keys"] == "n-0[01].$"
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    unseen = Unseen.of(read_split(tiny_shards, "train", CaptionSample()), real, [])
    part = unseen.matching("n-0[01].$")
    assert part.keys == [f"train-{number:03d}" for number in range(20)]
    assert torch.equal(part.pixels, unseen.pixels[:20])
    refused(run_script("pipelines/evaluate.py", *arguments, "--keys", "x9"), "'x9' is found in none of 48")
    refused(run_script("pipelines/evaluate.py", *arguments, "--keys", "("), "'(' is no regular expression")


def test_a_damaged_shard_is_counted_and_not_measured(run, place, tiny_shards, run_script, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    damaged = min(shards.glob("train-*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:20_000])
    (shards / "dataset.json").write_text('{"samples": {"train": 48}}')
    settings = ("--tokenizer", place / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", shards, tmp_path / "codes", *settings)
    assert ran.returncode == 0, ran.stderr
    kept = json.loads((tmp_path / "codes" / "dataset.json").read_text())["samples"]["train"]
    assert kept < 48
    assert f"{kept} of 48" in ran.stdout
    ran = run_script("pipelines/evaluate.py", run, shards, "--split", "heldout", "--out", tmp_path / "a.png")
    refused(ran, damaged.name, "would not compare")
    within = damaged / "codes"
    ran = run_script("pipelines/encode_images.py", tiny_shards, within, *settings)
    refused(ran, f"error: {within}", "Not a directory")


def test_copies_of_training_pictures_are_counted(run, tiny_shards):
    generator = Generator.from_pretrained(run)
    sample = PixelsSample((16, 16))
    real = read_split(tiny_shards, "*", sample)
    captions = read_split(tiny_shards, "heldout", CaptionSample())
    trained = read_split(tiny_shards, "train", sample)
    copied = generator.decode(generator.encode(trained["pixels"][:5]))
    noise = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    unseen = Unseen.of(captions, real, trained["keys"])
    with mock.patch.object(generator, "decode", return_value=torch.cat([copied, noise])):
        report = report_generator(generator, unseen, feature_space(None))
    assert report.figures["copies"] == 5
    assert [*report.copies] == unseen.keys[:5]
    for drawn, key in zip(copied, report.copies.values(), strict=True):
        twin = trained["pixels"][trained["keys"].index(key)].unsqueeze(0)
        torch.testing.assert_close(generator.decode(generator.encode(twin))[0], drawn)
    with mock.patch("mmvit.evaluation.generator_report.two_halves") as sheet:
        draw_worst_to_best(report, unseen, num_rows=4)
    labels = sheet.call_args.args[1]
    ranks = [int(label.partition("(rank ")[2].rstrip(", acopy)")) for label in labels]
    assert ranks == sorted((report.ranks + 1).tolist(), reverse=True)
    assert sum("a copy" in label for label in labels) == 5


def sheet_order(run_script, arguments) -> list[float]:
    """The PSNR that stands beside each picture of the sheet, in its order."""
    labels = []
    with (
        mock.patch(
            "mmvit.sampling.grids.labelled_grid",
            side_effect=lambda rows, names, *_, **__: labels.extend(names),
        ),
        mock.patch("mmvit.sampling.grids.side_by_side", return_value=Image.new("RGB", (1, 1))),
    ):
        assert run_script("pipelines/evaluate.py", *arguments).returncode == 0
    return [float(label.split()[-2]) for label in labels]


def test_evaluation_of_an_image_tokenizer_goes_from_worst_to_best(place, tiny_shards, run_script, tmp_path):
    out = tmp_path / "sheet.png"
    arguments = (place / "tokenizer", tiny_shards, "--split", "heldout", "--size", 16, "--out", out)
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["pictures"] == 8
    assert {
        "psnr",
        "ssim",
        "l1",
        "codes_in_use",
        "perplexity",
        "frechet_distance_pixels-8x8",
    } <= figures.keys()
    assert out.is_file()
    assert (tmp_path / "sheet-codes.png").is_file()
    order = sheet_order(run_script, arguments)
    assert len(order) == 8
    assert order == sorted(order)
    assert order[0] < order[-1]
    core = TransformerConfig(width=16, depth=1, num_heads=1)
    grey = Classifier(ClassifierConfig(image_size=8, patch_size=4, channels=1, core=core))
    grey.save_pretrained(tmp_path / "grey" / "best")
    ran = run_script("pipelines/evaluate.py", *arguments, "--features", tmp_path / "grey" / "best")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(out.with_suffix(".json").read_text())["frechet_distance_grey"] > 0
    ran = run_script("pipelines/evaluate.py", *arguments, "--size", 20)
    assert ran.returncode == 2
    assert "has a code for every 8x8 pixels; give sides that are multiples" in ran.stderr


def test_sampling_writes_a_grid_and_single_pictures(run, run_script, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("blue square\n\n赤リンゴ\n🍎\n", encoding="utf-8")
    ran = run_script(
        "pipelines/sample_images.py", "--model", run, "red square", "--captions-file", captions, "--num", 2,
        "--guidance-scale", 2, "--temperature", 0.9, "--top-k", 10, "--top-p", 0.95, "--seed", 5,
        "--out", tmp_path / "grid.png",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == [
        f"{i:03d}-{name}-seed{seed}.png"
        for i, name in enumerate(["red-square", "blue-square", "赤リンゴ", "1f34e"])
        for seed in (5, 6)
    ]


def test_pictures_drawn_in_parts_are_those_of_their_seeds(run, run_script, tmp_path):
    out = tmp_path / "many.png"
    arguments = ("--model", run, "red square", "--num", 66, "--seed", 3, "--out", out)
    ran = run_script("pipelines/sample_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "many").iterdir())) == 66
    generator = Generator.from_pretrained(run)
    for seed in (3, 66, 67, 68):  # the second part begins at 67
        with Image.open(tmp_path / "many" / f"000-red-square-seed{seed}.png") as picture:
            alone = generator.generate("red square", seed=seed)[0]
            assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1  # of 255: rounding


def test_codes_of_another_tokenizer_are_refused(place, run_script, tmp_path):
    VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16))).save_pretrained(
        tmp_path / "other"
    )
    ran = run_script(
        "pipelines/train_caption_to_image.py", place / "config.toml", *SMALL,
        "--data.image_tokenizer", tmp_path / "other", "--output", tmp_path / "run",
    )  # fmt: skip
    refused(ran, "fingerprint", "encode_images.py")


def test_a_run_leaves_captions_out_before_and_after_evaluations(place, run_script, tmp_path):
    shares, forward = [], GeneratorTransformer.forward

    def watched(model, captions, codes):
        if model.training:
            shares.append((captions == 0).all(1).double().mean().item())
        return forward(model, captions, codes)

    settings = ("--train.steps", 4, "--train.evaluate_every", 1, "--output", tmp_path / "run")
    for dropout, least, most in ((0.9, 0.5, 1), (0, 0, 0)):
        shares.clear()
        more = ("--model.caption_dropout", dropout, "--samples.guidance_scale", 1)
        with mock.patch.object(GeneratorTransformer, "forward", watched):
            ran = run_script(
                "pipelines/train_caption_to_image.py", place / "config.toml", *SMALL, *settings, *more
            )
        assert ran.returncode == 0, ran.stderr
        assert len(shares) == 4
        assert least <= min(shares) <= max(shares) <= most
        shutil.rmtree(tmp_path / "run")


def test_a_changed_architecture_cannot_resume(run, place, run_script):
    ran = run_script(
        "pipelines/train_caption_to_image.py",
        place / "config.toml",
        *SMALL,
        "--model.core.width",
        64,
        "--resume",
    )
    refused(ran, "model.core.width")


def test_a_trained_generator_is_trained_on(run, place, run_script, tmp_path):
    def train_on(*overrides):
        script, out = "pipelines/train_caption_to_image.py", tmp_path / "more"
        return run_script(script, recipe, "--start.model", start, "--output", out, *overrides)

    recipe, start = tmp_path / "more.toml", tmp_path / "start"
    text = (place / "config.toml").read_text()
    recipe.write_text(text[: text.index("[data]")] + "[train]\nsteps = 1\nbatch_size = 8\nnum_workers = 0\n"
        "[optimizer]\nlr = 1e-9\n" + text[text.index("[data]") :])  # fmt: skip
    Generator.from_pretrained(run).save_pretrained(start, torch.bfloat16)  # as one that is shipped
    refused(
        train_on("--model.core.depth", 3), "the trained weights are of another model: they have core.depth = "
    )
    refused(train_on("--model.positions", "none"), "they have positions = 'learned_2d', the recipe 'none'")
    refused(train_on("--start.core", run), "start.model brings its core")
    other = TextTokenizer.from_file(start / "text_tokenizer").tokenizer
    other.add_tokens(["squ"])
    (tmp_path / "text").mkdir()
    other.save(str(tmp_path / "text/tokenizer.json"))
    refused(train_on("--data.text_tokenizer", tmp_path / "text"), "tokenizer")
    ran = train_on(
        "--model.caption_dropout", 0.3, "--start.translate_from", "en", "--data.languages", '["en", "de"]'
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 tokens that no caption in en has begin as mixtures" in ran.stdout
    found, begun = (
        read_weights(tmp_path / "more/last/model.safetensors"),
        read_weights(start / "model.safetensors"),
    )
    texts = TextTokenizer.from_file(start / "text_tokenizer")
    (quadrat,), square = texts.tokenize("quadrat"), texts.tokenize("square")
    words = begun["text_embedding.weight"] = begun["text_embedding.weight"].float()
    assert torch.cosine_similarity(words[quadrat], words[square].mean(0), dim=0) < 0.5
    words[quadrat] = found["text_embedding.weight"][quadrat]
    assert torch.cosine_similarity(words[quadrat], words[square].mean(0), dim=0) > 0.9
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, begun[name].float(), atol=1e-6, rtol=0)
    assert GeneratorTransformer.from_pretrained(tmp_path / "more").config.caption_dropout == 0.3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.stepz", "3"], ["unknown key train.stepz", "did you mean train.steps"]),
        (["--samples.captions", "one"], ["samples.captions", 'a list is wanted, written ["one", "two"]']),
        (["--model.vocab_size", "77"], ["model.vocab_size is 77", "4096"]),
        (["--data.train", "nowhere/train-*.tar"], ["nowhere"]),
        (["--model.text_loss_weight", 1], ["text_loss_weight = 0", "or attention = 'causal'"]),
        (["--model.grid", "[4,4]"], ["model.grid is (4, 4), but the shards have (2, 2); leave it out"]),
        (["--model.attention", "dalle"], ["model.convolution is 11, but the shards have 2 columns of codes"]),
        (["--start.translate_from", "en"], ["start.translate_from is for a model", "set start.model"]),
        (["--data.text_tokenizer", "nowhere"], ["no text tokenizer at nowhere"]),
    ],
)
def test_mistakes_in_a_config_are_named(place, run_script, tmp_path, overrides, words):
    ran = run_script(
        "pipelines/train_caption_to_image.py",
        place / "config.toml",
        *SMALL,
        "--output",
        tmp_path / "run",
        *overrides,
    )
    refused(ran, *words)


def test_mistakes_in_sampling_are_named(run, run_script, tmp_path):
    def sample(model, *arguments):
        return run_script("pipelines/sample_images.py", "--model", model, *arguments)

    refused(sample(run), "no captions")
    refused(sample(tmp_path, "a"), "holds no model")
    refused(sample(run / "best" / "image_tokenizer", "a"), "holds a", "not a generator")
    refused(sample(run, "a", "--out", tmp_path / "a.txt"), ".png")
    refused(
        sample(run, "a", "--num", 200, "--out", "a.webp"), "200 pictures make a sheet of", "sides of 16,383"
    )
    refused(sample(run, "a", "--scorer", run), "holds a generator, not a CLIP")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(sample(run, "--captions-file", tmp_path / "latin.txt"), "not UTF-8")
    inside_a_file = tmp_path / "latin.txt" / "a.png"
    refused(sample(run, "a", "--out", inside_a_file), f"--out {inside_a_file}: cannot be written")
    (tmp_path / "folder.png").mkdir()
    refused(sample(run, "a", "--out", tmp_path / "folder.png"), "is a folder")
    (tmp_path / "taken").touch()
    refused(sample(run, "a", "--out", tmp_path / "taken.png"), "the folder", "cannot be made")


def test_encoding_refuses_what_it_cannot_do(place, tiny_shards, run_script, tmp_path):
    tokenizer = place / "tokenizer"
    script = "pipelines/encode_images.py"
    refused(run_script(script, tiny_shards, tiny_shards, "--tokenizer", tokenizer), "is the source itself")
    refused(
        run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 20), "multiples of 8"
    )
    refused(run_script(script, tmp_path / "none", tmp_path, "--tokenizer", tokenizer), "none")
    refused(run_script(script, tiny_shards, tmp_path, "--size", "64x"), "--size 64x: it is a side or")
    (tmp_path / "test-000000.tar").touch()
    no_codes = run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 16)
    refused(no_codes, f"{tmp_path} holds shards that are no codes of this script")
    (tmp_path / "dataset.json").write_text('{"image_tokenizer": {}}')
    refused(
        run_script(script, tiny_shards, tmp_path, "--tokenizer", tokenizer, "--size", 16), "shards of test"
    )


def test_a_sample_whose_codes_do_not_fit_is_named(place, run_script, tokenizer, tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("good", {"codes.npy": pack_codes(np.zeros((2, 2))), "txt": b"red"})
        writer.write("bad", {"codes.npy": pack_codes(np.full((2, 2), 16)), "txt": b"red"})
    stream = ShardStream(tmp_path, CaptionCodesSample(tokenizer, 8, (2, 2), 16), 1, shuffle_buffer=0)
    with pytest.raises(UserError, match=r"^bad in .*train-000000.tar: there is a code 16, the codebook"):
        list(itertools.islice(stream, 3))


def test_views_are_moved_and_flipped_where_the_caption_allows(
    place, tiny_shards, run_script, tokenizer, tmp_path
):
    out = tmp_path / "codes"
    arguments = (tiny_shards, out, "--tokenizer", place / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", *arguments, "--views", 3, "--flip-unless", "Red", "left")
    assert ran.returncode == 0, ran.stderr
    model = VQModel.from_pretrained(place / "tokenizer")
    shards = sorted(tiny_shards.glob("train-*.tar"))
    pictures = {sample.key: sample for shard in shards for sample in read_shard(shard)}
    moved = AugmentConfig(crop_padding=2)
    seen_flips = set()
    for sample in read_shard(next(out.glob("train-*0.tar"))):
        pixels, rng = decode_image(pictures[sample.key].files["png"], (16, 16)), random.Random(sample.key)
        views = unpack_codes(sample.files["views.npy"], (2, 2), 16, views=True)
        is_flipped = not sample.files["txt"].startswith(b"red")
        seen_flips.add(is_flipped)
        for view in range(3):
            flip = moved.model_copy(update={"flip": float(is_flipped and view == 1)})
            expected = to_unit_range(Augment(flip)(pixels, rng))
            codes = model.encode(torch.from_numpy(expected.copy())[None])
            assert torch.equal(codes[0], torch.from_numpy(views[view])), sample.key
    assert seen_flips == {True, False}
    (held_out,) = out.glob("heldout-*.tar")
    assert "views.npy" not in next(read_shard(held_out)).files

    sample = next(read_shard(next(out.glob("train-*0.tar"))))
    shape = (tokenizer, 8, (2, 2), 16)
    views = unpack_codes(sample.files["views.npy"], (2, 2), 16, views=True).reshape(3, 4).tolist()
    drawn = CaptionCodesSample(*shape, views=1.0)(sample, random.Random(0))["codes"].tolist()
    assert drawn in views
    plain = CaptionCodesSample(*shape)(sample, random.Random(0))["codes"].tolist()
    assert plain == unpack_codes(sample.files["codes.npy"], (2, 2), 16).reshape(-1).tolist()
    with pytest.raises(BadSample, match="no views"):
        CaptionCodesSample(*shape, views=1.0)(next(read_shard(held_out)), random.Random(0))


def test_codes_that_are_being_replaced_do_not_say_whose_they_are(place, tiny_shards, run_script, tmp_path):
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", place / "tokenizer", "--size", 16)
    assert run_script("pipelines/encode_images.py", *arguments).returncode == 0
    full = mock.patch("mmvit.data.codes.pack_codes", side_effect=OSError("the disk is full"))
    with full, pytest.raises(OSError, match="the disk is full"):
        run_script("pipelines/encode_images.py", *arguments)
    assert not (tmp_path / "codes/dataset.json").exists()


def test_a_generator_trains_on_a_foreign_tokenizer_of_another_grid(place, tiny_shards, run_script, tmp_path):
    config = VQGANConfig(
        codebook_size=16, code_width=4, latent_width=4, stem_width=8, widths=(8, 8, 8, 8), num_groups=4,
        encoder_attention=(), decoder_attention=(), blocks_per_level=1,
    )  # fmt: skip
    VQGAN(config).save_pretrained(tmp_path / "theirs")
    size = ("--size", "16x24")
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", tmp_path / "theirs", *size)
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    ran = run_script(
        "pipelines/train_caption_to_image.py", place / "config.toml", *SMALL,
        "--data.train", f"{tmp_path}/codes/train-*.tar", "--data.held_out", f"{tmp_path}/codes/heldout-*.tar",
        "--data.image_tokenizer", tmp_path / "theirs", "--output", tmp_path / "run",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    picture = Generator.from_pretrained(tmp_path / "run").generate(["red square"], seed=0)[0]
    assert picture.size == (24, 16)


def test_codes_of_the_discrete_vae_are_encoded_and_named(tiny_shards, run_script, tmp_path):
    config = DiscreteVAEConfig(codebook_size=16, width=8, blocks_per_group=1, code_width=4)
    DiscreteVAE(config).save_pretrained(tmp_path / "dvae")
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", tmp_path / "dvae", "--size", 16)
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / "codes" / "dataset.json").read_text())["image_tokenizer"]
    assert (made["grid"], made["codebook_size"], len(made["fingerprint"])) == ([2, 2], 16, 16)


def test_pictures_of_any_shape_are_encoded_and_the_shards_say_their_grid(
    place, tiny_shards, run_script, tmp_path
):
    arguments = (tiny_shards, tmp_path, "--tokenizer", place / "tokenizer", "--size", "16x40")
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "dataset.json").read_text())["image_tokenizer"]["grid"] == [2, 5]
    sample = next(iter(read_shard(tmp_path / "heldout-000000.tar")))
    assert unpack_codes(sample.files["codes.npy"], (2, 5), 16).shape == (2, 5)
