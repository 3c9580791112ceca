"""Estimate the GPU memory that training needs, by ZeRO stage, number of GPUs and precision.

    mmvit plan dalle-12b --gpus 64,256,1024 --memory 80
    mmvit plan generator-b --gpus 1,8 --precision fp32 --ema

State is what does not grow with the batch: weights, gradients, AdamW's moments, and with --ema the average
of the weights. The last columns are the examples that fit into a GPU of --memory beside it, without
checkpointing activations and with (`model.core.activation_checkpointing`): 0 if not one fits, "no room" if
the state alone is too large. Communication buffers and fragmentation are not counted: leave a tenth free.
"""

import itertools
from typing import Annotated, Literal

import torch
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.models.activations import activations
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.cost import training_state
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.presets import PRESETS, preset
from mmvit.models.registry import build_model
from mmvit.models.resnet import ResNetConfig

GB = 1e9
STAGES = (0, 1, 2, 3)
WAYS = ("none", "blocks", "attention")  # of checkpointing activations
PLANNED = (ClassifierConfig, ResNetConfig, GeneratorConfig)  # models whose losses can be traced


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
    if not isinstance(config, PLANNED):
        others = ", ".join(name for name, each in PRESETS.items() if isinstance(each, PLANNED))
        raise UserError(f"the training of {name} cannot be planned; choose from {others}")
    if memory <= 0:
        raise UserError(f"--memory must be greater than 0, got {memory:g}")
    numbers = parse_numbers(gpus)
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kinds = [precision] if precision else ["bf16", "fp32"]
    table = Table(title=f"{name}: {parameters:,} parameters, GPUs of {memory:g} GB")
    ways = checkpointed(config)
    titles = {"none": "examples/GPU", "blocks": "blocks checkpointed", "attention": "attention"}
    for column in ("precision", "GPUs", "ZeRO", "state, GB/GPU", *(titles[way] for way in ways)):
        table.add_column(column, justify="right")
    for kind in kinds:
        examples = [activations(each, precision=kind).peak for each in ways.values()]
        for number, stage in itertools.product(numbers, STAGES):
            state = training_state(parameters, stage, number, kind, ema and stage < 3)
            room = memory * GB - state.total
            fits = [f"{int(room // size):,}" if room >= 0 else "no room" for size in examples]
            table.add_row(kind, f"{number:,}", str(stage), f"{state.total / GB:,.1f}", *fits)
    Console().print(table)


def checkpointed(config: Config) -> dict[str, Config]:
    """A model's configuration by what is checkpointed: without, and if it has a core, with each way."""
    if (core := getattr(config, "core", None)) is None:
        return {"none": config}
    cores = {way: core.model_copy(update={"activation_checkpointing": way}) for way in WAYS}
    return {way: config.model_copy(update={"core": each}) for way, each in cores.items()}


def parse_numbers(text: str) -> list[int]:
    """`8,64` → [8, 64]. Raises UserError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus: expected numbers greater than 0, such as 8,64, got {text}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_script(main)
