"""Attention rollout (Abnar & Zuidema, 2005.00928), as the ViT paper draws it: which patches a prediction is
mixed from, not which of them matter (mmvit.evaluation.saliency)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.core.attention import Attention
from mmvit.core.positions import relative_logits
from mmvit.models.classifier import Classifier


@torch.no_grad()
def attention_weights(classifier: Classifier, pixels: Tensor) -> list[Tensor]:
    """The attention of every block to `pixels` (batch, channels, height, width): (batch, heads, tokens,
    tokens), rows with sum 1. Computed by plain products, whatever kernel the model uses."""
    found: list[Tensor] = []

    def keep(attention: Attention, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, positions, _ = inputs
        query, key, _ = attention.heads(x, positions)
        logits = (query * attention.head_dim**-0.5) @ key.transpose(-1, -2)
        if positions.offsets is not None:
            logits = logits + relative_logits(query, positions.offsets)
        found.append(logits.float().softmax(-1))

    hooks = [block.attention.register_forward_hook(keep) for block in classifier.core.blocks]
    try:
        classifier.features(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def rollout(weights: list[Tensor]) -> Tensor:
    """How much of each input token is in each output token, (batch, tokens, tokens): the product over blocks
    of the heads' mean attention, averaged with the identity for the residual path."""
    mixed = None
    for layer in weights:
        mean = layer.mean(1)
        own = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = own if mixed is None else own @ mixed
    return mixed


def attention_maps(classifier: Classifier, pixels: Tensor) -> Tensor:
    """The rollout from [CLS], or from the mean of all patches, to the patches, as maps of the images' size
    (batch, height, width) from 0 to 1.

    The strongest twentieth of the places is 1, so that one strong patch does not leave the rest dark.
    """
    mixed = rollout(attention_weights(classifier, pixels))
    prefix = classifier.num_prefix
    read = mixed[:, :1] if classifier.config.pooling == "cls" else mixed[:, prefix:]
    grid = read[:, :, prefix:].mean(1).unflatten(1, classifier.config.grid)[:, None]
    sized = F.interpolate(grid, pixels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    strong = sized.flatten(1).quantile(0.95, dim=1)[:, None, None]
    return (sized / strong).clamp(max=1)
