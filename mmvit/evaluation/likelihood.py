"""Held-out loss of a model: the mean of its own `loss` over every sample once."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[dict[str, Any]], count: str) -> dict[str, float]:
    """Averages the metrics of `model.loss` over `batches`, each weighted by its number of samples; one that
    is a mean over something else, as `text_loss` over captions' tokens, depends a little on the batches.

    Args:
        model: in evaluation mode, with `loss(batch) -> (scalar, metrics)`.
        batches: this process's part of one epoch, which may be empty. Where a process group exists, every
            process calls this and gets the figures of the whole.
        count: the entry of a batch whose length is its number of samples.

    Raises:
        ValueError: where there is no sample at all.
    """
    sums: dict[str, float] = {}
    samples = 0
    device = next(model.parameters()).device
    for batch in batches:
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        size = len(tensors[count])
        _, metrics = model.loss(tensors)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) * size
        samples += size
    parts: list[tuple[dict[str, float], int]] = [(sums, samples)]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (sums, samples))
    samples = sum(own for _, own in parts)
    if not samples:
        raise ValueError("no samples to evaluate on")
    names = dict.fromkeys(name for own, _ in parts for name in own)
    return {name: sum(own.get(name, 0.0) for own, _ in parts) / samples for name in names}
