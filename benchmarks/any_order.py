"""What raster order, and other ways of any order, cost and buy at equal training FLOPs.

    python benchmarks/any_order.py run --images 14400 --seeds 1 --log any-order.jsonl
    python benchmarks/any_order.py table any-order.jsonl

The base is the recipe emoji_demo. A variant whose steps cost more gets fewer of them. Held-out loss is in
nats per code of the 405 held-out combinations: in raster order of that order, otherwise of random orders, one
code at a time. Retrieval@1 and @5 among all images at guidance 2 and temperature 0.3, in 4 forwards for any
order. Mean and 95% interval of the seeds (Student's t). `table LOG --plot FILE` draws held-out loss against
epochs.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from studies import ROOT, cell, flops_of, interval, missing, read_log, retrieval, run_study, train, write_log

from mmvit.errors import run_script

SCRIPT, OTHERS = "pipelines/train_caption_to_image.py", "benchmarks/other_objectives.py"
ANY, RASTER = ROOT / "configs/emoji_demo.toml", ROOT / "configs/emoji_raster.toml"
BATCH, EVALUATIONS = 64, 5
TRAIN_IMAGES = 3485  # of emoji
BASE = "any order"
VARIANTS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    BASE: (SCRIPT, ANY, ()),
    "raster order": (SCRIPT, RASTER, ("--model.core.dropout", "0")),
    "raster order, dropout 0.1": (SCRIPT, RASTER, ()),
    "dropout 0.1": (SCRIPT, ANY, ("--model.core.dropout", "0.1")),
    "captions do not see codes": (SCRIPT, ANY, ("--model.attention", "prefix")),
    "code noise 0.1": (SCRIPT, ANY, ("--model.code_noise", "0.1")),
    "2-D rotary": (SCRIPT, ANY, ("--model.positions", "rotary_2d")),
    "batches of 32": (SCRIPT, ANY, ("--train.batch_size", "32")),
    "uniform share hidden": (OTHERS, ANY, ()),
    "every image counts alike": (OTHERS, ANY, ()),
}
OBJECTIVES = {"uniform share hidden": "uniform", "every image counts alike": "images"}


def main() -> None:
    budget = {"images": 14_400, "of": "the base"}
    run_study(__doc__, "any-order", measure, show, **budget, variants=VARIANTS, plot=plot)


def measure(options: argparse.Namespace) -> None:
    total = flops_of(SCRIPT, ANY) * options.images
    for seed, name in missing(options, options.only):
        began = time.monotonic()
        script, config, settings = VARIANTS[name]
        os.environ["OBJECTIVE"] = OBJECTIVES.get(name, "")
        batch = 32 if "--train.batch_size" in settings else BATCH
        steps = round(total / flops_of(script, config, settings) / batch)
        out = options.runs / f"{options.images}" / f"{name.replace(' ', '-')}-{seed}"
        often = max(1, steps // EVALUATIONS)
        every = ("--train.evaluate_every", often, "--train.checkpoint_every", often)
        own = ("--train.seed", seed, "--preview.captions", "[]", *every, *settings)
        found = train(script, config, out, steps, *own)
        minutes = (time.monotonic() - began) / 60
        curve = [
            [r["step"] * batch, r["image_loss"]]
            for r in read_log(out / "metrics.jsonl")
            if r["kind"] == "held_out"
        ]
        record = {
            "variant": name, "seed": seed, "images": options.images, "steps": steps, "flops": total,
            "loss": found["image_loss"], **measure_drawing(out), "minutes": minutes, "curve": curve,
        }  # fmt: skip
        write_log(options.log, record)


def measure_drawing(run: Path) -> dict[str, float]:
    first = retrieval(run)
    figures = json.loads((run / "last" / "evaluation-combinations.json").read_text())
    return {"retrieval": first, "retrieval@5": figures["retrieval@5"]}


def show(records: list[dict[str, Any]]) -> None:
    print("| | steps | nats per code | retrieval@1 | @5 | minutes |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(record["variant"] for record in records):
        rows = [record for record in records if record["variant"] == name]
        cells = [
            cell([scale * row[figure] for row in rows], digits)
            for figure, scale, digits in (("loss", 1, 3), ("retrieval", 100, 1), ("retrieval@5", 100, 1))
        ]
        minutes, _ = interval([row["minutes"] for row in rows])
        print(f"| {name} | {rows[0]['steps']} | {' | '.join(cells)} | {minutes:.1f} |")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against epochs, a line per variant: the mean of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(record["variant"] for record in records):
        curves = [record["curve"] for record in records if record["variant"] == name]
        images = [seen for seen, _ in curves[0]]
        losses = torch.tensor([[loss for _, loss in curve] for curve in curves]).mean(0)
        axes.plot([seen / TRAIN_IMAGES for seen in images], losses, marker=".", label=name)
    axes.set(xlabel="epochs", ylabel="held-out nats per code", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(main)
