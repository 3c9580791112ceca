"""tokenizers/train_image_tokenizer.py: a run, its resumption, and the user's mistakes."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmvit.core.transformer import TransformerConfig
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.registry import load_image_tokenizer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.places import load_script
from mmvit.training.checkpoint import read_state

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"codebook_size": 16, "encoder_width": 16, "decoder_widths": (16, 8)}  # the recipe's model


@pytest.fixture
def recipe(tmp_path, tiny_shards) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        output = "{tmp_path / "run"}"
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = ["{tiny_shards}/held-out-*.tar"]
        image_size = [16, 16]
        [model]
        codebook_size = 16
        encoder_width = 16
        decoder_widths = [16, 8]
        [train]
        steps = 6
        batch_size = 8
        num_workers = 0
        precision = "fp32"
        ema_decay = 0.9
        log_every = 1
        evaluate_every = 6
        checkpoint_every = 3
        """
    )
    return path


@pytest.fixture
def train_tokenizer(run_script, recipe):
    return lambda *arguments: run_script("tokenizers/train_image_tokenizer.py", recipe, *arguments)


def comparable(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_s")} for record in records]


def test_the_script_trains_evaluates_and_exports(run_script, recipe, tmp_path):
    ran = run_script("tokenizers/train_image_tokenizer.py", recipe, "--train.num_workers", 1)
    assert ran.returncode == 0, ran.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"psnr", "psnr_of_mean_error", "codes_in_use", "perplexity"} <= last.keys()
    assert Image.open(tmp_path / "run" / "codes.png").width > 100
    assert Image.open(tmp_path / "run" / "previews" / "step-000006.png").width > 8 * 96
    model = VQModel.from_pretrained(tmp_path / "run")
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 2)


def test_the_discrete_vae_is_trained_by_the_same_script(run_script, recipe, tmp_path):
    dvae = "{kind = 'dvae', codebook_size = 16, width = 8, blocks_per_group = 1, code_width = 4, "
    dvae += "start_images = 5}"
    text = re.sub(r"\[model\].*?\[train\]", "[train]", recipe.read_text(), flags=re.DOTALL)
    recipe.write_text(text)
    with mock.patch.object(
        DiscreteVAE, "start_codes", autospec=True, side_effect=DiscreteVAE.start_codes
    ) as start:
        ran = run_script("tokenizers/train_image_tokenizer.py", recipe, "--model", dvae)
    assert ran.returncode == 0, ran.stderr
    assert [call.args[1].shape for call in start.call_args_list] == [(5, 3, 16, 16)]
    model = load_image_tokenizer(tmp_path / "run")
    assert model.kind == "dvae"
    assert model.passes == 6
    records = [record for record in comparable(tmp_path / "run") if record["kind"] == "train"]
    assert {"nll", "kl", "kl_weight", "temperature", "perplexity"} <= records[-1].keys()


def test_a_collapse_is_told_while_it_happens(run_script, recipe):
    script = load_script("tokenizers/train_image_tokenizer.py")
    cases = {(0.1,): False, (0.3, 0.31): True, (0.3, 0.45): False, (1.0, 0.6): True, (0.6, 0.5): False}
    for history, expected in cases.items():
        assert script.is_collapsing(list(history)) is expected, history
    with (
        mock.patch.object(script, "draw_code_use"),
        mock.patch.object(script, "use_metrics", side_effect=[{"codes_in_use": 0.9}, {"codes_in_use": 0.2}]),
    ):
        command = ("tokenizers/train_image_tokenizer.py", recipe)
        assert run_script(*command, "--train.steps", 3).returncode == 0
        ran = run_script(*command, "--train.steps", 6, "--resume")  # what was before is not forgotten
    assert ran.returncode == 0, ran.stderr
    told = "only 20% of the codes are in use over the training images, after 90% at the last evaluation"
    assert told in " ".join((ran.stdout + ran.stderr).split())


def test_a_data_set_without_a_held_out_picture_is_named(run_script, recipe, tmp_path):
    tarfile.open(tmp_path / "empty-000000.tar", "w").close()
    arguments = ("--data.held_out", f"{tmp_path}/empty-*.tar")
    ran = run_script("tokenizers/train_image_tokenizer.py", recipe, *arguments)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "empty-*.tar" in ran.stderr


@pytest.mark.parametrize("quantizer", ["vq", "simvq", "fsq"])
def test_a_loss_that_is_no_number_names_the_batch_whatever_the_quantizer(
    train_tokenizer, quantizer, monkeypatch
):
    monkeypatch.setattr(
        "mmvit.data.samples.to_unit_range", lambda pixels: pixels.transpose(2, 0, 1) * np.float32("nan")
    )
    ran = train_tokenizer("--model.quantizer", quantizer, "--model.levels", "[4,4]")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert re.search(r"step 1: the loss is nan in the batch of train-\d+", ran.stderr)


