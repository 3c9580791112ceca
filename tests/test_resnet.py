"""Residual networks against timm's, as classifiers and as the stem of ViT's hybrids."""

from functools import partial

import pytest
import torch
from torch import nn

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classification import classification_loss
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import ResNet, ResNetConfig, StandardizedConv, conv_and_norm

CORE = TransformerConfig(width=32, depth=1, num_heads=2)


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def by_timms_names(weights: dict[str, torch.Tensor], post: bool = False) -> dict[str, torch.Tensor]:
    """Ours, from the weights of timm's `ResNetV2`."""
    ours = {}
    for name, tensor in weights.items():
        name = name.replace("stem.conv.", "root.").replace("stem.norm.", "norm.").replace(".blocks.", ".")
        name = name.replace("downsample.conv.", "shortcut.0." if post else "shortcut.")
        name = name.replace("downsample.norm.", "shortcut.1.").replace("head.fc.", "head.")
        ours[name] = tensor.flatten(1) if name == "head.weight" else tensor
    return ours


@torch.no_grad()
def test_bit_is_timms(timm):
    conv = partial(timm.layers.StdConv2d, eps=1e-8)
    peer = timm.models.resnetv2.ResNetV2(
        layers=(2, 1, 2), channels=(128, 256, 512), num_classes=5, stem_type="fixed", stem_chs=32,
        conv_layer=conv,
    )  # fmt: skip
    randomized(peer)
    model = ResNet(ResNetConfig(width=32, depths=(2, 1, 2), num_classes=5)).eval()
    model.load_state_dict(by_timms_names(peer.state_dict()))
    for size in ((64, 64), (48, 80), (33, 47)):
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(model(pixels), peer(pixels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_stem_of_the_hybrids_is_timms(timm):
    conv = partial(timm.layers.StdConv2dSame, eps=1e-8)
    peer = timm.models.resnetv2.ResNetV2(
        layers=(2, 2), channels=(128, 256), num_classes=0, global_pool="", preact=False, stem_type="same",
        conv_layer=conv, stem_chs=32,
    )  # fmt: skip
    randomized(peer)
    config = ClassifierConfig(
        image_size=(64, 48), patch_size=8, stem="resnet", stem_width=32, stem_blocks=(2, 2), core=CORE,
        stem_epsilons="timm",
    )  # fmt: skip
    stem = Classifier(config).eval().stem
    weights = by_timms_names(peer.state_dict(), post=True)
    stem.load_state_dict({**weights, **{f"proj.{name}": t for name, t in stem.proj.state_dict().items()}})
    pixels = torch.randn(2, 3, 64, 48)
    features = peer.forward_features(pixels)
    expected = stem.proj(features.flatten(2).transpose(1, 2))
    torch.testing.assert_close(stem(pixels), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_official_epsilons_are_those_of_the_official_code():
    """google-research/vision_transformer: kernels over their deviation + 1e-5, norms of flax with 1e-6."""
    torch.manual_seed(0)
    convolution, norm = conv_and_norm(3, 64, 3, 1, "official")
    convolution.weight.mul_(1e-4)  # where the epsilon is large
    pixels = torch.randn(2, 3, 6, 6).double()
    kernel = convolution.weight.double()
    centred = kernel - kernel.mean((1, 2, 3), keepdim=True)
    kernel = centred / (centred.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-5)
    expected = nn.functional.conv2d(pixels, kernel, padding=1)
    found = convolution.double()(pixels)
    torch.testing.assert_close(found, expected)
    grouped = 1e-3 * found.view(2, 32, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-6).sqrt()).view_as(found)
    torch.testing.assert_close(norm.double()(1e-3 * found), expected)
    other, _ = conv_and_norm(3, 64, 3, 1, "timm")
    other.load_state_dict(convolution.state_dict())
    assert (other.double()(pixels) - found).abs().max() > 0.1


def test_a_hybrid_may_take_squares_of_places():
    config = ClassifierConfig(
        image_size=32,
        patch_size=16,
        num_classes=3,
        stem="resnet",
        stem_width=32,
        stem_blocks=(1, 1),
        core=CORE,
    )
    model = Classifier(config)
    assert model.stem.proj.in_features == 256 * 2 * 2
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_kernels_are_standardized_whatever_their_scale():
    layer, pixels = StandardizedConv(3, 8, 3), torch.randn(1, 3, 9, 9)
    before = layer(pixels)
    with torch.no_grad():
        layer.weight.mul_(7).add_(3)
    torch.testing.assert_close(layer(pixels), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("root", ["imagenet", "small"])
def test_a_convolutional_classifier_learns_one_batch(root):
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(width=32, depths=(1, 1), num_classes=4, root=root))
    batch = {"pixels": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 4}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(20):
        loss, metrics = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["accuracy"] == 1


def test_smoothed_labels_by_hand():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    logs, shares = logits.log_softmax(1), torch.eye(4)[labels]
    expected = -(logs * (0.8 * shares + 0.2 / 4)).sum(1).mean()
    torch.testing.assert_close(classification_loss(logits, labels, 0.2)[0], expected)
    torch.testing.assert_close(classification_loss(logits, shares, 0.2)[0], expected)
    mixed = (shares + torch.eye(4)[labels.flip(0)]) / 2
    expected = -(logs * (0.8 * mixed + 0.2 / 4)).sum(1).mean()
    torch.testing.assert_close(classification_loss(logits, mixed, 0.2)[0], expected)


def test_both_kinds_of_classifier_smooth_their_labels():
    batch = {"pixels": torch.randn(5, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3, 3])}
    shared = {"image_size": 8, "num_classes": 4, "label_smoothing": 0.2}
    for model in (
        Classifier(ClassifierConfig(patch_size=4, core=CORE, **shared)),
        ResNet(ResNetConfig(width=32, depths=(1,), root="small", **shared)),
    ):
        nn.init.normal_(model.head.weight)
        expected = classification_loss(model(batch["pixels"]), batch["labels"], 0.2)[0]
        torch.testing.assert_close(model.loss(batch)[0], expected)


def test_accuracy_of_mixed_labels_is_that_of_the_largest_share():
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    logits = torch.eye(3)[[0, 2, 0, 0]]  # the last one is wrong
    assert classification_loss(logits, shares, 0.0)[1]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ResNetConfig, {"image_size": 0}, "image_size 0 has no pixels"),
        (ClassifierConfig, {"image_size": (32, -16)}, r"image_size \(32, -16\) has no pixels"),
        (
            ClassifierConfig,
            {"positions": "rotary_2d", "core": {"width": 60, "num_heads": 10}},
            "rotary_2d positions need a head size divisible by 4, got 6",
        ),
        (ResNetConfig, {"width": 48}, "width must be a multiple of the 32 groups of its norms, got 48"),
        (
            ClassifierConfig,
            {"stem": "resnet", "patch_size": 16, "stem_blocks": [3, 4, 6, 3]},
            r"patch_size must be a multiple of 32, .* stem_blocks \(3, 4, 6, 3\) .* got 16",
        ),
        (
            ClassifierConfig,
            {"stem": "resnet", "stem_blocks": [3, 4, 9], "stem_width": 40},
            "stem_width of a resnet stem must be a multiple of the 32 groups of its norms, got 40",
        ),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        build_config(config, settings, source="x.toml")


