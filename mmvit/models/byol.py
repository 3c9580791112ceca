"""BYOL, "Bootstrap your own latent" (2006.07733): from one view of an image, an online network predicts the
output of a slowly moving copy of itself for another view."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.models.classifier import Classifier


class BYOLConfig(Config):
    """Settings of BYOL. The defaults are the paper's."""

    hidden: int = Field(4096, gt=0, description="units of the projector and the predictor")
    projection: int = Field(256, gt=0, description="dimensions in which views are compared")
    momentum: float = Field(0.996, ge=0, lt=1, description="initial momentum of the target; it rises to 1")


class BYOL(nn.Module):
    """A classifier without its head, a projector and a predictor, which learn; and the target, a moving
    average of classifier and projector.

    Args:
        steps: training steps in all, over which the target's momentum rises.
        accumulation: passes per step; the target moves once per step.
    """

    def __init__(self, classifier: Classifier, config: BYOLConfig, steps: int, accumulation: int = 1):
        super().__init__()
        self.config, self.total, self.accumulation = config, steps, accumulation
        self.classifier = classifier
        classifier.freeze_head()
        width = classifier.head.in_features
        self.projector = mlp(width, config.hidden, config.projection)
        self.predictor = mlp(config.projection, config.hidden, config.projection)
        self.target = nn.ModuleList([copy.deepcopy(classifier), copy.deepcopy(self.projector)])
        self.target.requires_grad_(False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))  # training passes so far

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """2 − 2 · cosine of prediction and target, summed over both views; 0 to 8.

        In training mode, the target first moves to the online network as the last step left it.

        Args:
            batch: `pixels` and `other_pixels`, two views, each (batch, channels, height, width).

        Returns:
            loss, and metrics: loss, `momentum`, and `spread`: the standard deviation of unit projections over
            the batch, averaged over dimensions and times √dimensions; 0 if all images have the same
            projection, about 1 if they are unrelated.
        """
        step, passes_of_step = divmod(int(self.passes), self.accumulation)
        momentum = target_momentum(self.config.momentum, step, self.total)
        if self.training:
            if step and not passes_of_step:
                self.follow(target_momentum(self.config.momentum, step - 1, self.total))
            self.passes += 1
        views = batch["pixels"], batch["other_pixels"]
        online = [self.projector(self.classifier.features(view)) for view in views]
        with torch.no_grad():
            classifier, projector = self.target
            targets = [projector(classifier.features(view)).float() for view in views]
        predicted = [self.predictor(projection).float() for projection in online]
        loss = sum(
            (2 - 2 * F.cosine_similarity(prediction, target, dim=1)).mean()
            for prediction, target in zip(predicted, reversed(targets), strict=True)
        )
        unit = F.normalize(targets[0], dim=1)
        spread = unit.std(0, correction=0).mean() * self.config.projection**0.5
        return loss, {"loss": loss.detach(), "momentum": torch.tensor(momentum), "spread": spread}

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Moves the target's parameters by 1 − `momentum` towards the online network's; its batch norms keep
        their own statistics."""
        for target, online in zip(self.target, (self.classifier, self.projector), strict=True):
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)


def target_momentum(start: float, step: int, total: int) -> float:
    """τ = 1 − (1 − start) · (cos(π step / total) + 1) / 2."""
    return 1 - (1 - start) * (math.cos(math.pi * min(step, total) / total) + 1) / 2


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))
