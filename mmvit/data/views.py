"""Two views of every image, drawn image by image (BYOL, 2006.07733, appendix B).

Only the order in which brightness, contrast, saturation and hue change is drawn once per batch, by kornia.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmvit.config import Config


class ViewsConfig(Config):
    """The defaults are BYOL's. Pairs of numbers are for the first and the second view."""

    smallest_crop: float = Field(0.08, gt=0, le=1, description="share of the image's area")
    flip: float = Field(0.5, ge=0, le=1)
    jitter: float = Field(0.8, ge=0, le=1, description="probability of changing colours")
    jitter_strength: tuple[float, float, float, float] = Field(
        (0.4, 0.4, 0.2, 0.1), description="of brightness, contrast, saturation and hue"
    )
    grey: float = Field(0.2, ge=0, le=1)
    blur: tuple[float, float] = (1.0, 0.1)
    solarize: tuple[float, float] = (0.0, 0.2)


class Views:
    """`pixels` (batch, 3, height, width) in [-1, 1] → `pixels` and `other_pixels`, of that shape. Draws
    from torch's generator, whose state is part of a checkpoint."""

    def __init__(self, config: ViewsConfig, size: tuple[int, int]):
        self.augmentations = [build_augmentation(config, size, view) for view in (0, 1)]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit: Tensor = (batch["pixels"] + 1) / 2
        with torch.no_grad():
            one, other = (augment(unit).clamp(0, 1) * 2 - 1 for augment in self.augmentations)
        return {**batch, "pixels": one, "other_pixels": other}


def build_augmentation(config: ViewsConfig, size: tuple[int, int], view: int) -> nn.Module:
    import kornia.augmentation as K  # takes a second; few runs need it

    kernel = max(3, size[0] // 10 // 2 * 2 + 1)  # a tenth of the image, odd: 23 of 224 pixels
    return K.AugmentationSequential(
        K.RandomResizedCrop(size, scale=(config.smallest_crop, 1.0), ratio=(3 / 4, 4 / 3)),
        K.RandomHorizontalFlip(p=config.flip),
        K.ColorJitter(*config.jitter_strength, p=config.jitter),
        K.RandomGrayscale(p=config.grey),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=config.blur[view]),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=0.0, p=config.solarize[view]),
        data_keys=["input"],
    )
