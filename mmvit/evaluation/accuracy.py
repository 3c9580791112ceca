"""Top-1 and top-5 accuracy of a classifier over a data set that its processes share; views of a picture."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmvit.models.classifier import Classifier


@torch.no_grad()
def classification_metrics(model: Classifier, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean `loss` (cross-entropy without label smoothing), `accuracy`, and `top5_accuracy` for 6 or more.

    Args:
        model: in evaluation mode.
        batches: this process's part of one epoch, with `pixels` and `labels`. Where a process group exists,
            every process calls this and gets the figures of the whole.

    Raises:
        ValueError: where there is no sample at all.
    """
    device = next(model.parameters()).device
    loss, right, in_five, samples = sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        pixels, labels = batch["pixels"].to(device), batch["labels"].to(device)
        logits = model(pixels).float()  # (batch, classes)
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == labels[:, None]  # (batch, 5)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += hits[:, 0].sum()
        in_five += hits.any(1).sum()
        samples += len(labels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not samples:
        raise ValueError("no samples to evaluate on")
    metrics = {"loss": (loss / samples).item(), "accuracy": (right / samples).item()}
    if model.config.num_classes > 5:
        metrics["top5_accuracy"] = (in_five / samples).item()
    return metrics


def views_of(pixels: Tensor, shift: int = 0, mirror: bool = False) -> list[Tensor]:
    """Pixels (batch, channels, height, width) and, where asked for, the same moved by `shift` pixels down,
    up, right and left, the border repeated; then each of these mirrored. What a classifier says of them may
    be averaged."""
    views = [pixels]
    if shift:
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, [shift] * 4, mode="replicate")
        for top, left in ((0, shift), (2 * shift, shift), (shift, 0), (shift, 2 * shift)):
            views.append(padded[..., top : top + height, left : left + width])
    return views + [view.flip(-1) for view in views] if mirror else views
