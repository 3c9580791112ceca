"""What a core gains or loses by a second task, at equal training FLOPs.

    python benchmarks/one_core.py run --images 24000 --log one-core.jsonl
    python benchmarks/one_core.py table one-core.jsonl

A classifier and a generator of emoji: each alone, both on one core, and each started from the other's core.
The FLOPs are those of `--images` images for the generator. On one core, every step trains on as many images
with classes as with captions. With the other's core, half of the FLOPs go to the first task and half to the
second. Accuracy is over the nine groups of emoji, held out by whole emoji, most of which a generator has
seen with their captions. Loss in nats per code and retrieval@1 are of the held-out combinations, most of
which a classifier has seen, at guidance 2 and temperature 0.3. Mean and 95% interval of the seeds
(Student's t).
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from studies import ROOT, cell, flops_of, interval, missing, retrieval, run_study, train, write_log

from mmvit.errors import run_script

BATCH = 64
JOINT = ("pipelines/train_joint.py", ROOT / "configs/emoji_joint.toml")
GENERATOR = ("pipelines/train_caption_to_image.py", ROOT / "configs/emoji_raster.toml")
CLASSIFIER = ("pipelines/train_classifier.py", ROOT / "configs/emoji_groups.toml")
# the classifier's part of emoji_joint.toml
SAME_CORE = (
    "--model.core.width", "256", "--model.core.depth", "6", "--model.core.num_heads", "4",
    "--model.core.dropout", "0.1", "--train.ema_decay", "0.99", "--optimizer.lr", "2e-3",
    "--data.train", "data/emoji-groups/train-*.tar", "--data.augment.erase", "0.2",
    "--model.label_smoothing", "0",
)  # fmt: skip
# of all cores, so that one can begin with another's
PLAIN = ("--model.core.mlp", "gelu", "--model.core.qk_norm", "false")
RECIPES = {"joint": (JOINT, PLAIN), "generator": (GENERATOR, PLAIN), "classifier": (CLASSIFIER, SAME_CORE)}
# what is trained, one after the other, each from the core of the one before
VARIANTS: dict[str, tuple[str, ...]] = {
    "classifier alone": ("classifier",),
    "generator alone": ("generator",),
    "both on one core": ("joint",),
    "generator, then classifier": ("generator", "classifier"),
    "classifier, then generator": ("classifier", "generator"),
}


def main() -> None:
    budget = {"images": 24_000, "of": "a generator alone"}
    run_study(__doc__, "one-core", measure, show, **budget, variants=VARIANTS)


def measure(options: argparse.Namespace) -> None:
    total = flops_of(*GENERATOR, PLAIN) * options.images
    for seed, name in missing(options, options.only):
        began = time.monotonic()
        figures = train_stages(options, seed, VARIANTS[name], total)
        record = {"variant": name, "seed": seed, "images": options.images, "flops": total}
        write_log(options.log, {**record, **figures, "minutes": (time.monotonic() - began) / 60})


def train_stages(
    options: argparse.Namespace, seed: int, stages: Sequence[str], total: float
) -> dict[str, float]:
    """The figures of the last stage, each stage for its share of the FLOPs."""
    start: tuple[str, ...] = ()
    for number in range(len(stages)):
        recipe, settings = RECIPES[stages[number]]
        budget = total / len(stages)
        steps = round(budget / flops_of(*recipe, settings) / BATCH)
        share = "" if len(stages) == 1 else "-half"
        out = options.runs / f"{options.images}" / f"{'-then-'.join(stages[: number + 1])}{share}-{seed}"
        if stages[number] != "classifier":
            settings = (*settings, "--preview.captions", "[]")
        same = ("--train.seed", seed, "--train.batch_size", BATCH)
        found = train(*recipe, out, steps, *same, *settings, *start)
        start = ("--start.core", str(out / "last"))
    figures = {"accuracy": found["accuracy"]} if "accuracy" in found else {}
    if "image_loss" in found:
        figures |= {"loss": found["image_loss"], "retrieval": retrieval(out)}
    return figures


def show(records: list[dict[str, Any]]) -> None:
    print("| | accuracy | nats per code | retrieval@1 | minutes |\n|---|---|---|---|---|")
    for name in dict.fromkeys(record["variant"] for record in records):
        rows = [record for record in records if record["variant"] == name]
        cells = [
            cell([scale * row[figure] for row in rows if figure in row], digits)
            for figure, scale, digits in (("accuracy", 100, 1), ("loss", 1, 3), ("retrieval", 100, 1))
        ]
        minutes, _ = interval([row["minutes"] for row in rows])
        print(f"| {' | '.join([name, *cells, f'{minutes:.1f}'])} |")


if __name__ == "__main__":
    run_script(main)