def test_a_run_with_all_losses_resumes_bit_for_bit_and_exports_the_tokenizer_alone(
    tmp_path, train_tokenizer, assert_same_state, thin_vgg16
):
    core = TransformerConfig(width=16, depth=2, num_heads=2)
    classifier = Classifier(ClassifierConfig(image_size=8, patch_size=8, core=core))
    classifier.save_pretrained(tmp_path / "classifier")
    torch.save(thin_vgg16, tmp_path / "vgg16.pth")
    settings = {
        "adversarial_weight": 0.5,
        "adversarial_adaptive": "true",
        "discriminator_start": 2,
        "adversarial_start": 4,
        "discriminator_width": 8,
        "discriminator_layers": 2,
        "perceptual": tmp_path / "classifier",
        "lpips": tmp_path / "vgg16.pth",
    }
    losses = [part for key, value in settings.items() for part in (f"--loss.{key}", value)]
    ran = train_tokenizer(*losses)
    assert ran.returncode == 0, ran.stderr
    whole, crashed = tmp_path / "run", tmp_path / "crashed"
    shutil.copytree(whole, crashed)
    shutil.rmtree(crashed / "checkpoints" / "step-00000006")
    ran = train_tokenizer(*losses, "--output", crashed, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "resuming at step 3 of 6" in ran.stdout

    final = "checkpoints/step-00000006"
    models = [f"{final}/{name}" for name in ("model", "average", "moments")] + ["best/model", "last/model"]
    for name in models:
        assert_same_state(*(load_file(run / f"{name}.safetensors") for run in (whole, crashed)))
    assert_same_state(*(read_state(run / final / "training.pt") for run in (whole, crashed)))
    assert comparable(whole) == comparable(crashed)

    records = [record for record in comparable(whole) if record["kind"] == "train"]
    assert ["discriminator" in record for record in records] == [False] * 2 + [True] * 4
    assert ["adaptive_weight" in record for record in records] == [False] * 4 + [True] * 2
    assert all(record["perceptual"] > 0 for record in records)
    assert load_file(whole / final / "model.safetensors")["passes"] == 6
    tokenizer = VQModel(VQConfig(**SMALL, kind="vq"))
    for folder in ("best", "last"):
        loaded = load_image_tokenizer(whole / folder)
        assert loaded.state_dict().keys() == tokenizer.state_dict().keys()
    averaged = load_file(whole / final / "average.safetensors")
    assert torch.equal(loaded.last_weight, averaged["tokenizer.decoder.head.weight"])


def test_by_default_the_plain_tokenizer_is_trained(tmp_path, train_tokenizer):
    ran = train_tokenizer("--train.steps", 1)
    assert ran.returncode == 0, ran.stderr
    weights = load_file(tmp_path / "run/checkpoints/step-00000001/model.safetensors")
    assert weights.keys() == VQModel(VQConfig(**SMALL)).state_dict().keys()
    (record, _) = comparable(tmp_path / "run")
    assert record["loss"] == pytest.approx(record["l1"] + record["l2"] + 0.25 * record["commitment"])


# The user's mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.kind", "dvea"],
            "error: the command line: unknown model.kind 'dvea': did you mean dvae?",
        ),
        (
            ["--model", '{kind = "dvae"}', "--loss.adversarial_weight", 0.1, "--loss.lpips", "vgg16.pth"],
            "loss.lpips, loss.adversarial_weight cannot be used with model.kind 'dvae'",
        ),
        (
            ["--loss.adversarial_adaptive", "true", "--train.compile", "true"],
            "loss.adversarial_adaptive reads gradients in the middle of a pass, which train.compile does not",
        ),
        (["--data.image_size", "[20, 16]"], "20x16"),
        (["--loss.perceptual", "/no/folder"], "no model at /no/folder"),
        (["--loss.perceptual", "TOKENIZER"], "holds an image tokenizer (vq), not a classifier"),
        (["--loss.lpips", "no.pth"], "no file no.pth"),
        (
            ["--loss.adversarial_weight", 1],
            "loss.adversarial_start 1000 is beyond the 6 training passes, so the discriminator",
        ),
        (
            ["--loss.adversarial_weight", 1, "--loss.adversarial_start", 5],  # said before training
            "16x16 pixels is too small for a discriminator of 3 layers",
        ),
        (
            ["--loss.adversarial_weight", 1, "--loss.adversarial_start", 5, "--deepspeed", "ZERO3"],
            "loss.adversarial_weight needs the discriminator's whole weights, which ZeRO 3 shards",
        ),
    ],
)
def test_what_cannot_be_had_is_explained(tmp_path, train_tokenizer, arguments, message):
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    VQModel(VQConfig(**SMALL)).save_pretrained(tmp_path / "tokenizer")
    places = {"TOKENIZER": tmp_path / "tokenizer", "ZERO3": tmp_path / "zero3.json"}
    ran = train_tokenizer(*(places.get(argument, argument) for argument in arguments))
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
