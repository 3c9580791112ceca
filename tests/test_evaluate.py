"""What `mmvit evaluate` measures of each kind of model on tiny data, and what it refuses."""

import itertools
import json
import shutil
from unittest import mock

import pytest
import torch
from generator_scripts import refused
from PIL import Image
from shard_scripts import contents

from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import TextTokenizer
from mmvit.data.samples import CaptionSample, PixelsSample, image_bytes
from mmvit.errors import UserError
from mmvit.evaluation.evaluate import evaluate
from mmvit.evaluation.frechet import FeatureSpace, feature_space, frechet_distance
from mmvit.evaluation.generator_report import draw_worst_to_best, measure_captions, report_generator
from mmvit.evaluation.held_out import HeldOut
from mmvit.evaluation.splits import find_split, read_split
from mmvit.evaluation.tokenizer_report import reconstruct
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.sampling.candidates import CaptionScorer
from mmvit.sampling.generator import Generator


def test_evaluation_writes_figures_and_an_image(generator_run, tiny_shards, run_script, tmp_path):
    out = tmp_path / "sheet.png"
    ran = run_script("pipelines/evaluate.py", generator_run, tiny_shards, "--split", "held-out", "--out", out)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((generator_run / "evaluation-held-out.json").read_text())
    assert figures["captions"] == 8
    assert figures["candidates"] == 56
    assert 0 <= figures["retrieval@1"] <= figures["retrieval@5"] <= 1
    assert figures["held_out_loss_of_image"] == pytest.approx(4 * figures["held_out_loss"])
    assert "frechet_distance_pixels-8x8" in figures
    assert out.is_file()
    generator = Generator.from_pretrained(generator_run)  # what is not said is drawn as the run's samples are
    assert generator.defaults.temperature == figures["temperature"] == 0.7
    assert figures["guidance_scale"] == 1


def test_evaluation_by_a_clip_a_classifier_and_in_two_languages(
    generator_run, tiny_shards, run_script, tmp_path
):
    tokenizer = TextTokenizer.from_file(generator_run / "best" / "text_tokenizer")
    core = TransformerConfig(width=16, depth=1, num_heads=1)
    image = ClassifierConfig(image_size=16, patch_size=8, num_classes=4, core=core)
    clip = CLIP(CLIPConfig(image=image, text=core, vocab_size=tokenizer.vocab_size))
    CaptionScorer(clip, tokenizer).save_pretrained(tmp_path / "clip")
    classifier = Classifier(image)
    arguments = (generator_run, tiny_shards, "--split", "held-out", "--out", tmp_path / "sheet.png")
    named = ("--classifier", classifier.save_pretrained(tmp_path / "classifier"))
    refused(run_script("pipelines/evaluate.py", *arguments, *named), "its head is all zeros")
    with torch.no_grad():
        classifier.head.weight[0, 0], classifier.head.bias[0] = 1e-9, 1
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "dataset.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    (tmp_path / "classifier" / "classes.json").write_text('["w", "x", "y", "z"]')
    other = run_script("pipelines/evaluate.py", *arguments, *named, "--classes", tmp_path / "classes")
    refused(other, "class 0 is 'w' to the classifier and 'a' in", "with the classes that it was trained on")
    (tmp_path / "classifier" / "classes.json").unlink()
    spaces = ("--clip", tmp_path / "clip", "--classifier", tmp_path / "classifier")
    more = ("--captioned", 3, "--seeds", 2, *spaces)
    ran = run_script("pipelines/evaluate.py", *arguments, *more, "--language", "en,de")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((generator_run / "evaluation-held-out.json").read_text())
    assert figures["languages"].keys() == {"en", "de"}
    assert figures["languages"]["en"]["held_out_loss"] == figures["held_out_loss"]
    assert figures["languages"]["de"]["held_out_loss"] != figures["held_out_loss"]
    assert -1 <= figures["clip_score"] <= 1
    assert figures["class_accuracy_of_real"] == 0.25  # all are of the first of four classes
    assert figures["with_class"] == 8
    assert figures["diversity"] > 0
    assert figures["captioned"] == 3
    assert figures["caption_candidates"] == 4  # captions that are the same are one
    for language in ("xx", "en,xx"):
        with mock.patch("mmvit.evaluation.generator_report.draw_all", side_effect=AssertionError("too late")):
            ran = run_script("pipelines/evaluate.py", *arguments, "--language", language)
        refused(ran, "has no caption in xx")
    refused(
        run_script("pipelines/evaluate.py", *arguments, "--train", "trian"),
        "has no split 'trian': did you mean train?",
    )
    refused(run_script("pipelines/evaluate.py", *arguments, "--scorer", "x"), "chooses among candidates")
    refused(
        run_script("pipelines/evaluate.py", *arguments, "--captioned", -1),
        "--captioned must be at least 0, got -1",
    )
    refused(
        run_script("pipelines/evaluate.py", *arguments, "--limit", 0), "--limit must be at least 1, got 0"
    )


