"""Where a classifier's prediction comes from: gradient times input (1312.6034, 1605.01713)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.models.classifier import Classifier
from mmvit.models.resnet import ResNet

CELLS = 14  # of a ResNet's map in each direction, as a ViT of 224 pixels has patches of 16


def saliency_maps(model: Classifier | ResNet, pixels: Tensor) -> Tensor:
    """How much each place of an image matters for the predicted class, (batch, height, width) from 0 to 1.

    It is the gradient of the class's lead over the runner-up, in logits, times the pixel's distance from the
    image's mean colour, by absolute value, averaged over patches.

    Unlike attention (mmvit.evaluation.attention_maps) it follows all that the network computes: where norms
    in the stem or earlier layers have spread what a patch shows, other tokens may attract the attention.

    Args:
        pixels: (batch, channels, height, width) in [-1, 1], of the model's size.
    """
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        first, second = model(pixels).topk(2).values.unbind(1)
        (gradient,) = torch.autograd.grad((first - second).sum(), pixels)
    away = pixels.detach() - pixels.detach().mean((2, 3), keepdim=True)
    matters = (gradient * away).abs().sum(1, keepdim=True)
    height, width = pixels.shape[-2:]
    grid = model.config.grid if isinstance(model, Classifier) else (min(CELLS, height), min(CELLS, width))
    cells = F.adaptive_avg_pool2d(matters.float(), grid)
    maps = F.interpolate(cells, (height, width), mode="bilinear", align_corners=False)[:, 0]
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
