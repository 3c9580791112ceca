"""Input and loss of every classifier."""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from mmvit.errors import UserError

if TYPE_CHECKING:
    from mmvit.models.classifier import ClassifierConfig
    from mmvit.models.resnet import ResNetConfig

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)


class FitBatch:
    """Converts batches of colour images to what a classifier of `config` reads: colour or grey.

    Raises:
        UserError: for a classifier of other channels.
    """

    def __init__(self, config: "ClassifierConfig | ResNetConfig"):
        if config.channels not in (1, len(LUMA)):
            raise UserError(
                f"model.channels is {config.channels}, but images have 3: set it to 3, or to 1 for grey"
            )
        self.config = config

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`pixels` and, if present, `other_pixels`, each (batch, 3, height, width) → (batch, channels,
        ...)."""
        if self.config.channels == len(LUMA):
            return batch
        names = [name for name in ("pixels", "other_pixels") if name in batch]
        return batch | {name: fit_pixels(batch[name], self.config) for name in names}


def fit_pixels(pixels: Tensor, config: "ClassifierConfig | ResNetConfig") -> Tensor:
    """pixels (batch, 3, height, width) as a classifier of `config` reads them: resized to its size, and
    reduced to luma if it reads grey images."""
    if config.channels == 1:
        pixels = (pixels * pixels.new_tensor(LUMA).view(1, -1, 1, 1)).sum(1, keepdim=True)
    if tuple(pixels.shape[-2:]) != config.height_width:
        pixels = F.interpolate(pixels, config.height_width, mode="bilinear", antialias=True)
    return pixels


def classification_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of `logits` (batch, classes) with `labels`: one class per image (batch,), or shares of
    all classes (batch, classes). The metrics are loss and accuracy, for shares that of the largest."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    largest = labels.argmax(-1) if labels.ndim == 2 else labels
    return loss, {"loss": loss.detach(), "accuracy": (logits.argmax(-1) == largest).float().mean()}
