"""BYOL: its loss and its target's pace against exact values; views that differ from image to image."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.data.views import Views, ViewsConfig
from mmvit.errors import UserError
from mmvit.models.byol import BYOL, BYOLConfig, target_momentum
from mmvit.models.classification import FitBatch
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.places import load_script
from mmvit.recipes.pretraining import PretrainingRecipe

CORE = TransformerConfig(width=16, depth=1, num_heads=2)
SMALL = BYOLConfig(hidden=32, projection=8, momentum=0.9)


def objective(passes: int = 10) -> BYOL:
    torch.manual_seed(0)
    config = ClassifierConfig(image_size=8, patch_size=4, num_classes=3, core=CORE)
    return BYOL(Classifier(config), SMALL, passes)


def views(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 3, 8, 8, generator=generator) for name in ("pixels", "other_pixels")}


def test_the_momentum_rises_by_half_a_cosine():
    assert target_momentum(0.996, 0, 100) == pytest.approx(0.996)
    assert target_momentum(0.996, 50, 100) == pytest.approx(0.998)
    assert target_momentum(0.996, 100, 100) == 1
    assert target_momentum(0.9, 25, 100) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_the_loss_is_that_of_both_directions_by_hand():
    model, batch = objective().train(), views()
    one, other = batch["pixels"], batch["other_pixels"]
    twin = objective().train()
    loss, metrics = model.loss(batch)

    def predict(x):
        return F.normalize(twin.predictor(twin.projector(twin.classifier.features(x))), dim=1)

    def aim(x):
        classifier, projector = twin.target
        return F.normalize(projector(classifier.features(x)), dim=1).detach()

    expected = (predict(one) - aim(other)).square().sum(1).mean()
    expected = expected + (predict(other) - aim(one)).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["momentum"].item() == pytest.approx(0.9)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is None for p in model.classifier.head.parameters())


def test_the_target_follows_after_each_step_at_its_momentum():
    model = objective().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    expected = [p.clone() for p in model.target.parameters()]
    for step in range(3):
        loss, _ = model.loss(views(step))
        if step:
            momentum = target_momentum(0.9, step - 1, 10)
            online = [*model.classifier.parameters(), *model.projector.parameters()]
            expected = [momentum * e + (1 - momentum) * o for e, o in zip(expected, online, strict=True)]
        for found, wanted in zip(model.target.parameters(), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.passes == 3
    before = [p.clone() for p in model.target.parameters()]
    model.eval().loss(views())
    assert model.passes == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.target.parameters(), strict=True))


def test_the_target_moves_once_a_step_however_many_passes_that_has():
    def train(accumulation: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = ClassifierConfig(image_size=8, patch_size=4, num_classes=3, core=CORE)
        model = BYOL(Classifier(config), SMALL, 10, accumulation).train()
        for step in range(3):
            for _ in range(accumulation):
                _, metrics = model.loss(views(step))
            with torch.no_grad():  # as an optimizer would
                for parameter in (*model.classifier.parameters(), *model.projector.parameters()):
                    parameter.add_(0.1)
        return [metrics["momentum"], *model.target.parameters()]

    for one, other in zip(train(1), train(3), strict=True):
        torch.testing.assert_close(one, other)


def test_the_views_are_those_of_the_paper():
    found = [
        {type(part).__name__: part.p for part in augmentation.children()}
        for augmentation in Views(ViewsConfig(), (32, 32)).augmentations
    ]
    same = {"RandomResizedCrop": 1.0, "RandomHorizontalFlip": 0.5, "ColorJitter": 0.8, "RandomGrayscale": 0.2}
    assert found[0] == {**same, "RandomGaussianBlur": 1.0, "RandomSolarize": 0.0}
    assert found[1] == {**same, "RandomGaussianBlur": 0.1, "RandomSolarize": 0.2}
    assert ViewsConfig().jitter_strength == (0.4, 0.4, 0.2, 0.1)
    assert ViewsConfig().smallest_crop == 0.08


def test_the_spread_tells_a_collapse():
    model = objective().eval()
    assert model.loss(views())[1]["spread"] > 0.01
    for parameter in model.target[1][-1].parameters():
        torch.nn.init.ones_(parameter)
    torch.nn.init.zeros_(model.target[1][-1].weight)
    assert model.loss(views())[1]["spread"] < 1e-6


def test_a_representation_layer_which_would_stay_random_is_refused():
    """BYOL compared views through it, frozen."""
    data = {"train": "a", "held_out": "b"}
    values = {"output": "run", "data": data, "model": {"num_classes": 3, "core": CORE.model_dump()}}
    recipe = build_config(PretrainingRecipe, {**values, "method": "byol"}, "recipe")
    assert recipe.model.representation_width is None
    values["model"]["representation_width"] = 8
    with pytest.raises(UserError, match=r"model\.representation_width is a layer of a classifier's head"):
        build_config(PretrainingRecipe, {**values, "method": "byol"}, "recipe")


def test_the_script_builds_the_objective_of_the_recipe():
    values = {"output": "run", "data": {"train": "a", "held_out": "b"}, "method": "byol"}
    values["model"] = {
        "image_size": 8,
        "patch_size": 4,
        "channels": 1,
        "num_classes": 3,
        "core": CORE.model_dump(),
    }
    values |= {"train": {"steps": 7, "accumulation": 2}, "byol": SMALL.model_dump()}
    recipe = build_config(PretrainingRecipe, values, "recipe")
    model = load_script("pipelines/pretrain_classifier.py").build_objective(recipe)
    assert (model.total, model.accumulation, model.config) == (7, 2, SMALL)
    batch = FitBatch(recipe.model)(views())  # grey
    assert model.loss(batch)[0].isfinite()


def test_views_differ_between_images_and_from_each_other():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    batch = {"pixels": image.repeat(16, 1, 1, 1), "keys": "k"}
    made = Views(ViewsConfig(), (32, 32))(batch)
    every = torch.cat([made["pixels"], made["other_pixels"]])
    assert every.shape == (32, 3, 32, 32)
    assert every.abs().max() <= 1
    assert len({tuple(image.flatten()[:50].tolist()) for image in every}) == 32
    assert made["keys"] == "k"
