"""Masked patch prediction as in the paper's appendix: what is corrupted, what is predicted, from where."""

import json

import pytest
import torch
import torch.nn.functional as F

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.masked_patches import MaskedPatches, MaskedPatchesConfig, mean_colours, patchify

CORE = TransformerConfig(width=16, depth=1, num_heads=2)


def objective(shape: dict | None = None, **settings) -> MaskedPatches:
    torch.manual_seed(0)
    config = ClassifierConfig(
        **{"image_size": 32, "patch_size": 4, "num_classes": 3, "core": CORE, **(shape or {})}
    )
    return MaskedPatches(Classifier(config), MaskedPatchesConfig(**settings))


def test_half_of_the_patches_are_corrupted_and_most_of_them_masked():
    model, embedded = objective(), torch.randn(200, 64, 16)
    result, corrupted = model.corrupt(embedded)
    assert (corrupted.sum(1) == 32).all()
    assert torch.equal(result[~corrupted], embedded[~corrupted])
    masked = (result == model.mask).all(-1)
    same = (result == embedded).all(-1)
    elsewhere = (result.unsqueeze(2) == embedded.unsqueeze(1)).all(-1).any(-1) & ~same  # of the same image
    shares = [kind[corrupted].float().mean().item() for kind in (masked, elsewhere, same)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert (masked | elsewhere | same).all()
    assert not (masked | elsewhere)[~corrupted].any()
    assert corrupted.float().mean(0).std() < 0.06  # every place as often


def test_colours_are_three_bits_a_channel():
    patch = torch.tensor([[-1.0, 0.99, 0.01], [1.0, -0.26, -0.24]]).view(2, 3, 1, 1).expand(-1, -1, 4, 4)
    assert mean_colours(patch, 1).tolist() == [[0 * 64 + 7 * 8 + 4], [7 * 64 + 2 * 8 + 3]]
    halves = torch.cat([torch.full((1, 1, 8, 4), -0.9), torch.full((1, 1, 8, 4), 0.9)], -1)
    assert mean_colours(halves, 1).tolist() == [[4]]  # the mean is 0
    assert mean_colours(halves, 2).tolist() == [[0, 7, 0, 7]]


def test_patches_are_cut_in_the_order_of_the_tokens():
    model, pixels = objective(), torch.randn(2, 3, 32, 32)
    stem = model.classifier.stem
    torch.testing.assert_close(stem.proj(patchify(pixels, 4).flatten(2)), stem(pixels))


@pytest.mark.parametrize("target", ["mean_colour", "colour_grid", "pixels"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_loss_is_over_every_corrupted_patch_and_no_other(target, pooling):
    model, pixels = objective({"pooling": pooling}, target=target), torch.rand(3, 3, 32, 32) * 2 - 1
    torch.manual_seed(1)
    loss, metrics = model.loss({"pixels": pixels})
    torch.manual_seed(1)
    classifier = model.classifier
    embedded, corrupted = model.corrupt(classifier.stem(pixels))
    predicted = model.predict(classifier.tokens(embedded)[:, classifier.num_prefix :])
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    total, number = 0.0, 0
    for image, place in corrupted.nonzero().tolist():
        made, patch = predicted[image, place], patches[image, place]
        if target == "pixels":
            total += F.mse_loss(made, patch.flatten())
        elif target == "mean_colour":
            total += F.cross_entropy(made, mean_colours(patch[None], 1)[0, 0])
        else:
            total += F.cross_entropy(made.view(16, 512), mean_colours(patch[None], 4)[0])
        number += 1
    torch.testing.assert_close(loss, total / number)
    assert ("accuracy" in metrics) == (target != "pixels")
    loss.backward()
    untouched = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert untouched == set()
    assert model.mask.grad.any()
    assert classifier.head.weight.grad is None


def test_it_learns_what_is_around():
    model = objective({"image_size": 16})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(100):
        ends = torch.randint(2, (16, 3, 1, 1), generator=torch.Generator().manual_seed(step)) * 1.8 - 0.9
        loss, _ = model.loss({"pixels": ends.expand(-1, -1, 16, 16)})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5  # of 6.2: images of one of 8 colours


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(UserError, match="patches of 2 pixels cannot be cut into 4x4 cells"):
        objective({"patch_size": 2}, target="colour_grid")
    with pytest.raises(
        UserError, match=r"model\.stem is 'conv', in which patches see their neighbours' pixels"
    ):
        objective({"stem": "conv"})
    with pytest.raises(UserError, match=r"patch_dropout leaves out patches that have to be predicted"):
        objective({"patch_dropout": 0.5})
    with pytest.raises(UserError, match=r"masked and swapped must be at most 1 together, got 0\.8 and 0\.3"):
        objective(swapped=0.3)


@pytest.mark.parametrize("method", ["masked_patches", "byol", "mae"])
def test_a_classifier_is_pre_trained_without_classes_and_started_from(
    method, run_script, tiny_shards, tmp_path
):
    data = f"""
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = "{tiny_shards}/held-out-*.tar"
        [model]
        image_size = 16
        patch_size = 4
        num_classes = 4
        core = {{ width = 16, depth = 1, num_heads = 2 }}
        [train]
        steps = 2
        batch_size = 8
        num_workers = 0
        precision = "fp32"
        """
    recipes = {name: tmp_path / f"{name}.toml" for name in ("masked", "tuned")}
    for name, path in recipes.items():
        path.write_text(f'output = "{tmp_path / name}"\n{data}')
    ran = run_script("pipelines/pretrain_classifier.py", recipes["masked"])
    assert ran.returncode == 2
    assert "method is required" in ran.stderr
    arguments = ("pipelines/pretrain_classifier.py", recipes["masked"], "--method", method)
    decayed = run_script(*arguments, "--optimizer.layer_decay", 0.5)
    assert decayed.returncode == 2
    assert "optimizer.layer_decay needs trained layers: use it for fine-tuning" in decayed.stderr
    ran = run_script(*arguments)
    assert ran.returncode == 0, ran.stderr
    held_out = json.loads((tmp_path / "masked/metrics.jsonl").read_text().splitlines()[-1])
    own = {"masked_patches": {"accuracy"}, "byol": {"spread"}, "mae": set()}[method]
    assert {"loss", *own} <= held_out.keys()
    start = Classifier.from_pretrained(tmp_path / "masked")
    ran = run_script(
        "pipelines/train_classifier.py", recipes["tuned"], "--start.model", tmp_path / "masked",
        "--start.freeze", '["stem", "core"]',
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    tuned = Classifier.from_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned.core.norm.weight, start.core.norm.weight)
    assert torch.equal(tuned.stem.proj.weight, start.stem.proj.weight)
    assert tuned.head.weight.any()
