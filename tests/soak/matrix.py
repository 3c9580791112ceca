"""Trains a small classifier under ZeRO 0 to 3 in every combination of settings, and compares it with plain
torch in one process on the same global batches.

    python tests/soak/matrix.py
    python tests/soak/matrix.py --processes 4 --precision bf16

Combined are stages, precision, accumulation, clipping, activation checkpointing, averaged weights and AdamW
or Muon: 256 runs of 4 steps for each number of processes. A run holds if its weights, averaged where that is
on, end near those of the reference: by the norm of the difference relative to that of all that was learnt. In
bf16 that is at most 1.5 of what bf16 alone makes of the reference.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import run_script
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.sharding import state_of
from mmvit.training import OptimizerConfig, Processes, Recipe, Session, TrainConfig
from mmvit.training.deepspeed_engine import building, import_deepspeed
from mmvit.training.distributed import free_port, open_processes
from mmvit.training.loop import build_engine

STEPS, BATCH = 4, 8
MOST = 0.01  # of what was learnt, in fp32
SETTINGS = {
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "accumulation": (1, 2),
    "clip_norm": (0.0, 0.3),
    "checkpointing": ("none", "blocks"),
    "ema_decay": (0.0, 0.8),
    "optimizer": ("adamw", "muon"),
}
VARIED = ("accumulation", "clip_norm", "checkpointing", "ema_decay")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", choices=SETTINGS["precision"], nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    print("processes | stage | precision | optimizer | tried | held | largest difference, of what is allowed")
    groups = (options.processes, SETTINGS["stage"], options.precision, SETTINGS["optimizer"])
    failed = 0
    for world, *group in itertools.product(*groups):  # each in new processes: engines do not quite go away
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder, "found")
            arguments = (world, free_port(), group, found)
            multiprocessing.start_processes(compare, arguments, nprocs=world, start_method="fork")
            tried, missed, worst = json.loads(found.read_text())
        print(world, *group, tried, tried - len(missed), f"{worst:.4f}", sep=" | ", flush=True)
        print(*missed, sep="\n", end="\n" if missed else "", flush=True)
        failed += len(missed)
    sys.exit(failed > 0)


def compare(rank: int, world: int, port: int, group: list, found: Path) -> None:
    """Runs the cases of a stage, precision and optimizer. Rank 0 writes what came out."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stage, precision, optimizer = group
    results = {}
    with open_processes("cpu", needs_group=True, timeout=120) as processes:
        for values in itertools.product(*(SETTINGS[name] for name in VARIED)):
            case = dict(zip(VARIED, values, strict=True), precision=precision, optimizer=optimizer)
            start = model_of(case).state_dict()
            alone = Processes(0, 1, processes.device)
            reference, ours = trained(case, None, alone), trained(case, stage, processes)
            most = MOST
            if precision == "bf16":
                most = 1.5 * distance(trained(case | {"precision": "fp32"}, None, alone), reference, start)
            results[str(case)] = distance(ours, reference, start) / most
        if processes.is_main:
            missed = [f"{case}: {off:.3f}" for case, off in results.items() if not off <= 1]
            found.write_text(json.dumps([len(results), missed, max(results.values())]))


def distance(found: dict, expected: dict, start: dict) -> float:
    """The norm of all differences relative to that of all changes since the `start`."""
    off = sum((found[name] - end).square().sum() for name, end in expected.items())
    moved = sum((end - start[name]).square().sum() for name, end in expected.items())
    return (off / moved).sqrt().item()


def model_of(case: dict) -> Classifier:
    torch.manual_seed(0)
    core = TransformerConfig(width=16, depth=2, num_heads=2, activation_checkpointing=case["checkpointing"])
    return Classifier(ClassifierConfig(image_size=8, patch_size=4, num_classes=4, core=core))


def trained(case: dict, stage: int | None, processes: Processes) -> dict[str, torch.Tensor]:
    """The weights after the steps; a `stage` of None is plain torch."""
    names = ("precision", "accumulation", "clip_norm", "ema_decay")
    train = TrainConfig(steps=STEPS, batch_size=BATCH, **{name: case[name] for name in names})
    optimizer = OptimizerConfig(name=case["optimizer"], lr=2e-2, warmup_steps=1)
    path = None if stage is None else settings_of(stage)
    recipe = Recipe(task="classifier", output=Path("unused"), train=train, optimizer=optimizer)
    session = Session(recipe, processes, run=None, deepspeed=path)
    with building(train, processes, path):
        engine = build_engine(session, model_of(case))
    own = BATCH // (case["accumulation"] * processes.world_size)
    for step in range(STEPS):
        for part in range(case["accumulation"]):
            first = step * BATCH + (part * processes.world_size + processes.rank) * own
            loss, _ = engine.loss(batch_of(range(first, first + own)))
            engine.backward(loss)
        engine.step(step + 1)
    with engine.evaluating() as model:
        return {name: tensor.clone() for name, tensor in state_of(model)}


def settings_of(stage: int) -> Path:
    """As configs/deepspeed has them, but in stage 3 everything is shared out."""
    tests = Path(__file__).resolve().parent.parent
    return (
        tests / "zero3_in_shards.json" if stage == 3 else tests.parent / f"configs/deepspeed/zero{stage}.json"
    )


def batch_of(numbers: range) -> dict[str, torch.Tensor]:
    pixels = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in numbers]
    return {"pixels": torch.stack(pixels), "labels": torch.tensor([n * 7 % 4 for n in numbers])}


if __name__ == "__main__":
    run_script(main)
