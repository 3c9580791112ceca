"""What a classifier costs to run and to train, from its shape alone: nothing is allocated."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import ResNet, ResNetConfig


def forward_macs(config: ClassifierConfig | ResNetConfig) -> int:
    """Multiply-adds of one image's forward pass: all products of matrices, and convolutions. Norms,
    activations and softmax are not counted, as usual. FLOPs are twice as many."""
    kind = ResNet
    if isinstance(config, ClassifierConfig):
        plain = config.core.model_copy(update={"attention_kernel": "plain"})  # whose products are seen
        kind, config = Classifier, config.model_copy(update={"core": plain})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = kind(config).eval()
        model(torch.empty(1, config.channels, *config.height_width))
    return counter.get_total_flops() // 2


def training_flops(macs: int, images: float) -> float:
    """FLOPs of training on `images` in all: a step takes about three forward passes, whose FLOPs are twice
    their `macs`."""
    return 6 * macs * images
