"""Held-out loss of a model: the mean of its own `loss` over all samples, however they are batched."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmvit.models.generator_transformer import GeneratorTransformer, counted_tokens
from mmvit.sharding import in_step


def generator_loss(model: GeneratorTransformer, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`mean_loss` of a generator: `loss`, `image_loss` in nats per code and, if it predicts captions,
    `text_loss` in nats per token."""
    figures = mean_loss(
        model, batches, "codes", lambda batch: {"text_loss": int(counted_tokens(batch["caption_ids"]).sum())}
    )
    if "text_loss" in figures:
        figures["loss"] = model.config.weigh(figures["text_loss"], figures["image_loss"])
    return figures


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    count: str,
    counts: Callable[[dict[str, Any]], Mapping[str, int]] = lambda batch: {},
) -> dict[str, float]:
    """Averages the metrics of `model.loss` over `batches`, each weighted by its number of samples.

    Args:
        model: in evaluation mode, with `loss(batch) -> (scalar, metrics)`.
        batches: this process's part of one epoch, which may be empty. In a process group every process calls
            this and gets the figures of the whole.
        count: the entry of a batch whose length is its number of samples.
        counts: for metrics that are means over something else than samples, how many a batch has, by name.

    Raises:
        ValueError: if there are no samples.
    """
    sums: Counter[str] = Counter()  # each metric's sum, and how many values went into it
    sizes: Counter[str] = Counter()
    device = next(model.parameters()).device
    for batch, counts_in in in_step(batches):
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        size, own = len(tensors[count]), counts(tensors)
        _, metrics = model.loss(tensors)
        if not counts_in:
            continue
        for name, value in metrics.items():
            weight = own.get(name, size)
            sums[name] += float(value) * weight
            sizes[name] += weight
    parts: list[tuple[Counter[str], Counter[str]]] = [(sums, sizes)]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (sums, sizes))
    names = dict.fromkeys(name for _, own in parts for name in own)
    if not names:
        raise ValueError("no samples to evaluate on")
    return {
        name: sum(sums[name] for sums, _ in parts) / sum(sizes[name] for _, sizes in parts) for name in names
    }
