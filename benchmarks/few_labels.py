"""How far a few labels go: a plain ViT from scratch against one that was pre-trained without labels, both for
the same FLOPs in all.

    python benchmarks/few_labels.py run fashion-mnist --images 120000 --log few-labels.jsonl
    python benchmarks/few_labels.py table few-labels.jsonl --plot few-labels.png

`run` calls the scripts of pipelines/ for each seed: scratch trains on 1%, 10% and 100% of the labels for the
FLOPs of `--images` supervised pictures; each pre-training takes three quarters of these FLOPs on the pictures
of the whole train split, and fine-tuning on the same labels the last quarter. FLOPs are counted from the real
objectives, views, targets and decoders included. A figure that the log has already is not measured again, so
a run that was stopped goes on.

`table` prints the mean of the seeds and its 95% interval (Student's t), and draws them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from speed import count_flops

from mmvit.config import load_config
from mmvit.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.01, 0.1, 1.0)
METHODS = ("scratch", "masked", "byol", "mae")
PRETRAINING = 0.75  # share of the FLOPs
BATCH = 64
FINE_TUNING = ("--optimizer.layer_decay", "0.8")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantile of t by the number of seeds
DATA: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (),
    "emoji-groups": (
        "--model.image_size", "64", "--model.patch_size", "8", "--model.num_classes", "9",
        "--data.augment.crop_padding", "4",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("data", choices=DATA)
    run.add_argument("--images", type=int, default=120_000, help="supervised pictures that the FLOPs are of")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--log", type=Path, default=Path("few-labels.jsonl"))
    run.add_argument("--runs", type=Path, default=Path("runs/few-labels"), help="where runs and shares go")
    table = commands.add_parser("table")
    table.add_argument("log", type=Path)
    table.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        measure(options)
    else:
        show(read_log(options.log), options.plot)


def measure(options: argparse.Namespace) -> None:
    options.runs.mkdir(parents=True, exist_ok=True)
    settings = DATA[options.data]
    supervised = cost(options, "vit", settings)
    total = supervised * options.images
    done = {(r["data"], r["method"], r["share"], r["seed"], r["images"]) for r in read_log(options.log)}
    for seed in range(options.seeds):
        for method in METHODS:
            start, left, began = None, total, time.monotonic()
            for share in SHARES:
                if (options.data, method, share, seed, options.images) in done:
                    continue
                if method != "scratch" and start is None:
                    start = options.runs / f"{options.data}-{method}-{seed}"
                    steps = round(PRETRAINING * total / cost(options, method, settings) / BATCH)
                    train(options, method, settings, start, seed, steps)
                    left = total * (1 - PRETRAINING)
                out = options.runs / f"{options.data}-{method}-{seed}-{share}"
                labels = ("--data.train", f"{take_share(options, share, seed)}/train-*.tar")
                more = () if start is None else ("--start.model", str(start), *FINE_TUNING)
                steps = round(left / supervised / BATCH)
                accuracy = train(options, "vit", (*settings, *labels, *more), out, seed, steps)
                record = {
                    "data": options.data, "method": method, "share": share, "seed": seed,
                    "images": options.images, "flops": total, "accuracy": accuracy,
                    "minutes": (time.monotonic() - began) / 60,
                }  # fmt: skip
                began = time.monotonic()
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)


def train(
    options: argparse.Namespace, name: str, settings: tuple[str, ...], out: Path, seed: int, steps: int
) -> float | None:
    """Runs the script of configs/fashion_mnist_NAME.toml with `settings`; returns the last accuracy."""
    script = "train_classifier" if name == "vit" else "pretrain_classifier"
    if not (out / "last").is_dir():
        call(
            f"pipelines/{script}.py", f"configs/fashion_mnist_{name}.toml", "--output", out,
            "--data.train", f"data/{options.data}/train-*.tar",
            "--data.held_out", f"data/{options.data}/test-*.tar",
            "--train.seed", seed, "--train.steps", steps, "--train.batch_size", BATCH,
            "--train.evaluate_every", steps, "--train.checkpoint_every", steps,
            "--optimizer.warmup_steps", max(1, steps // 20), *settings,
            *(("--resume",) if (out / "checkpoints").is_dir() else ()),
        )  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(r for r in reversed(records) if r["kind"] == "held_out").get("accuracy")


def take_share(options: argparse.Namespace, share: float, seed: int) -> Path:
    source = Path("data") / options.data
    if share == 1:
        return source
    out = options.runs / f"{options.data}-labels-{share}-{seed}"
    if not (out / "dataset.json").is_file():
        call("pipelines/take_share.py", source, out, "--share", share, "--seed", seed)
    return out


def call(script: str, *arguments: Any) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


def cost(options: argparse.Namespace, name: str, settings: tuple[str, ...]) -> float:
    """FLOPs of training on one picture, forward and backward, by the objective of a config."""
    import runpy

    script = "train_classifier" if name == "vit" else "pretrain_classifier"
    names = runpy.run_path(str(ROOT / f"pipelines/{script}.py"))
    recipe_class = names["ClassifierRecipe" if name == "vit" else "PretrainingRecipe"]
    recipe = load_config(recipe_class, ROOT / f"configs/fashion_mnist_{name}.toml", list(settings))
    objective = names["Classifier"](recipe.model) if name == "vit" else names["build_objective"](recipe)
    pixels = torch.randn(8, recipe.model.channels, *recipe.model.height_width)
    batch = {"pixels": pixels, "other_pixels": pixels, "labels": torch.zeros(8, dtype=torch.long)}
    return count_flops(lambda: objective.loss(batch)[0].backward()) / len(pixels)


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(records: list[dict[str, Any]], plot: Path | None) -> None:
    if not records:
        raise UserError("the log holds no figures yet")
    for data in dict.fromkeys(record["data"] for record in records):
        own = [record for record in records if record["data"] == data]
        print(f"\n{data}, {own[0]['flops'] / 1e12:.3g} TFLOP a figure\n")
        print("| | " + " | ".join(f"{share:.0%} of the labels" for share in SHARES) + " |")
        print("|---|" + "---|" * len(SHARES))
        for method, cells in summarise(own):
            print(f"| {method} | " + " | ".join(f"{100 * m:.1f} ± {100 * i:.1f}" for m, i in cells) + " |")
    if plot:
        draw(records, plot)


def summarise(records: list[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Mean and half of the 95% interval of every method by share."""
    for method in METHODS:
        cells = []
        for share in SHARES:
            found = [r["accuracy"] for r in records if (r["method"], r["share"]) == (method, share)]
            if not found:
                cells.append((float("nan"), float("nan")))
                continue
            spread = statistics.stdev(found) if len(found) > 1 else float("nan")
            quantile = STUDENT.get(len(found), 1.96)
            cells.append((statistics.mean(found), quantile * spread / len(found) ** 0.5))
        yield method, cells


def draw(records: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    data = list(dict.fromkeys(record["data"] for record in records))
    shares = [100 * share for share in SHARES]
    figure = Figure(figsize=(5 * len(data), 4), layout="constrained")
    for place, name in enumerate(data, start=1):
        axes = figure.add_subplot(1, len(data), place)
        for method, cells in summarise([record for record in records if record["data"] == name]):
            means, halves = ([100 * value for value in column] for column in zip(*cells, strict=True))
            axes.errorbar(shares, means, halves, label=method, marker="o", capsize=3)
        axes.set(xscale="log", xlabel="% of the labels", ylabel="test accuracy, %", title=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
