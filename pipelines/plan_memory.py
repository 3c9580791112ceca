"""Prints how much memory a GPU needs to train a model, for each ZeRO stage, number of GPUs and precision.

    python pipelines/plan_memory.py dalle-12b --gpus 64 256 1024 --memory 80
    python pipelines/plan_memory.py generator-b --gpus 1 8 --precision fp32 --ema

State is what does not grow with the batch: weights, gradients, AdamW's moments, and with --ema the average of
the weights. The last columns say how many examples then fit beside it into a GPU of --memory, without and
with activation checkpointing (`model.core.activation_checkpointing`): 0 where not one does, "no room" where
the state alone is too large. An estimate: buffers of communication, what is lost between allocations and the
logits are not counted, so leave a tenth free, more where a small core has a large vocabulary.
"""

import argparse
import itertools

import torch
from rich.console import Console
from rich.table import Table

from mmvit.errors import UserError, run_script
from mmvit.models.cost import stem_activations, training_memory
from mmvit.models.presets import PRESETS, preset
from mmvit.models.registry import build_model

GB = 1e9
STAGES = (0, 1, 2, 3)
PRECISIONS = ["bf16", "fp32"]


def main() -> None:
    options = parse_arguments()
    if min(options.gpus) < 1 or options.memory <= 0:
        raise UserError("--gpus and --memory are greater than 0")
    config = preset(options.name)
    core = getattr(config, "core", None)
    if core is None:
        known = ", ".join(name for name, each in PRESETS.items() if hasattr(each, "core"))
        raise UserError(
            f"{options.name} has no Transformer core, of which memory is planned here; these have: {known}"
        )
    with torch.device("meta"):
        model = build_model(config)
    parameters, tokens = sum(parameter.numel() for parameter in model.parameters()), model.positions.length
    stem = stem_activations(config)
    table = Table(
        title=f"{options.name}: {parameters:,} parameters, {tokens:,} tokens an example, "
        f"GPUs of {options.memory:g} GB"
    )
    for column in ("precision", "GPUs", "ZeRO", "state, GB a GPU", "examples a GPU", "with checkpointing"):
        table.add_column(column, justify="right")
    for precision, gpus, stage in itertools.product(options.precision, options.gpus, STAGES):
        fits = []
        for checkpointing in (False, True):
            shape = core.model_copy(update={"activation_checkpointing": checkpointing})
            memory = training_memory(
                parameters, shape, tokens, stage, gpus, precision, options.ema and stage < 3, stem
            )
            room = options.memory * GB - memory.state
            fits.append(f"{int(room // memory.activations):,}" if room >= 0 else "no room")
        table.add_row(precision, f"{gpus:,}", str(stage), f"{memory.state / GB:,.1f}", *fits)
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="a preset, of pipelines/list_presets.py")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of them (1 8 64)")
    parser.add_argument("--memory", type=float, default=80.0, help="of a GPU, in GB (%(default)s)")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of products (both)"
    )
    parser.add_argument("--ema", action="store_true", help="with an average of the weights (not in stage 3)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