def test_options_of_the_command_reach_the_drawing(generator_run, tiny_shards, run_script, tmp_path):
    options = {
        "guidance_scale": 2.0,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 5,
        "candidates": 2,
    }
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    with mock.patch(
        "mmvit.evaluation.generator_report.report_generator", side_effect=UserError("far enough")
    ) as report:
        arguments = (generator_run, tiny_shards, "--limit", 3, "--seeds", 2, "--out", tmp_path / "sheet.png")
        refused(run_script("pipelines/evaluate.py", *arguments, *given), "far enough")
    assert len(report.call_args.args[1].keys) == 3
    passed = report.call_args.kwargs
    assert {name: passed[name] for name in (*options, "seeds")} == {**options, "seeds": 2}


def test_a_part_of_a_split_is_spread_over_it(generator_run, tiny_shards, run_script, tmp_path):
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    held_out = HeldOut.of(read_split(tiny_shards, "train", CaptionSample()), real, [])
    part = held_out.spread(5)
    assert part.keys == [f"train-{number:03d}" for number in (0, 12, 24, 35, 47)]
    assert [held_out.captions[held_out.keys.index(key)] for key in part.keys] == part.captions
    assert torch.equal(part.pixels, held_out.pixels[[0, 12, 24, 35, 47]])
    assert held_out.spread(100).keys == held_out.keys
    out = tmp_path / "sheet.png"
    ran = run_script(
        "pipelines/evaluate.py", generator_run, tiny_shards, "--split", "train", "--limit", 5, "--out", out
    )
    assert ran.returncode == 0, ran.stderr
    assert "of 5 captions find their own image among 56" in ran.stdout


def test_images_of_one_key_are_refused(tiny_shards):
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    twice = {**real, "keys": ["000000", "000000", *real["keys"][2:]]}
    with pytest.raises(UserError, match="several images have the key 000000, perhaps in different splits"):
        HeldOut.of(read_split(tiny_shards, "held-out", CaptionSample()), twice, [])


def test_a_split_is_not_another_whose_name_begins_so(tiny_shards, tmp_path):
    shutil.copy(tiny_shards / "held-out-000000.tar", tmp_path / "held-out-000000.tar")
    shutil.copy(tiny_shards / "train-000000.tar", tmp_path / "held-out-hard-000000.tar")
    assert len(read_split(tmp_path, "held-out", CaptionSample())["keys"]) == 8
    assert len(read_split(tmp_path, "held-out-hard", CaptionSample())["keys"]) == 10
    assert len(read_split(tmp_path, "*", CaptionSample())["keys"]) == 18
    (tmp_path / "held-out-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"no shards of held-out in .*, only of splits whose names begin with it"
    ):
        read_split(tmp_path, "held-out", CaptionSample())


