"""The cost of running and training models, computed from their shapes: nothing is allocated."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.activations import Precision
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.registry import build_model
from mmvit.models.resnet import ResNetConfig


def forward_macs(config: ClassifierConfig | ResNetConfig) -> int:
    """Multiply-adds of all matrix products and convolutions in one image's forward pass. Norms, activations
    and softmax are not counted, as usual. FLOPs are twice as many."""
    if isinstance(config, ClassifierConfig):  # the counter does not see a fused kernel's products
        plain = config.core.model_copy(update={"attention_kernel": "plain"})
        config = config.model_copy(update={"core": plain})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_model(config).eval()
        model(torch.empty(1, config.channels, *config.height_width))
    return counter.get_total_flops() // 2


def training_flops(macs: int, images: float) -> float:
    """FLOPs of training on `images` images in all: a step costs about three forward passes of 2 · `macs`
    FLOPs."""
    return 6 * macs * images


@dataclass(frozen=True)
class State:
    """The memory of one process in training that does not grow with the batch, in bytes."""

    weights: float
    gradients: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.average


def training_state(
    parameters: int,
    stage: int = 0,
    processes: int = 1,
    precision: Precision = "bf16",
    average: bool = False,
) -> State:
    """An estimate for AdamW under ZeRO `stage` (1910.02054) with our engines: weights, gradients and both
    moments in float32, to which bf16 adds a copy of the weights. Communication buffers and fragmentation are
    not counted.

    Args:
        parameters: of the whole model.
        average: whether a moving average of the weights is kept (`train.ema_decay`).
    """
    share = 1 / processes
    of_weights, of_gradients, of_moments = (share if stage >= first else 1.0 for first in (3, 2, 1))
    copies = 2 if precision == "bf16" else 0
    master = 4 * share if stage in (1, 2) else 0  # DeepSpeed updates a flat copy of its own part
    return State(
        weights=parameters * ((4 + copies) * of_weights + master),
        gradients=parameters * 4 * of_gradients,
        moments=parameters * 8 * of_moments,
        average=parameters * 4 * average,
    )
