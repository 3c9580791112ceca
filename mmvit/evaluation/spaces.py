"""Where Fréchet distances are measured: a space of features, with its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmvit.evaluation.frechet import coarse_pixels, frechet_distance
from mmvit.models.classifier import Classifier
from mmvit.models.perceptual import fit_pixels


@dataclass(frozen=True)
class FeatureSpace:
    """`features`: pixels (pictures, 3, height, width) in [-1, 1] → (pictures, dimensions)."""

    name: str
    features: Callable[[Tensor], Tensor]

    def distance(self, one: Tensor, two: Tensor) -> float:
        """The Fréchet distance of two sets of pictures, as pixels."""
        return frechet_distance(self.features(one), self.features(two))


def feature_space(classifier: Path | None) -> FeatureSpace:
    """Mean colours of 8x8 cells; or what the head of a classifier of ours reads, named by its folder."""
    if classifier is None:
        return FeatureSpace("pixels-8x8", coarse_pixels)
    model = Classifier.from_pretrained(classifier)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        return torch.cat([model.features(fit_pixels(part, model.config)) for part in pixels.split(64)])

    folder = classifier.resolve()
    return FeatureSpace((folder.parent if folder.name in ("best", "last") else folder).name, features)
