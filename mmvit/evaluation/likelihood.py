"""Held-out loss of a model: the mean of its own `loss` over every sample once, whatever the batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmvit.models.generator_transformer import GeneratorTransformer, counted_tokens


def generator_loss(model: GeneratorTransformer, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """`mean_loss` of a generator (loss, image_loss, and text_loss where it predicts captions), in nats for
    each code and each token of a caption."""
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
        batches: this process's part of one epoch, which may be empty. Where a process group exists, every
            process calls this and gets the figures of the whole.
        count: the entry of a batch whose length is its number of samples.
        counts: of how much in a batch a metric is the mean, by its name, where it is not of samples.

    Raises:
        ValueError: where there is no sample at all.
    """
    sums: Counter[str] = Counter()  # of a metric, and how many went into it
    sizes: Counter[str] = Counter()
    device = next(model.parameters()).device
    for batch in batches:
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        size, own = len(tensors[count]), counts(tensors)
        _, metrics = model.loss(tensors)
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
