"""Top-1 and top-5 accuracy of a classifier over data that processes share; test-time augmentation."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmvit.models.classifier import Classifier
from mmvit.sharding import in_step


@torch.no_grad()
def classification_metrics(model: Classifier, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean `loss` (cross-entropy without label smoothing), `accuracy`, and with more than five classes
    `top5_accuracy`.

    Args:
        model: in evaluation mode.
        batches: this process's part of one epoch, with `pixels` and `labels`. In a process group every
            process calls this and gets the figures of the whole.

    Raises:
        ValueError: if there are no samples.
    """
    device = next(model.parameters()).device
    loss, correct, in_five, samples = sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch, counts in in_step(batches):
        pixels, labels = batch["pixels"].to(device), batch["labels"].to(device)
        logits = model(pixels).float()  # (batch, classes)
        if not counts:
            continue
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == labels[:, None]  # (batch, 5)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += hits[:, 0].sum()
        in_five += hits.any(1).sum()
        samples += len(labels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not samples:
        raise ValueError("no samples to evaluate on")
    metrics = {"loss": (loss / samples).item(), "accuracy": (correct / samples).item()}
    if model.config.num_classes > 5:
        metrics["top5_accuracy"] = (in_five / samples).item()
    return metrics


def shifted_and_mirrored(pixels: Tensor, shift: int = 0, mirror: bool = False) -> list[Tensor]:
    """Copies for test-time augmentation: pixels (batch, channels, height, width) as they are; with `shift`
    also moved by so many pixels down, up, right and left, the border repeated; with `mirror` each of these
    mirrored, too."""
    copies = [pixels]
    if shift:
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, [shift] * 4, mode="replicate")
        for top, left in ((0, shift), (2 * shift, shift), (shift, 0), (shift, 2 * shift)):
            copies.append(padded[..., top : top + height, left : left + width])
    return copies + [copy.flip(-1) for copy in copies] if mirror else copies
