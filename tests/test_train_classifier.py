"""The classifier trained on tiny data by its script: resuming, mistakes, and what evaluations skip; and what
every script that reads images trains and evaluates on."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from mmvit.config import build_config
from mmvit.data.augment import AugmentConfig
from mmvit.places import load_script
from mmvit.recipes.tasks import TASKS, recipe_class
from mmvit.streams.paired import PairedStream
from mmvit.training import open_session

CORE = {"width": 16, "depth": 1, "num_heads": 2}
IMAGES = {"kind": "vit", "image_size": 16, "patch_size": 8, "num_classes": 4, "core": CORE}
MODELS = {
    "classifier": IMAGES,
    "pretraining": IMAGES,
    "clip": {"image": IMAGES, "text": CORE, "vocab_size": 4096},
    "image-tokenizer": {"kind": "vq", "codebook_size": 16, "encoder_width": 16, "decoder_widths": [16, 8]},
    "joint": {
        "classification_weight": 3,
        "core": CORE,
        "classifier": IMAGES,
        "generator": {"codebook_size": 16, "grid": [2, 2]},
    },
}


def classifier_recipe(run: Path, shards: Path, held_out: Path | None = None) -> str:
    """A recipe of three steps of a tiny classifier."""
    return f"""
output = "{run}"
data = {{train = "{shards}/train-*.tar", held_out = "{held_out or shards / "held-out-*.tar"}"}}
model = {{image_size = 16, patch_size = 8, num_classes = 4, core = {{width = 16, depth = 1, num_heads = 2}}}}
train = {{steps = 3, batch_size = 8, log_every = 1}}
"""


def test_classifier_script_trains_resumes_and_reports_mistakes(tmp_path, tiny_shards, run_script):
    config = tmp_path / "config.toml"
    config.write_text(classifier_recipe(tmp_path / "run", tiny_shards))
    script = "pipelines/train_classifier.py"
    first = run_script(script, config)
    assert first.returncode == 0, first.stderr
    assert "step 3/3  held-out  loss" in first.stdout
    more = run_script(script, tmp_path / "run" / "config.toml", "--resume", "--train.steps", 4)
    assert more.returncode == 0, more.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 4]
    assert "resuming at step 3 of 4; train.steps was 3 and is now 4\n" in more.stdout
    before = (tmp_path / "run" / "config.toml").read_text()
    other = run_script(script, config, "--resume", "--model.patch_size", 4)
    assert other.returncode == 2
    assert "model.patch_size was 8 and is now 4" in other.stderr
    assert (tmp_path / "run" / "config.toml").read_text() == before
    again = run_script(script, config)
    assert again.returncode == 2
    assert "is not empty: add --resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_evaluations_skip_is_counted_at_the_end(tmp_path, tiny_shards, run_script):
    shard = tmp_path / "held-out-000000.tar"
    shard.write_bytes((tiny_shards / "held-out-000000.tar").read_bytes()[:-15_000])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(classifier_recipe(tmp_path / "run", tiny_shards, held_out=shard))
    plain = ("--train.num_workers", 0, "--train.precision", "fp32")
    ran = run_script("pipelines/train_classifier.py", recipe, *plain)
    assert ran.returncode == 0, ran.stderr
    assert "3 steps of 8 samples in float32, a line every 1\n" in ran.stdout
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("all evaluations: ")]
    assert f"0 skipped, and parts of 1 broken shard, the first: {shard} is truncated" in line


@pytest.mark.parametrize("task", MODELS)
def test_training_images_are_augmented_and_held_out_ones_are_not(task, tiny_shards, encoded, tmp_path):
    augment = AugmentConfig(crop_padding=2, flip=0.5)
    data = {split: f"{tiny_shards}/{split.replace('_', '-')}-*.tar" for split in ("train", "held_out")}
    data["augment"] = augment.model_dump()
    values = {"output": str(tmp_path / "run"), "data": data, "model": MODELS[task]}
    if task == "pretraining":
        values["method"] = "masked_patches"
    if task == "classifier":
        data["mixing"] = {"mixup": 1.0}
    if task == "image-tokenizer":
        data["image_size"] = 16
    if task == "clip":
        data["bpe_dropout"] = 0.5
    if task == "joint":
        codes = {
            split: data[split].replace(str(tiny_shards), f"{encoded}/codes")
            for split in ("train", "held_out")
        }
        values |= {
            "classes": values.pop("data"),
            "captions": {**codes, "image_tokenizer": f"{encoded}/tokenizer"},
        }
    script = load_script(TASKS[task].script)
    recipe = build_config(recipe_class(task, ""), values, "recipe")
    with mock.patch.object(script, "train") as train, open_session(recipe) as session:
        script.train_session(session)
        stream = train.call_args.args[2]
        trained_on = (stream.streams[0] if isinstance(stream, PairedStream) else stream).settings["decode"]
        held_out = [each.settings["decode"] for each in session.evaluated]
    assert trained_on.augment.config == augment
    assert held_out
    for decode in held_out:
        if hasattr(decode, "augment"):  # images
            assert decode.augment.config == AugmentConfig()
    if task == "classifier":
        batch = {"pixels": torch.zeros(8, 3, 16, 16), "labels": torch.arange(8) % 4}
        assert train.call_args.kwargs["prepare"](batch)["labels"].shape == (8, 4)  # shares
    if task == "clip":
        assert (trained_on.dropout, held_out[0].dropout) == (0.5, 0.0)
    if task == "joint":
        _, model, _, evaluate = train.call_args.args
        assert model.generator.image_head.weight.any()  # it begins with the codebook
        found = evaluate(model.eval())
        assert found["loss"] == pytest.approx(3 * found["classification_loss"] + found["generation_loss"])
