"""Perceptual distances: how far apart two images are in the features of a frozen network."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.models.classification import LUMA, fit_pixels
from mmvit.models.classifier import Classifier


class FrozenDistance(nn.Module):
    """Two batches of pixels (batch, 3, height, width), about in [-1, 1] → their distances (batch,).

    A subclass ends its constructor with `self.freeze()`. It then stays in evaluation mode, its parameters
    have no gradients, and copies share it.
    """

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError when images of that size cannot be compared."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def __deepcopy__(self, memo: dict) -> Self:
        return self


class FeatureDistance(FrozenDistance):
    """The distance of two images in a classifier's features: LPIPS with weights of 1 (1801.03924, equation
    1).

    After each of the chosen blocks, every token's vector is normalised to length 1. The distance is the
    squared difference of these vectors, 0 to 4, averaged over tokens and depths. `fit_pixels` prepares the
    pixels.

    Args:
        classifier: frozen and put into evaluation mode here, also for other users of the same object.
        depths: numbers of the core's blocks, from 1; all by default.

    Raises:
        UserError: when the classifier reads neither colour nor grey images.
        ValueError: for a depth that the core does not have.
    """

    def __init__(self, classifier: Classifier, depths: Sequence[int] | None = None):
        super().__init__()
        blocks, channels = classifier.core.blocks, classifier.config.channels
        if channels not in (1, len(LUMA)):
            raise UserError(
                f"a classifier of {channels} channels cannot compare images, which have 3: use one with "
                "model.channels 3 or 1"
            )
        self.depths = tuple(range(1, len(blocks) + 1) if depths is None else depths)
        if not self.depths or not 1 <= min(self.depths) <= max(self.depths) <= len(blocks):
            raise ValueError(f"depths must be 1 to {len(blocks)}, got {self.depths}")
        self.classifier = classifier
        self.freeze()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        pairs = zip(self.features(one), self.features(two), strict=True)
        return torch.stack([(a - b).square().sum(-1).mean(-1) for a, b in pairs]).mean(0)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Vectors of length 1 after each chosen block, each (batch, tokens, width), float32."""
        found: list[Tensor] = []
        hooks = [
            self.classifier.core.blocks[depth - 1].register_forward_hook(
                lambda block, inputs, output: found.append(output)
            )
            for depth in self.depths
        ]
        try:
            self.classifier.features(fit_pixels(pixels, self.classifier.config))
        finally:
            for hook in hooks:
                hook.remove()
        return [F.normalize(tokens.float(), dim=-1) for tokens in found]
