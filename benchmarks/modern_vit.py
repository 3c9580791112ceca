"""What each part of a small modern ViT buys: the plain ViT with one part changed at a time, at equal FLOPs.

    python benchmarks/modern_vit.py run --images 60000 --log modern-vit.jsonl
    python benchmarks/modern_vit.py run --images 60000 --log modern-vit.jsonl --together SwiGLU "mean pooling"
    python benchmarks/modern_vit.py table modern-vit.jsonl

A part that makes a step more expensive gets fewer steps, a cheaper one more. Muon's own products are not
counted, but minutes are shown. The plain ViT is the recipe fashion_mnist_vit, on the 10,000 test images of
Fashion-MNIST; mean and 95% interval of the seeds (Student's t). --together measures several parts in one
model.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from studies import ROOT, cell, flops_of, interval, missing, run_study, train, write_log

from mmvit.errors import UserError, run_script

RECIPE = ("pipelines/train_classifier.py", ROOT / "configs/fashion_mnist_vit.toml")
BATCH = 64
SMALL, SMALL_SHARE = ("--model.image_size", "20"), 0.5  # where progressive resolution begins, for how long
PROGRESSIVE = "progressive resolution"
PLAIN = "plain ViT"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "convolutional stem": ("--model.stem", "conv"),
    "residual stem": ("--model.stem", "residual", "--model.stem_width", "48"),
    "mean pooling": ("--model.pooling", "mean"),
    "2-D rotary": ("--model.positions", "rotary_2d"),
    "row + column positions": ("--model.positions", "learned_2d"),
    "RMSNorm": ("--model.core.norm", "rmsnorm"),
    "SwiGLU": ("--model.core.mlp", "swiglu"),
    "QK-norm": ("--model.core.qk_norm", "true"),
    "LayerScale 0.1": ("--model.core.layer_scale", "0.1"),
    "4 registers": ("--model.registers", "4"),
    "patch dropout 0.5": ("--model.patch_dropout", "0.5"),
    "AdamW": ("--optimizer.name", "adamw", "--optimizer.lr", "1e-3"),
    PROGRESSIVE: (),
    "the preset vit-modern": ("--model.preset", "vit-modern"),
}


def main() -> None:
    budget = {"images": 60_000, "of": "the plain ViT"}
    run_study(__doc__, "modern-vit", measure, show, **budget, variants=VARIANTS, extend=add_options)


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--together", nargs="+", choices=[name for name in VARIANTS if VARIANTS[name]], metavar="VARIANT",
        help="measure these in one model, instead of each alone",
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    variants = {name: VARIANTS[name] for name in options.only}
    if options.together:
        settings = tuple(word for name in options.together for word in VARIANTS[name])
        if len(set(settings[::2])) < len(settings[::2]):
            raise UserError(f"{' and '.join(options.together)} set the same thing twice: leave one out")
        variants = {" + ".join(options.together): settings}
    total = flops_of(*RECIPE) * options.images
    for seed, name in missing(options, variants):
        began = time.monotonic()
        out = options.runs / f"{options.images}" / f"{name.replace(' ', '-')}-{seed}"
        if name == PROGRESSIVE:
            small = out.with_name(f"{out.name}-small")
            before = train_for(total * SMALL_SHARE, small, seed, *SMALL)
            found = train_for(total * (1 - SMALL_SHARE), out, seed, start=small)
            examples = before["examples"] + found["examples"]
        else:
            found = train_for(total, out, seed, *variants[name])
            examples = found["examples"]
        minutes = (time.monotonic() - began) / 60
        record = {
            "variant": name, "seed": seed, "images": options.images, "flops": total,
            "accuracy": found["accuracy"], "examples": examples, "minutes": minutes,
        }  # fmt: skip
        write_log(options.log, record)


def train_for(
    budget: float, out: Path, seed: int, *settings: str, start: Path | None = None
) -> dict[str, Any]:
    """Trains for `budget` FLOPs; returns the last held-out figures."""
    steps = round(budget / flops_of(*RECIPE, settings) / BATCH)
    more = () if start is None else ("--start.model", start)
    same = ("--train.seed", seed, "--train.batch_size", BATCH)
    return train(*RECIPE, out, steps, *same, *settings, *more)


def show(records: list[dict[str, Any]]) -> None:
    print("| | accuracy | against the plain ViT | images | minutes |\n|---|---|---|---|---|")
    plain = {r["seed"]: r["accuracy"] for r in records if r["variant"] == PLAIN}
    for name in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == name]
        accuracy = cell([100 * record["accuracy"] for record in own], 2)
        gain = cell([100 * (r["accuracy"] - plain[r["seed"]]) for r in own if r["seed"] in plain], 2, "+")
        minutes, _ = interval([record["minutes"] for record in own])
        print(f"| {name} | {accuracy} | {gain} | {own[0]['examples']:,} | {minutes:.1f} |")


if __name__ == "__main__":
    run_script(main)