def test_convolution_against_attention_is_one_flag(run_script, tiny_shards, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        output = "{tmp_path / "run"}"
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = "{tiny_shards}/held-out-*.tar"
        [model]
        image_size = 16
        num_classes = 4
        patch_size = 8
        stem = "conv"
        core = {{width = 16, depth = 1, num_heads = 2}}
        [train]
        steps = 2
        batch_size = 8
        num_workers = 0
        """
    )
    small = ["--model.width", 32, "--model.depths", "[1]", "--model.channels", 1]
    ran = run_script("pipelines/train_classifier.py", recipe, "--model.kind", "resnet", *small)
    assert ran.returncode == 0, ran.stderr
    model = ResNet.from_pretrained(tmp_path / "run")
    assert model(torch.randn(1, 1, 24, 40)).shape == (1, 4)
    ran = run_script("pipelines/train_classifier.py", recipe, "--model.kind", "resnet", "--model.widht", 32)
    assert ran.returncode == 2
    assert "unknown key model.widht: did you mean model.width?" in ran.stderr
    ran = run_script(
        "pipelines/train_classifier.py", recipe, "--model.channels", 2, "--output", tmp_path / "two"
    )
    assert ran.returncode == 2
    assert "model.channels is 2, but images have 3: set it to 3, or to 1 for grey" in ran.stderr
    ran = run_script("pipelines/train_classifier.py", recipe, *small)
    assert ran.returncode == 2
    assert "unknown key model.width" in ran.stderr
