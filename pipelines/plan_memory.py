"""Estimate the GPU memory that training needs, by ZeRO stage, number of GPUs and precision.

    mmvit plan dalle-12b --gpus 64,256,1024 --memory 80
    mmvit plan generator-b --gpus 1,8 --precision fp32 --ema

State is what does not grow with the batch: weights, gradients, AdamW's moments, and with --ema the average of
the weights. The last columns are the examples that fit into a GPU of --memory beside it, without and with
activation checkpointing (`model.core.activation_checkpointing`): 0 if not one fits, "no room" if the state
alone is too large. Communication buffers, fragmentation and the logits are not counted: leave a tenth free,
more for a small core with a large vocabulary.
"""

import itertools
from typing import Annotated, Literal

import torch
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.errors import UserError
from mmvit.models.cost import stem_activations, training_memory
from mmvit.models.presets import PRESETS, preset
from mmvit.models.registry import build_model

GB = 1e9
STAGES = (0, 1, 2, 3)


def main(
    name: Annotated[str, Argument(help="a preset, see mmvit presets")],
    gpus: Annotated[str, Option(help="numbers of GPUs")] = "1,8,64",
    memory: Annotated[float, Option(help="memory of a GPU in GB")] = 80.0,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, Option(help="precision of products (default: both)")
    ] = None,
    ema: Annotated[bool, Option("--ema", help="keep averaged weights (not in stage 3)")] = False,
) -> None:
    config = preset(name)
    core = getattr(config, "core", None)
    if core is None:
        known = ", ".join(name for name, each in PRESETS.items() if hasattr(each, "core"))
        raise UserError(f"{name} has no Transformer core, whose memory this estimates; choose from {known}")
    if memory <= 0:
        raise UserError(f"--memory must be greater than 0, got {memory:g}")
    numbers = parse_numbers(gpus)
    with torch.device("meta"):
        model = build_model(config)
    parameters, tokens = sum(parameter.numel() for parameter in model.parameters()), model.positions.length
    stem = stem_activations(config)
    table = Table(
        title=f"{name}: {parameters:,} parameters, {tokens:,} tokens per example, GPUs of {memory:g} GB"
    )
    for column in ("precision", "GPUs", "ZeRO", "state, GB/GPU", "examples/GPU", "with checkpointing"):
        table.add_column(column, justify="right")
    precisions = [precision] if precision else ["bf16", "fp32"]
    for kind, number, stage in itertools.product(precisions, numbers, STAGES):
        fits = []
        for checkpointing in ("none", "blocks"):
            shape = core.model_copy(update={"activation_checkpointing": checkpointing})
            needed = training_memory(parameters, shape, tokens, stage, number, kind, ema and stage < 3, stem)
            room = memory * GB - needed.state
            fits.append(f"{int(room // needed.activations):,}" if room >= 0 else "no room")
        table.add_row(kind, f"{number:,}", str(stage), f"{needed.state / GB:,.1f}", *fits)
    Console().print(table)


def parse_numbers(text: str) -> list[int]:
    """`8,64` → [8, 64]. Raises UserError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus: expected numbers greater than 0, such as 8,64, got {text}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_script(main)
