"""What models cost to run and to train, against the figures of the paper and of plain arithmetic."""

from types import SimpleNamespace

import pytest
import torch

from mmvit.core.transformer import TransformerConfig
from mmvit.models.activations import (
    InUse,
    activations,
    drop_gradient,
    example_batch,
    kept_for_backward,
    trace_step,
)
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.cost import forward_macs, training_flops, training_state
from mmvit.models.generator_transformer import GeneratorConfig
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
SMALL = [
    {},
    {"positions": "rotary_2d", "attention": "causal", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
    {"activation_checkpointing": "blocks", "text_loss_weight": 1.0, "attention": "causal"},
    {"activation_checkpointing": "attention", "activation_checkpointing_every": 2, "dropout": 0.2},
]
# MB an example, of 2 layers: on a device that says it is CUDA and computes on the CPU, with CUDA's autocast
# and attention that keeps no maps (2026-12-01)
KEPT_ON_CUDA = {
    ("generator-b", "bf16"): 50.293,
    ("generator-b", "fp32"): 72.248,
    ("vit-b16", "bf16"): 11.813,
    ("vit-modern", "bf16"): 0.7288,
    ("dalle-tiny", "bf16"): 2.4168,
}


def small(**parts) -> GeneratorConfig:
    own = {key: parts.pop(key) for key in [*parts] if key in GeneratorConfig.model_fields}
    core = TransformerConfig(**{"width": 64, "depth": 3, "num_heads": 4, "dropout": 0.1, **parts})
    sizes = {"vocab_size": 64, "text_length": 12, "codebook_size": 32, "grid": (4, 4)}
    return GeneratorConfig(**{**sizes, **own}, core=core)


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


@pytest.mark.parametrize(("parts", "precision"), zip(SMALL, ["fp32", "bf16"] * 2, strict=True))
def test_a_traced_step_keeps_what_a_real_one_does(parts, precision):
    """On the CPU, with enough examples that the gradients of weights, which a trace holds, do not matter."""
    examples = 256
    config = small(**parts)
    torch.manual_seed(0)
    model = build_model(config).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    batch = example_batch(config, examples)
    with InUse() as in_use:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            (loss, _), kept = kept_for_backward(lambda: model.loss(batch), but=model)
        loss.backward()
    traced = trace_step(config, "cpu", precision, examples=examples)
    assert examples * traced.kept == pytest.approx(kept, rel=0.01)
    assert examples * traced.peak == pytest.approx(in_use.peak, rel=0.05)


@pytest.mark.parametrize(("name", "precision"), KEPT_ON_CUDA)
def test_a_step_traced_for_cuda_keeps_what_a_device_with_its_rules_does(name, precision):
    config = preset(name)
    shallow = config.model_copy(update={"core": config.core.model_copy(update={"depth": 2})})
    kept = KEPT_ON_CUDA[name, precision]
    assert trace_step(shallow, "cuda", precision).kept / 1e6 == pytest.approx(kept, rel=0.01)


def test_cuda_keeps_no_attention_maps():
    def maps(tokens: int) -> float:  # what is left when all else grows with the tokens
        sizes = [
            trace_step(small(text_length=length), "cuda").kept
            for length in (tokens - 4, 2 * tokens - 4, 3 * tokens - 4)
        ]
        return sizes[2] - 2 * sizes[1] + sizes[0]

    assert abs(maps(64)) < 0.01 * 2 * 64**2


def test_deep_cores_are_told_by_shallow_ones():
    config = small(depth=13, activation_checkpointing="attention")
    assert vars(activations(config)) == pytest.approx(vars(trace_step(config)))


def test_zero_shares_out_moments_then_gradients_then_weights():
    """1910.02054, with float32 weights and bf16 copies of them."""
    plans = []
    for stage in range(4):
        plan = training_state(1000, stage, processes=4, average=stage < 3)
        plans.append((plan.weights, plan.gradients, plan.moments, plan.average))
    assert plans == [
        (6000, 4000, 8000, 4000),
        (6000 + 1000, 4000, 2000, 4000),
        (6000 + 1000, 1000, 2000, 4000),
        (1500, 1000, 2000, 0),
    ]
    assert training_state(1000, precision="fp32").total == 16_000


def test_a_plan_is_printed_for_each_stage(run_script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = run_script("pipelines/plan_memory.py", "vit-ti16", "--gpus", "64", "--memory", "0.08")
    assert ran.returncode == 0, ran.stderr
    assert "5,717,416 parameters" in ran.stdout
    rows = [line for line in ran.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row.split("│")[1:4:2]] for row in rows] == [
        [precision, stage] for precision in ("bf16", "fp32") for stage in "0123"
    ]
    assert "no room" in rows[0]
    assert "no room" not in rows[3]
    ran = run_script(
        "pipelines/plan_memory.py",
        "vit-modern",
        "--gpus",
        "8,1024",
        "--precision",
        "bf16",
        "--memory",
        "0.01",
    )
    rows = [line.split("│")[1:] for line in ran.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["8"] * 4 + ["1,024"] * 4
    few, many = ([float(row[3]) for row in part] for part in (rows[:4], rows[4:]))
    assert few[0] == many[0]
    assert all(own >= shared for own, shared in zip(few[1:], many[1:], strict=True))
    ran = run_script("pipelines/plan_memory.py", "dalle-12b", "--gpus", "8,x")
    assert (ran.returncode, "--gpus: expected numbers greater than 0" in ran.stderr) == (2, True)
    ran = run_script("pipelines/plan_memory.py", "vq-f8")
    assert (ran.returncode, "the training of vq-f8 cannot be planned" in ran.stderr) == (2, True)
