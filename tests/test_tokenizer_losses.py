"""Losses of an image tokenizer beside that of its pixels: who moves by which, when, and against whose
figures."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import start_processes

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.interop.lpips import LPIPS
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.discriminator import Convolution, PatchDiscriminator
from mmvit.models.perceptual import FeatureDistance
from mmvit.models.tokenizer_objective import ObjectiveConfig, TokenizerObjective, discriminator_loss
from mmvit.models.vq import VQConfig, VQModel
from mmvit.training import OptimizerConfig, Processes, TrainConfig
from mmvit.training.engine import TorchEngine

SMALL = {"codebook_size": 16, "code_width": 4, "encoder_width": 16, "decoder_widths": (16, 8)}
FSQ = {**SMALL, "quantizer": "fsq", "levels": (4, 4)}  # nothing of it is drawn
ADVERSARIAL = {
    "adversarial_weight": 0.5,
    "discriminator_start": 0,
    "adversarial_start": 1,
    "discriminator_width": 8,
    "discriminator_layers": 2,
}
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small_classifier(**settings) -> Classifier:
    torch.manual_seed(1)
    core = TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.5)
    return Classifier(ClassifierConfig(**{"image_size": 16, "patch_size": 8, "core": core, **settings}))


def small_objective(passes: int = 0, model: dict = FSQ, distances=None, **settings) -> TokenizerObjective:
    torch.manual_seed(0)
    config = ObjectiveConfig(**{**ADVERSARIAL, **settings})
    objective = TokenizerObjective(VQModel(VQConfig(**model)), config, distances)
    objective.passes.fill_(passes)
    return objective.train()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def backward(objective: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, metrics = objective.loss(batch)
    loss.backward()
    return loss.detach(), metrics


# Distances in features


def test_feature_distance_is_that_of_unit_vectors_after_every_block():
    classifier = small_classifier().eval()
    one, two = noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1)
    expected = torch.zeros(3)
    tokens = []
    for pixels in (one, two):
        x = torch.cat([classifier.cls_token.expand(3, -1, -1), classifier.stem(pixels)], dim=1)
        tokens.append(classifier.positions.add(x))
    for block in classifier.core.blocks:
        tokens = [block(x) for x in tokens]
        expected += (2 - 2 * F.cosine_similarity(*tokens, dim=-1)).mean(-1) / 2
    distance = FeatureDistance(classifier)
    torch.testing.assert_close(distance(one, two), expected)
    assert (distance(one, two) > 0.01).all()
    assert torch.equal(distance(one, one), torch.zeros(3))
    last = FeatureDistance(classifier, depths=[2])(one, two)
    torch.testing.assert_close(last, (2 - 2 * F.cosine_similarity(*tokens, dim=-1)).mean(-1))
    with pytest.raises(ValueError, match=r"depths must be 1 to 2, got \(3,\)"):
        FeatureDistance(classifier, depths=[3])


def test_images_are_fitted_to_the_classifier():
    distance = FeatureDistance(small_classifier(channels=1))
    pixels, shift = noise(2, 3, 40, 24), torch.tensor([0.587, -0.299, 0.0]).view(3, 1, 1)  # of no luma
    assert fit_pixels(pixels, distance.classifier.config).shape == (2, 1, 16, 16)
    torch.testing.assert_close(distance(pixels, pixels + 0.5 * shift), torch.zeros(2), atol=1e-6, rtol=0)
    assert (distance(pixels, pixels + 0.5) > 1e-3).all()
    grey = torch.full((1, 3, 40, 24), 0.25)
    torch.testing.assert_close(fit_pixels(grey, distance.classifier.config), torch.full((1, 1, 16, 16), 0.25))
    stripes = torch.ones(1, 3, 48, 48)
    stripes[..., ::2] = -1  # too fine for 16 pixels
    assert fit_pixels(stripes, distance.classifier.config).abs().max() < 0.2
    with pytest.raises(UserError, match="a classifier of 2 channels cannot compare images, which have 3"):
        FeatureDistance(small_classifier(channels=2))


def test_the_frozen_network_stays_as_it_is_and_is_no_part_of_the_objective():
    classifier = small_classifier()
    before = copy.deepcopy(classifier.state_dict())
    distance = FeatureDistance(classifier)
    objective = small_objective(distances={"perceptual": distance}, adversarial_weight=0.0)
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2, weight_decay=0.5)
    pixels = noise(2, 3, 16, 16)
    first = distance(pixels, -pixels)
    for mode in (False, True):
        objective.train(mode)
        distance.train(mode)
        backward(objective, {"pixels": pixels})
        optimizer.step()
    assert not any(module.training for module in distance.modules())
    assert torch.equal(distance(pixels, -pixels), first)  # no dropout
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    tokenizer = {f"tokenizer.{name}" for name in objective.tokenizer.state_dict()}
    assert objective.state_dict().keys() == tokenizer | {"passes"}
    assert copy.deepcopy(objective).distances["perceptual"] is distance
    objective.to(torch.float64)
    assert classifier.head.weight.dtype == torch.float64


def test_distances_reach_the_tokenizer_at_their_weights():
    pixels, distance = noise(2, 3, 16, 16), FeatureDistance(small_classifier())
    plain = small_objective(adversarial_weight=0.0)
    weighted = small_objective(
        distances={"perceptual": distance}, adversarial_weight=0.0, perceptual_weight=3.0
    )
    loss, _ = backward(plain, {"pixels": pixels})
    total, metrics = backward(weighted, {"pixels": pixels})
    expected = distance(plain.tokenizer.reconstruct(pixels)[0], pixels).mean()
    torch.testing.assert_close(metrics["perceptual"], expected)
    torch.testing.assert_close(total, loss + 3 * expected)
    assert not metrics["perceptual"].requires_grad
    for name, gradient in gradients(weighted).items():
        assert not torch.equal(gradient, gradients(plain)[name]), name


def test_without_more_losses_the_objective_is_the_tokenizers_own():
    for quantizer in (SMALL, FSQ, {**SMALL, "quantizer": "simvq"}):
        objective = small_objective(model=quantizer, adversarial_weight=0.0)
        plain = copy.deepcopy(objective.tokenizer)
        torch.manual_seed(2)
        loss, metrics = backward(objective, {"pixels": noise(4, 3, 16, 16)})
        torch.manual_seed(2)
        expected, own = backward(plain, {"pixels": noise(4, 3, 16, 16)})
        assert torch.equal(loss, expected)
        assert metrics == own
        for name, gradient in gradients(plain).items():
            assert torch.equal(gradient, gradients(objective.tokenizer)[name])


# Sizes


def test_images_that_are_too_small_are_refused_before_training():
    with pytest.raises(UserError, match="8x32 pixels are too small for LPIPS, which needs at least 16"):
        small_objective(distances={"lpips": LPIPS()}).check_size(8, 32)
    with pytest.raises(UserError, match=r"8x32 pixels is too small for a discriminator .* needs 12 on"):
        small_objective().check_size(8, 32)
    small_objective().check_size(16, 16)


# The discriminator


@pytest.mark.parametrize(("layers", "height", "width"), [(1, 16, 9), (2, 13, 40), (3, 24, 32)])
def test_the_discriminator_judges_every_patch_of_an_image_alone(layers, height, width):
    torch.manual_seed(0)
    discriminator, pixels = PatchDiscriminator(8, layers), noise(3, 3, height, width)
    logits = discriminator(pixels)
    assert logits.shape == (3, 1, *discriminator.grid(height, width))
    alone = torch.cat([discriminator(image[None]) for image in pixels])
    torch.testing.assert_close(logits, alone)
    assert logits.std() > 0


def test_the_smallest_image_that_a_discriminator_takes_is_what_it_says():
    discriminator = PatchDiscriminator(8, 3)
    assert discriminator(noise(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"23x24 pixels is too small for a discriminator .* needs 24"):
        discriminator(noise(1, 3, 23, 24))


def test_hinge_loss_and_the_share_that_is_right_have_their_exact_values():
    real, made = torch.tensor([2.0, 0.5, -1.0, -3.0]), torch.tensor([-3.0, 1.0, -0.5, -2.0])
    loss, metrics = discriminator_loss(real, made)
    assert loss == ((0 + 0.5 + 2 + 4) / 4 + (0 + 2 + 0.5 + 0) / 4) / 2
    assert metrics["patches_right"] == (2 / 4 + 3 / 4) / 2


def test_a_discriminator_learns_at_a_tokenizers_rate():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-3, betas=(0.9, 0.98))
    for step in range(60):
        real = noise(8, 3, 16, 16, seed=step)
        smooth = F.avg_pool2d(real, 3, stride=1, padding=1)
        loss, metrics = discriminator_loss(*discriminator(torch.cat([real, smooth])).chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["patches_right"] > 0.95


def test_a_step_changes_a_discriminators_weights_less_the_more_inputs_they_have():
    layer, pixel = Convolution(25, 8, stride=1), torch.zeros(1, 25, 5, 5)
    pixel[0, 0, 2, 2] = 1
    before = layer(pixel)
    with torch.no_grad():
        layer.weight += 0.1  # as Adam does at a rate of 0.1
    torch.testing.assert_close(layer(pixel) - before, torch.full((1, 8, 4, 4), 0.1 / 20))  # √(25 · 4 · 4)
    assert layer(noise(4, 25, 32, 32)).std().item() == pytest.approx(3**-0.5, rel=0.1)  # that of the noise


def test_the_discriminators_loss_does_not_move_the_tokenizer():
    pixels = noise(4, 3, 16, 16)
    objective = small_objective(passes=0)  # the discriminator learns, its judgement does not count
    plain = small_objective(adversarial_weight=0.0)
    loss, metrics = backward(objective, {"pixels": pixels})
    own, _ = backward(plain, {"pixels": pixels})
    torch.testing.assert_close(loss, own + metrics["discriminator"])
    for name, gradient in gradients(plain.tokenizer).items():
        assert torch.equal(gradient, gradients(objective.tokenizer)[name]), name
    assert all(gradient.any() for gradient in gradients(objective.discriminator).values())


def test_the_judgement_moves_the_tokenizer_and_not_the_discriminator():
    pixels = noise(4, 3, 16, 16)
    silent, judging = small_objective(passes=0), small_objective(passes=1)
    loss, _ = backward(silent, {"pixels": pixels})
    total, metrics = backward(judging, {"pixels": pixels})
    torch.testing.assert_close(total, loss + 0.5 * metrics["adversarial"])
    reconstruction = silent.tokenizer.reconstruct(pixels)[0]
    torch.testing.assert_close(metrics["adversarial"], -silent.discriminator(reconstruction).detach().mean())
    for name, gradient in gradients(silent.discriminator).items():
        assert torch.equal(gradient, gradients(judging.discriminator)[name]), name
    for name, gradient in gradients(silent.tokenizer).items():
        assert not torch.equal(gradient, gradients(judging.tokenizer)[name]), name


def test_the_judgement_wants_reconstructions_to_look_real():
    objective = small_objective(passes=1, adversarial_weight=100.0)
    pixels = noise(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(objective.tokenizer.parameters(), 1e-2)
    logits = []
    for _ in range(15):
        _, metrics = backward(objective, {"pixels": pixels})
        logits.append(-metrics["adversarial"].item())
        optimizer.step()
        objective.zero_grad()
    assert logits[-1] > logits[0] + 0.2


def test_the_starts_are_counted_in_training_passes():
    objective = small_objective(discriminator_start=1, adversarial_start=3)
    pixels, seen = noise(2, 3, 16, 16), []
    for _ in range(5):
        objective.zero_grad()
        _, metrics = backward(objective, {"pixels": pixels})
        learns = any(gradient.any() for gradient in gradients(objective.discriminator).values())
        assert all(gradient is not None for gradient in gradients(objective).values())  # for DDP
        seen.append((learns, "discriminator" in metrics, "adversarial" in metrics))
        objective.eval().loss({"pixels": pixels})
        objective.train()
    assert seen == [(False,) * 3, (True, True, False), (True, True, False), (True,) * 3, (True,) * 3]
    assert objective.passes == 5


def test_the_adaptive_weight_makes_both_terms_pull_the_last_layer_alike():
    pixels, distances = noise(4, 3, 16, 16), {"perceptual": FeatureDistance(small_classifier())}
    silent, judging, adaptive = (
        small_objective(passes, distances=distances, adversarial_adaptive=adaptive)
        for passes, adaptive in ((0, False), (1, False), (1, True))
    )
    for objective in (silent, judging, adaptive):
        _, metrics = backward(objective, {"pixels": pixels})
    without, half, balanced = (o.tokenizer.last_weight.grad for o in (silent, judging, adaptive))
    adversarial = 2 * (half - without)
    ratio = without.norm() / adversarial.norm()
    torch.testing.assert_close(metrics["adaptive_weight"], ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(balanced, without + 0.5 * ratio * adversarial, rtol=1e-3, atol=1e-6)


# Training


def engine_on(processes: Processes) -> TorchEngine:
    objective = small_objective(discriminator_start=1, adversarial_start=2, adversarial_adaptive=True)
    train = TrainConfig(steps=4, batch_size=8, accumulation=1, precision="fp32", ema_decay=0.5)
    return TorchEngine(objective, train, OptimizerConfig(lr=1e-2, warmup_steps=0), processes)


def take_steps(engine: TorchEngine, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    for step in range(1, 5):
        loss, _ = engine.loss({"pixels": noise(8, 3, 16, 16, seed=step).chunk(world_size)[rank]})
        engine.backward(loss)
        engine.step(step)
    return {**engine.model.state_dict(), "average": engine.average.model.tokenizer.last_weight}


def train_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    state = take_steps(engine_on(Processes(rank, 2, torch.device("cpu"))), rank, 2)
    torch.save(state, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    start_processes(train_on_rank, (tmp_path,), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = take_steps(engine_on(Processes(0, 1, torch.device("cpu"))), 0, 1)
    assert alone["passes"] == 4
    for name, tensor in alone.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: n + text)


# The user's mistakes


def test_a_judgement_that_counts_before_anything_is_learnt_is_refused():
    with pytest.raises(UserError, match=r"adversarial_start 50 must be greater than discriminator_start 50"):
        build_config(ObjectiveConfig, {"discriminator_start": 50, "adversarial_start": 50}, source="x.toml")