def test_captions_of_the_same_tokens_are_one(generator_run, tiny_shards):
    generator = Generator.from_pretrained(generator_run)
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    held_out = HeldOut.of(read_split(tiny_shards, "held-out", CaptionSample()), real, [])
    figures = measure_captions(generator, held_out, 8, held_out.captions)
    shouted = [caption.upper() for caption in held_out.captions]
    assert figures["caption_candidates"] == 4
    assert measure_captions(generator, held_out, 8, shouted) == figures
    assert figures["caption@5"] == 1


def test_a_part_of_a_split_is_chosen_by_its_keys(generator_run, tiny_shards, run_script, tmp_path):
    arguments = (generator_run, tiny_shards, "--split", "train", "--out", tmp_path / "sheet.png")
    ran = run_script("pipelines/evaluate.py", *arguments, "--keys", "n-0[01].$", "--limit", 8)
    assert ran.returncode == 0, ran.stderr
    assert "of 8 captions find their own image among 56" in ran.stdout
    assert json.loads((generator_run / "evaluation-train-8-of-keys.json").read_text())["keys"] == "n-0[01].$"
    real = read_split(tiny_shards, "*", PixelsSample((16, 16)))
    held_out = HeldOut.of(read_split(tiny_shards, "train", CaptionSample()), real, [])
    part = held_out.matching("n-0[01].$")
    assert part.keys == [f"train-{number:03d}" for number in range(20)]
    assert torch.equal(part.pixels, held_out.pixels[:20])
    refused(run_script("pipelines/evaluate.py", *arguments, "--keys", "x9"), "'x9' matches none of 48 keys")
    refused(run_script("pipelines/evaluate.py", *arguments, "--keys", "("), "'(' is not a regular expression")


