"""Further losses of a VQ tokenizer: distances in frozen features, and a discriminator that learns beside it
(VQGAN, 2012.09841, section 3.1)."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from mmvit.config import IN_STEPS, Config
from mmvit.models.discriminator import PatchDiscriminator
from mmvit.models.perceptual import FrozenDistance
from mmvit.models.vq import VQModel, pixel_error

MAX_ADAPTIVE_WEIGHT = 1e4


class ObjectiveConfig(Config):
    """Losses beside the pixels' own, all off by default. Starts are counted in training passes."""

    perceptual: str = Field("", description="folder of an mmvit classifier whose features are compared")
    perceptual_weight: float = Field(1.0, gt=0)
    lpips: str = Field("", description="file of torchvision's VGG16 weights, for LPIPS")
    lpips_weight: float = Field(1.0, gt=0)
    adversarial_weight: float = Field(
        0.0, ge=0, description="weight of a discriminator's judgement; 0 is off"
    )
    adversarial_adaptive: bool = Field(
        False, description="whether that weight is relative to the other terms' gradient (VQGAN, equation 7)"
    )
    discriminator_start: int = Field(
        0, ge=0, description="first pass in which the discriminator learns", json_schema_extra=IN_STEPS
    )
    adversarial_start: int = Field(
        1000, ge=0, description="first pass in which its judgement counts", json_schema_extra=IN_STEPS
    )
    discriminator_width: int = Field(64, ge=4, multiple_of=4)
    discriminator_layers: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _learns_before_it_judges(self):
        if self.adversarial_start <= self.discriminator_start:
            raise ValueError(
                f"adversarial_start {self.adversarial_start} must be greater than discriminator_start "
                f"{self.discriminator_start}: a discriminator has to learn before its judgement counts"
            )
        return self

    @property
    def adds_anything(self) -> bool:
        return bool(self.perceptual or self.lpips or self.adversarial_weight)


class TokenizerObjective(nn.Module):
    """A tokenizer with all its losses, trained by one backward pass and one optimizer.

    The discriminator's judgement reaches the tokenizer through detached copies of the discriminator's
    parameters, and the discriminator's own loss reads a detached reconstruction, so neither is moved by the
    other's loss. The usual way is two optimizers; with one, the discriminator has the tokenizer's betas,
    where (0.5, 0.9) are common, and counts towards the norm for gradient clipping.

    Distances are neither saved nor averaged with the weights, and are not submodules.

    Args:
        distances: networks by the names "perceptual" and "lpips"; the configuration has their weights.
    """

    def __init__(
        self,
        tokenizer: VQModel,
        config: ObjectiveConfig,
        distances: Mapping[str, FrozenDistance] | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer, self.distances = config, tokenizer, dict(distances or {})
        self.weights = {"perceptual": config.perceptual_weight, "lpips": config.lpips_weight}
        self.discriminator = None
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))  # training passes so far

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for distance in self.distances.values():
            distance._apply(fn)
        return super()._apply(fn, recurse)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError when images of that size do not fit the tokenizer, a distance or the
        discriminator."""
        self.tokenizer.grid(height, width)
        for distance in self.distances.values():
            distance.check_size(height, width)
        if self.discriminator is not None:
            self.discriminator.grid(height, width)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss of `batch["pixels"]`, plus each distance and, once it counts, the
        discriminator's judgement, at their weights, plus the discriminator's own loss.

        In training mode, this may also update the tokenizer's codebook, and the pass counts towards the
        starts.

        Returns:
            loss, and metrics: the tokenizer's; each distance by its name; `discriminator`, its hinge loss, 1
            for an untrained one; `patches_right`, the share of patches that it judges correctly;
            `adversarial`, minus its mean logit for reconstructions; `adaptive_weight`, if on. A term that has
            not started has no metrics.

        Raises:
            UserError: as `check_size` does.
        """
        pixels = batch["pixels"]
        reconstruction, quantizer_loss, metrics = self.tokenizer.reconstruct(pixels)
        error, parts = pixel_error(reconstruction, pixels)
        metrics = {**parts, **metrics}
        for name, distance in self.distances.items():
            value = distance(reconstruction, pixels).mean()
            error = error + self.weights[name] * value
            metrics[name] = value.detach()
        loss = error + quantizer_loss
        if self.discriminator is None:
            return loss, metrics

        passes = int(self.passes)
        if self.training:
            self.passes += 1
        if passes < self.config.discriminator_start:
            # DDP waits for a gradient of every parameter
            return loss + 0 * sum(p.sum() for p in self.discriminator.parameters()), metrics
        logits = self.discriminator(torch.cat([pixels, reconstruction.detach()]))
        own, parts = discriminator_loss(*logits.chunk(2))
        loss, metrics = loss + own, {**metrics, **parts}
        if passes >= self.config.adversarial_start:
            adversarial = -self.judge(reconstruction).mean()
            weight = self.config.adversarial_weight
            metrics["adversarial"] = adversarial.detach()
            if self.config.adversarial_adaptive and torch.is_grad_enabled():
                metrics["adaptive_weight"] = gradient_ratio(error, adversarial, self.tokenizer.last_weight)
                weight = weight * metrics["adaptive_weight"]
            loss = loss + weight * adversarial
        return loss, metrics

    def judge(self, reconstruction: Tensor) -> Tensor:
        """The discriminator's logits, whose gradient reaches only the reconstruction."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, frozen, (reconstruction,))


def discriminator_loss(real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The hinge loss of the logits for real and fake images, and metrics (1705.02894, as in VQGAN)."""
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return loss, {"discriminator": loss.detach(), "patches_right": right}


def gradient_ratio(error: Tensor, adversarial: Tensor, parameter: Tensor) -> Tensor:
    """λ, at which both terms have equal gradients for `parameter` (VQGAN, equation 7): the norm of `error`'s
    gradient over that of `adversarial`'s. Under torch.distributed, gradients are averaged over the
    processes."""
    with torch.autocast(parameter.device.type, enabled=False):
        gradients = [
            torch.autograd.grad(term, parameter, retain_graph=True)[0] for term in (error, adversarial)
        ]
    if dist.is_available() and dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)
    error_norm, adversarial_norm = (gradient.norm() for gradient in gradients)
    return (error_norm / (adversarial_norm + 1e-6)).clamp_max(MAX_ADAPTIVE_WEIGHT)
