"""What training a recipe costs: parameters, FLOPs and memory, from shapes alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.cost import stem_activations, training_memory
from mmvit.models.registry import build_model
from mmvit.training.config import Recipe


def describe_cost(recipe: Recipe) -> list[str]:
    """Lines about a recipe's model and run. Nothing is allocated."""
    with torch.device("meta"):
        model = build_model(recipe.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    examples = recipe.train.steps * recipe.train.batch_size
    lines = [
        f"{parameters:,} parameters",
        f"{recipe.train.steps:,} steps of {recipe.train.batch_size}: {examples:,} examples",
    ]
    if flops := training_flops(model.train(), recipe):
        lines.append(f"{flops / 1e9:,.1f} GFLOP an example, {flops * examples / 1e15:,.3g} PFLOP in all")
    if core := getattr(recipe.model, "core", None):
        stem = stem_activations(recipe.model)
        average = recipe.train.ema_decay > 0
        memory = training_memory(
            parameters, core, model.positions.length, precision="fp32", average=average, stem=stem
        )
        per_pass = recipe.train.batch_size // recipe.train.accumulation
        lines.append(
            f"about {memory.state / 1e9:,.2f} GB of weights, gradients and moments, and "
            f"{memory.activations * per_pass / 1e9:,.2f} GB of activations for {per_pass} examples, in fp32 "
            "on one process"
        )
    return lines


def training_flops(model: nn.Module, recipe: Recipe) -> int:
    """FLOPs of one example's training step: matrix products and convolutions of the loss, times three for the
    backward pass. 0 for losses that cannot be traced on the meta device, and for pre-training's objectives.
    """
    if recipe.task == "pretraining":
        return 0
    batch = one_example(recipe.model, recipe)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            model.loss(batch)
        except (NotImplementedError, RuntimeError):  # asks for a value, which meta tensors do not have
            return 0
    return 3 * counter.get_total_flops()


def one_example(config: Any, recipe: Recipe) -> dict[str, Tensor]:
    """A batch of one without values, with everything that losses read."""
    parts = [config, getattr(config, "image", None), getattr(config, "classifier", None)]
    parts.append(getattr(config, "generator", None))
    batch = {"labels": torch.zeros(1, dtype=torch.long, device="meta")}
    size = getattr(getattr(recipe, "data", None), "image_size", None)
    for part in filter(None, parts):
        height_width = getattr(part, "height_width", size)
        if height_width:
            batch["pixels"] = torch.empty(1, getattr(part, "channels", 3), *height_width, device="meta")
        for name, length in (("caption_ids", "text_length"), ("codes", "num_codes")):
            if count := getattr(part, length, None):
                batch[name] = torch.zeros(1, count, dtype=torch.long, device="meta")
    return batch