def test_a_damaged_shard_is_counted_and_not_measured(
    generator_run, encoded, tiny_shards, run_script, tmp_path
):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    damaged = min(shards.glob("train-*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:20_000])
    (shards / "dataset.json").write_text('{"samples": {"train": 48}}')
    settings = ("--tokenizer", encoded / "tokenizer", "--size", 16)
    ran = run_script("pipelines/encode_images.py", shards, tmp_path / "codes", *settings)
    assert ran.returncode == 0, ran.stderr
    kept = json.loads((tmp_path / "codes" / "dataset.json").read_text())["samples"]["train"]
    assert kept < 48
    assert f"{kept} of 48" in ran.stdout
    ran = run_script(
        "pipelines/evaluate.py", generator_run, shards, "--split", "held-out", "--out", tmp_path / "a.png"
    )
    refused(ran, damaged.name, "would not compare")
    shutil.copytree(encoded / "codes", tmp_path / "whole")
    before = contents(tmp_path / "whole")
    ran = run_script("pipelines/encode_images.py", shards, tmp_path / "whole", *settings)
    refused(ran, damaged.name, "encoding again would leave fewer codes")
    assert contents(tmp_path / "whole") == before
    within = damaged / "codes"
    ran = run_script("pipelines/encode_images.py", tiny_shards, within, *settings)
    refused(ran, f"the folder {within}: ", "Not a directory")


def test_a_few_captions_need_no_reconstruction_of_the_training_images(generator_run, tiny_shards):
    whole = evaluate(generator_run, tiny_shards)
    for options, decoded in (({}, [2]), ({"train": "train"}, [2, 48])):
        with mock.patch(
            "mmvit.evaluation.generator_report.reconstruct", side_effect=reconstruct
        ) as reconstructed:
            figures = evaluate(generator_run, tiny_shards, limit=2, **options)
        assert [len(call.args[1]) for call in reconstructed.call_args_list] == decoded
        assert ("copies" in figures) == ("train" in options)
        assert figures["candidates"] == whole["candidates"] == 56
        assert figures.keys() <= whole.keys()


def test_of_a_large_data_set_a_stated_sample_is_in_memory(generator_run, tiny_shards, mmvit_command):
    """Its reconstructions, and so its copies, are of the sample; the captions' own images always belong."""
    arguments = (tiny_shards, "--sample", 14, "--limit", 3, "--train", "train")
    with mock.patch("mmvit.evaluation.generator_report.report_generator", wraps=report_generator) as measured:
        ran = mmvit_command("evaluate", generator_run, *arguments, "--out", generator_run / "sheet.png")
    assert ran.returncode == 0, ran.stderr
    held_out = measured.call_args.args[1]
    assert held_out.keys == ["held-out-000", "held-out-004", "held-out-007"]
    real = read_split(tiny_shards, "held-out", PixelsSample((16, 16)))["pixels"]
    assert torch.equal(held_out.pixels, real[[0, 4, 7]])
    spread = torch.linspace(0, 55, 14).round().long().tolist()
    assert held_out.trained_keys == [f"train-{place - 8:03d}" for place in spread if place >= 8]
    figures = json.loads((generator_run / "evaluation-held-out-3.json").read_text())
    assert (
        figures["candidates"] == len(held_out.everything) == 15
    )  # two of the three are in the sample anyway
    assert (figures["copies_among"], figures["images_of_data"]) == (12, 56)
    assert "of 3 captions find their own image among 15 (a sample of 56)" in ran.stdout
    with mock.patch("mmvit.data.samples.image_bytes", side_effect=image_bytes) as decoded:
        read_split(tiny_shards, "train", PixelsSample((16, 16)), most=5)
    numbers = [int(call.args[0].key.removeprefix("train-")) for call in decoded.call_args_list]
    assert numbers == [0, 12, 24, 35, 47]
    with pytest.raises(UserError, match="--sample must be at least 1, got 0"):
        evaluate(generator_run, tiny_shards, sample=0)


def test_copies_of_training_images_are_counted(generator_run, tiny_shards):
    generator = Generator.from_pretrained(generator_run)
    sample = PixelsSample((16, 16))
    real = read_split(tiny_shards, "*", sample)
    captions = read_split(tiny_shards, "held-out", CaptionSample())
    trained = read_split(tiny_shards, "train", sample)
    copied = generator.decode(generator.encode(trained["pixels"][:5]))
    noise = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    held_out = HeldOut.of(captions, real, trained["keys"])
    with mock.patch.object(generator, "decode", return_value=torch.cat([copied, noise])):
        report = report_generator(generator, held_out, feature_space(None))
    with mock.patch.object(generator, "decode", return_value=copied[:1].repeat(8, 1, 1, 1)):
        assert report_generator(generator, held_out, feature_space(None)).copies == {}
    assert report.figures["copies"] == 5
    assert [*report.copies] == held_out.keys[:5]
    for drawn, key in zip(copied, report.copies.values(), strict=True):
        twin = trained["pixels"][trained["keys"].index(key)].unsqueeze(0)
        torch.testing.assert_close(generator.decode(generator.encode(twin))[0], drawn)
    with mock.patch("mmvit.evaluation.generator_report.two_halves") as sheet:
        draw_worst_to_best(report, held_out, num_rows=4)
    labels = sheet.call_args.args[1]
    ranks = [int(label.partition("(rank ")[2].rstrip(", acopy)")) for label in labels]
    assert ranks == sorted((report.ranks + 1).tolist(), reverse=True)
    assert sum("a copy" in label for label in labels) == 5


COLOURS = torch.tensor(
    [[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1], [1, -1, 1], [1, 1, 1]]
)


class FirstChannels(torch.nn.Module):
    """A classifier, and a CLIP, that see nothing but the mean colour."""

    config = ClassifierConfig(image_size=4, patch_size=2, num_classes=3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self(pixels), dim=1)

    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack([COLOURS[int(each)] for each in captions]), dim=1)


def test_figures_are_of_what_was_generated_not_of_real_images_or_reconstructions():
    """Of three captions one is drawn right, the tokenizer loses another, and each figure knows which."""
    everything = COLOURS[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    held_out = HeldOut(
        keys=["0", "1", "2"], captions=["0", "1", "2"], everything=everything, own=torch.arange(3),
        trained=torch.arange(3, 7), trained_keys=["3", "4", "5", "6"],
    )  # fmt: skip
    generated, reconstructed = everything[[0, 3, 4]], everything[[0, 1, 5]]
    # 0.018 and 0.022 from training images, and not at all
    generated = generated + torch.tensor([0.0, 0.036, 0.044])[:, None, None, None]
    tokenizer = mock.Mock(encode_many=lambda pixels: pixels, decode_many=lambda pixels: pixels)
    with (
        mock.patch("mmvit.evaluation.generator_report.draw_all", return_value=generated),
        mock.patch("mmvit.evaluation.generator_report.held_out_loss", return_value=0.5),
        mock.patch(
            "mmvit.evaluation.generator_report.reconstruct",
            side_effect=lambda _, pixels, what: (pixels, pixels if "training" in what else reconstructed),
        ),
    ):
        report = report_generator(
            mock.Mock(image_tokenizer=tokenizer), held_out,
            FeatureSpace("mean", lambda each: each.mean((2, 3))),
            clip=FirstChannels(), classifier=FirstChannels(), labels={"0": 0, "1": 1, "2": 2},
        )  # fmt: skip
    figures, real = report.figures, held_out.pixels
    assert figures["retrieval@1"] == pytest.approx(1 / 3)
    assert figures["reconstruction_retrieval@1"] == pytest.approx(2 / 3)
    distances = [
        frechet_distance(real.mean((2, 3)), each.mean((2, 3))) for each in (generated, reconstructed)
    ]
    assert figures["frechet_distance_mean"] == pytest.approx(distances[0])
    assert figures["reconstruction_frechet_distance_mean"] == pytest.approx(distances[1])
    assert distances[0] != pytest.approx(distances[1])
    assert figures["copies"] == 1
    assert report.copies == {"1": "3"}
    assert figures["copies_among_reconstructions"] == 1  # the tokenizer confuses image 2 with image 5
    cosines = (FirstChannels().embed_images(generated) * FirstChannels().embed_captions("012")).sum(1)
    assert figures["clip_score"] == pytest.approx(cosines.mean().item())
    assert figures["clip_score"] < 0.8
    assert figures["clip_score_of_real"] == pytest.approx(1)
    assert figures["clip_retrieval@1"] == pytest.approx(1 / 3)
    assert figures["class_accuracy"] == pytest.approx(1 / 3)
    assert figures["class_accuracy_of_real"] == 1
    assert torch.equal(report.generated, generated)
    assert torch.equal(report.reconstructed, reconstructed)


def sheet_order(run_script, arguments) -> list[float]:
    """The PSNR beside each image of the sheet, in order."""
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


def test_evaluation_of_an_image_tokenizer_goes_from_worst_to_best(
    encoded, tiny_shards, run_script, tmp_path, monkeypatch
):
    out = tmp_path / "sheet.png"
    arguments = (encoded / "tokenizer", tiny_shards, "--split", "held-out", "--size", 16, "--out", out)
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["images"] == 8
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
    monkeypatch.setattr("mmvit.evaluation.tokenizer_report.draw_code_use", lambda *_: None)  # once is enough
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
    assert "--size 20x20: both sides must be multiples of 8" in ran.stderr
    run = tmp_path / "run"
    shutil.copytree(encoded / "tokenizer", run / "best")
    (run / "config.toml").write_text("[data]\nimage_size = [16, 24]\n")
    for model, size in ((run, [16, 24]), (run / "best", [16, 24]), (encoded / "tokenizer", [64, 64])):
        assert evaluate(model, tiny_shards, limit=2)["image_size"] == size


def test_the_held_out_split_of_the_data_is_measured_by_default(tiny_shards, tmp_path):
    assert find_split(tiny_shards) == "held-out"
    with pytest.raises(UserError, match="has no split 'held-uot': did you mean held-out"):
        find_split(tiny_shards, "held-uot")
    for split in ("train", "new", "val"):
        shutil.copy(tiny_shards / "train-000000.tar", tmp_path / f"{split}-000000.tar")
    assert find_split(tmp_path) == "val"
    shutil.copy(tiny_shards / "train-000000.tar", tmp_path / "heldout-000000.tar")
    assert find_split(tmp_path) == "heldout"  # as shards were named before
    assert find_split(tmp_path, "held-out") == "held-out"
    assert find_split(tmp_path, "new") == "new"
    for split in ("val", "heldout"):
        (tmp_path / f"{split}-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"has no held-out split \(combinations, .*\), only new, train: choose one"
    ):
        find_split(tmp_path)


def test_from_python_it_returns_figures_and_writes_nothing(generator_run, tiny_shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(generator_run, run)
    (run / "config.toml").write_text('[train]\nselect = "last"')
    before = sorted(tmp_path.rglob("*"))
    figures = evaluate(run, tiny_shards, limit=2)
    assert figures["captions"] == 2
    assert figures["split"] == "held-out"
    assert sorted(tmp_path.rglob("*")) == before
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"evaluating {run / 'last'} (a generator) on held-out of {tiny_shards}"


def test_options_from_python_are_plain_values(encoded, tiny_shards, tmp_path):
    tokenizer = str(encoded / "tokenizer")
    core = TransformerConfig(width=16, depth=1, num_heads=1)
    space = Classifier(ClassifierConfig(image_size=8, patch_size=4, core=core)).save_pretrained(
        tmp_path / "space"
    )
    figures = evaluate(tokenizer, str(tiny_shards), size=16, features=str(space))
    assert figures["frechet_distance_space"] > 0
    assert figures["psnr"] == evaluate(tokenizer, tiny_shards, "held-out", size=(16, 16))["psnr"]


def test_options_of_another_kind_of_model_are_refused(
    generator_run, encoded, tiny_shards, run_script, tmp_path
):
    out = tmp_path / "new" / "sheet.png"
    arguments = ("pipelines/evaluate.py", encoded / "tokenizer", tiny_shards, "--out", out)
    refused(
        run_script(*arguments, "--captioned", 3), "--captioned does not apply", "holds an image tokenizer"
    )
    refused(run_script(*arguments, "--as", "classifier"), "--as classifier chooses a part of a joint model")
    refused(run_script(*arguments, "--size", "x"), "--size: expected a side or HEIGHTxWIDTH")
    refused(run_script(*arguments, "--split", "none"), "has no split 'none': choose from")
    assert not out.parent.exists()
    (tmp_path / "file").touch()
    within = tmp_path / "file" / "sheet.png"
    refused(run_script(*arguments[:-1], within), f"{within} cannot be written: Not a directory")
    with pytest.raises(UserError, match="unknown option captoined: did you mean captioned"):
        evaluate(generator_run, tiny_shards, captoined=3)


def test_what_takes_long_shows_how_far_it_is(generator_run, tiny_shards, capsys):
    ticks = itertools.count(step=6)
    with mock.patch("mmvit.progress.time.monotonic", side_effect=lambda: next(ticks)):
        evaluate(generator_run, tiny_shards, captioned=2, seeds=2, language="en,de")
    shown = capsys.readouterr().out
    for what in (
        "reading all splits: 56", "reading held-out: 8", "reconstructing images: 8 of 8",
        "reconstructing training images: 48 of 48", "generating images: 8 of 8", "measuring the loss: 8 of 8",
        "generating 2 images of each caption: 8 of 8", "searching captions of images: 1 of 2",
        "comparing with real images: 56 of 56", "comparing with training images: 48 of 48",
        "language 2 of 2: de",
    ):  # fmt: skip
        assert what in shown
