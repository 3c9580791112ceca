"""What training a recipe costs: parameters, FLOPs and memory, from shapes alone."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.activations import Device, Precision, activations, example_batch
from mmvit.models.cost import training_state
from mmvit.models.registry import build_model
from mmvit.training.config import Recipe
from mmvit.training.distributed import choose_device, choose_precision


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
    device = choose_device(recipe.train.device, local_rank=0)
    precision = "fp32" if choose_precision(recipe.train.precision, device) == torch.float32 else "bf16"
    state = training_state(parameters, precision=precision, average=recipe.train.ema_decay > 0)
    per_pass = recipe.train.batch_size // recipe.train.accumulation
    memory = f"about {state.total / 1e9:,.2f} GB of weights, gradients and moments"
    if size := activations_of(recipe, "cpu" if device.type == "cpu" else "cuda", precision):
        memory += f", and {size * per_pass / 1e9:,.2f} GB of activations for {per_pass} examples"
    return [*lines, f"{memory}, in {precision} on one {device.type.upper()}"]


def activations_of(recipe: Recipe, device: Device, precision: Precision) -> float:
    """The most bytes of an example's activations in use at any moment of a step. 0 for losses that cannot be
    traced, and for pre-training's objectives."""
    if recipe.task == "pretraining":
        return 0.0
    try:
        return activations(recipe.model, device, precision, image_size=image_size(recipe)).peak
    except (NotImplementedError, RuntimeError):  # asks for a value
        return 0.0


def training_flops(model: nn.Module, recipe: Recipe) -> int:
    """FLOPs of one example's training step: matrix products and convolutions of the loss, times three for the
    backward pass. 0 for losses that cannot be traced on the meta device, and for pre-training's objectives.
    """
    if recipe.task == "pretraining":
        return 0
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            model.loss(example_batch(recipe.model, 1, image_size(recipe)))
        except (NotImplementedError, RuntimeError):  # asks for a value, which meta tensors do not have
            return 0
    return 3 * counter.get_total_flops()


def image_size(recipe: Recipe) -> tuple[int, int] | None:
    """Of the images that a model for any size is trained on."""
    return getattr(getattr(recipe, "data", None), "image_size", None)
