"""What models cost to run and to train, against the figures of the paper and of plain arithmetic."""

from types import SimpleNamespace

import pytest
import torch

from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.cost import (
    core_activations,
    forward_macs,
    kept_for_backward,
    stem_activations,
    training_flops,
    training_memory,
)
from mmvit.models.presets import preset
from mmvit.models.registry import build_model
from mmvit.recipes import plan

MACS = {  # billions, at 224 and 384 pixels: plain arithmetic on the architecture
    "vit-b16": (17.563, 55.48),
    "vit-b32": (4.408, 13.04),
    "vit-l16": (61.554, 191.07),
    "vit-l32": (15.377, 45.28),
    "vit-h14": (167.294, None),
}
TABLE_6 = {  # exaFLOPs of pre-training on JFT's 303 million images (2010.11929)
    ("vit-b16", 7): 224,
    ("vit-l32", 7): 196,
    ("vit-l16", 7): 783,
    ("vit-l16", 14): 1567,
    ("vit-h14", 14): 4262,
    ("vit-b32", 7): 55,
}


@pytest.mark.parametrize("name", MACS)
def test_published_vits_take_the_published_products(name):
    for size, expected in zip((224, 384), MACS[name], strict=True):
        if expected:
            config = preset(name).model_copy(update={"image_size": size})
            assert forward_macs(config) / 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "epochs"), TABLE_6)
def test_pre_training_costs_what_the_paper_says(name, epochs):
    flops = training_flops(forward_macs(preset(name)), 303e6 * epochs)
    rounded = TABLE_6[name, epochs]
    assert flops / 1e18 == pytest.approx(rounded, abs=0.02 * rounded + 0.5)


def test_every_product_of_a_small_vit_is_counted():
    width, tokens, depth = 24, 1 + 4 * 4, 3
    core = TransformerConfig(width=width, depth=depth, num_heads=3, mlp_ratio=2)
    config = ClassifierConfig(image_size=32, patch_size=8, channels=1, num_classes=5, core=core)
    linear = tokens * width * (3 * width + width + 2 * 2 * width)  # qkv, out, up and down
    attention = 2 * tokens**2 * width
    stem, head = 16 * 64 * width, width * 5
    assert forward_macs(config) == stem + depth * (linear + attention) + head


def test_a_dry_run_counts_three_forward_passes():
    core = TransformerConfig(width=24, depth=2, num_heads=3, attention_kernel="plain")
    config = ClassifierConfig(image_size=32, patch_size=8, num_classes=5, core=core)
    with torch.device("meta"):
        model = build_model(config)
    recipe = SimpleNamespace(task="classifier", model=config)
    assert plan.training_flops(model, recipe) == 3 * 2 * forward_macs(config)


def test_the_table_is_printed(run_script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = run_script("pipelines/list_presets.py", "vit-b16", "vit-l32", "vq-f8")
    assert ran.returncode == 0, ran.stderr
    (base,) = [line for line in ran.stdout.splitlines() if "vit-b16" in line]
    assert [cell.strip() for cell in base.strip("│").split("│")] == [
        "vit-b16", "12", "768", "12", "197", "86,567,656", "17.564", "517,822", "223.5"
    ]  # fmt: skip
    launched = ("--epochs", 14, "--local_rank=0")  # the last by DeepSpeed's launcher
    assert " 1,035,645 " in run_script("pipelines/list_presets.py", "vit-modern", *launched).stdout
    ran = run_script("pipelines/list_presets.py", "vit-b61")
    assert ran.returncode == 2
    assert "did you mean vit-b16?" in ran.stderr
    assert run_script("pipelines/list_presets.py", "vit-b16", "--image-size", 100).returncode == 2


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("recomputed", ["none", "blocks", "attention"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_activations_are_about_what_a_core_keeps(mlp, recomputed, every):
    parts = {"activation_checkpointing": recomputed, "activation_checkpointing_every": every}
    config = TransformerConfig(width=64, depth=4, num_heads=4, mlp=mlp, attention_kernel="sdpa", **parts)
    core, x = Transformer(config), torch.randn(2, 48, 64, requires_grad=True)
    alive, measured = kept_for_backward(lambda: core(x), but=core)
    planned = 2 * core_activations(config, 48)  # of 32 bits a value
    if (recomputed, every) == ("blocks", 1):  # the block that is computed again comes later
        whole = config.model_copy(update={"depth": 1, "activation_checkpointing": "none"})
        planned -= 2 * (core_activations(whole, 48) - 2 * 48 * 2 * 64)
    assert alive.requires_grad
    assert measured / 2 == pytest.approx(planned, rel=0.2)


@pytest.mark.parametrize("name", ["r50-b32", "vit-modern", "vit-b16"])
def test_activations_of_a_stem_are_what_it_keeps(name):
    config = preset(name).model_copy(update={"image_size": 64 if name != "vit-modern" else 28})
    shallow = config.core.model_copy(update={"depth": 1})  # the blocks take seconds and are not asked about
    stem = Classifier(config.model_copy(update={"core": shallow})).stem

    def measure(batch: int) -> int:
        pixels = torch.randn(batch, config.channels, *config.height_width)
        alive, kept = kept_for_backward(lambda: stem(pixels), but=stem)
        assert alive.requires_grad
        return kept

    planned = stem_activations(config)
    if config.stem == "patch":
        assert planned == 0
    else:
        assert (measure(3) - measure(1)) / 2 == pytest.approx(planned, rel=0.05)


def test_zero_shares_out_moments_then_gradients_then_weights():
    """1910.02054, with float32 weights and bf16 copies of them."""
    core, plans = TransformerConfig(), []
    for stage in range(4):
        plan = training_memory(1000, core, tokens=10, stage=stage, processes=4, average=stage < 3)
        plans.append((plan.weights, plan.gradients, plan.moments, plan.average))
    assert plans == [
        (6000, 4000, 8000, 4000),
        (6000 + 1000, 4000, 2000, 4000),
        (6000 + 1000, 1000, 2000, 4000),
        (1500, 1000, 2000, 0),
    ]
    alone = training_memory(1000, core, tokens=10, precision="fp32")
    assert alone.state == 16_000
    assert alone.activations == 2 * training_memory(1000, core, tokens=10).activations


def test_a_plan_is_printed_for_each_stage(run_script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = run_script("pipelines/plan_memory.py", "dalle-12b", "--gpus", "64")
    assert ran.returncode == 0, ran.stderr
    assert "12,292,840,960 parameters, 1,281 tokens" in ran.stdout
    rows = [line for line in ran.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row.split("│")[1:4:2]] for row in rows] == [
        [precision, stage] for precision in ("bf16", "fp32") for stage in "0123"
    ]
    assert "no room" in rows[0]
    assert "no room" not in rows[3]
    ran = run_script("pipelines/plan_memory.py", "dalle-12b", "--gpus", "8,1024", "--precision", "bf16")
    rows = [line.split("│")[1:] for line in ran.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["8"] * 4 + ["1,024"] * 4
    few, many = ([float(row[3]) for row in part] for part in (rows[:4], rows[4:]))
    assert few[0] == many[0]
    assert all(own > shared for own, shared in zip(few[1:], many[1:], strict=True))
    ran = run_script("pipelines/plan_memory.py", "dalle-12b", "--gpus", "8,x")
    assert (ran.returncode, "--gpus: expected numbers greater than 0" in ran.stderr) == (2, True)
    ran = run_script("pipelines/plan_memory.py", "vq-f8")
    assert (ran.returncode, "vq-f8 has no Transformer core" in ran.stderr) == (2, True)
