"""Augmentation of batches, each image by its own draw: RandAugment, mixup, CutMix.

It draws from torch's generator, whose state is part of a checkpoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmvit.config import Config


class MixingConfig(Config):
    """How to augment a batch of training images. The defaults do nothing."""

    rand_augment: int = Field(0, ge=0, le=5, description="operations per image (1909.13719)")
    magnitude: float = Field(
        10,
        gt=0,
        lt=30,
        description="their strength on a scale of 30, as the paper's and kornia's; big_vision's has 10",
    )
    mixup: float = Field(
        0.0, ge=0, description="α of Beta(α, α), which gives the second image's share (1710.09412)"
    )
    cutmix: float = Field(
        0.0, ge=0, description="the same for the area cut from the second image (1905.04899)"
    )

    @property
    def does_anything(self) -> bool:
        return bool(self.rand_augment or self.mixup or self.cutmix)


class Mixing:
    """Applies a `MixingConfig`. With both mixup and CutMix, a coin decides for each image."""

    def __init__(self, config: MixingConfig, num_classes: int, channels: int = 3):
        self.config, self.num_classes = config, num_classes
        self.operations = rand_augment(config.magnitude, channels) if config.rand_augment else []

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`pixels` (batch, channels, height, width) in [-1, 1] and `labels` (batch,) → both augmented; mixing
        turns labels into shares of the classes, (batch, classes)."""
        config, pixels, labels = self.config, batch["pixels"], batch["labels"]
        for _ in range(config.rand_augment):
            pixels = self.augment(pixels)
        if config.mixup or config.cutmix:
            shares = F.one_hot(labels, self.num_classes).float()
            partner = torch.randperm(len(pixels))
            cut = torch.rand(len(pixels)) < (0.5 if config.mixup else 1.0) if config.cutmix else None
            weights = torch.zeros_like(pixels[:, :1])  # the partner's share of each pixel
            if config.mixup:
                weights += draw_beta(config.mixup, len(pixels))[:, None, None, None]
            if cut is not None:
                boxes = draw_boxes(draw_beta(config.cutmix, len(pixels)), *pixels.shape[-2:])
                weights = torch.where(cut[:, None, None, None], boxes[:, None], weights)
            pixels = torch.lerp(pixels, pixels[partner], weights)
            labels = torch.lerp(shares, shares[partner], weights.mean((2, 3)))
        return {**batch, "pixels": pixels, "labels": labels}

    def augment(self, pixels: Tensor) -> Tensor:
        """One randomly drawn operation of RandAugment per image."""
        chosen = torch.randint(len(self.operations), (len(pixels),))
        result = pixels.clone()
        for number, operation in enumerate(self.operations):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                changed = operation((pixels[rows] + 1) / 2).clamp(0, 1)
                result[rows] = changed * 2 - 1
        return result


def rand_augment(magnitude: float, channels: int) -> list[Any]:
    """kornia's operations one by one: as one module they would treat the whole batch alike."""
    from kornia.augmentation.auto.rand_augment import RandAugment  # takes a second; few runs need it
    from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

    policies = [policy for policy in default_policy if channels == 3 or policy[0][0] != "color"]
    return [RandAugment(n=1, m=magnitude, policy=[policy]) for policy in policies]


def draw_beta(alpha: float, number: int) -> Tensor:
    return torch.distributions.Beta(alpha, alpha).sample((number,))


def draw_boxes(areas: Tensor, height: int, width: int) -> Tensor:
    """Masks (number, height, width): 1 in a rectangle around a random point, 0 elsewhere. It covers the share
    `areas` (number,) of the image, unless it is cut at the border."""
    sides = areas.sqrt() / 2
    inside = []
    for size in (height, width):
        middle, half = torch.rand(len(areas)) * size, sides * size
        places = torch.arange(size) + 0.5
        inside.append((places - middle[:, None]).abs() < half[:, None])
    return (inside[0][:, :, None] & inside[1][:, None, :]).float()
