"""How far a few labels go: a plain ViT from scratch against pre-trained ones, at equal FLOPs.

    python benchmarks/few_labels.py run fashion-mnist --images 120000 --log few-labels.jsonl
    python benchmarks/few_labels.py table few-labels.jsonl --plot few-labels.png

`run` trains for each seed: from scratch on 1%, 10% and 100% of the labels, for the FLOPs of `--images`
supervised images; or half of these FLOPs on pre-training with the images of the whole train split, and the
other half on fine-tuning with the same labels. FLOPs are counted from the real objectives, including views,
targets and decoders. The log has the `examples` (in pre-training, in training) and `minutes` of both.
Figures that the log has already are not measured again, so a stopped run continues.

`table` prints the mean of the seeds and its 95% interval (Student's t), and draws them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studies import ROOT, call, cell, flops_of, interval, read_log, train, write_log

from mmvit.errors import UserError, run_script

SHARES = (0.01, 0.1, 1.0)
SCRATCH = "scratch"
NAMES = {SCRATCH: "scratch", "masked": "masked patches", "byol": "BYOL", "mae": "MAE"}
METHODS = tuple(NAMES)
PRETRAINING = 0.5  # share of the FLOPs; with 0.75, and rates that fall by layer, fine-tuning was too short
BATCH = 64
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
    run.add_argument(
        "--images", type=int, default=120_000, help="supervised images whose FLOPs are the budget"
    )
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
    runs = options.runs / f"{options.data}-{options.images}"
    runs.mkdir(parents=True, exist_ok=True)
    total = flops(SCRATCH, options.data) * options.images
    done = {(r["data"], r["method"], r["share"], r["seed"], r["images"]) for r in read_log(options.log)}
    for seed in range(options.seeds):
        for method in METHODS:
            for share in SHARES:
                if (options.data, method, share, seed, options.images) in done:
                    continue
                start, left, examples, seconds = (), total, 0, 0.0
                if method != SCRATCH:  # once for all shares
                    left = total * (1 - PRETRAINING)
                    folder = runs / f"{method}-{seed}"
                    before = run(options, method, folder, seed, total - left)
                    examples, seconds = before["examples"], before["seconds"]
                    start = ("--start.model", folder)
                labels = ("--data.train", f"{take_share(options, share, seed)}/train-*.tar")
                out = runs / f"{method}-{seed}-{share}"
                found = run(options, SCRATCH, out, seed, left, *labels, *start)
                record = {
                    "data": options.data, "method": method, "share": share, "seed": seed,
                    "images": options.images, "flops": total, "accuracy": found["accuracy"],
                    "examples": [examples, found["examples"]], "minutes": (seconds + found["seconds"]) / 60,
                }  # fmt: skip
                write_log(options.log, record)


def recipe_of(method: str) -> tuple[str, Path]:
    """Script and recipe of pre-training, or of training from labels."""
    if method == SCRATCH:
        return "pipelines/train_classifier.py", ROOT / "configs/fashion_mnist_vit.toml"
    return "pipelines/pretrain_classifier.py", ROOT / f"configs/fashion_mnist_{method}.toml"


def flops(method: str, data: str) -> float:
    return flops_of(*recipe_of(method), DATA[data])


def run(
    options: argparse.Namespace, method: str, out: Path, seed: int, budget: float, *settings: Any
) -> dict[str, Any]:
    """Trains for `budget` FLOPs; returns the last held-out figures."""
    steps = round(budget / flops(method, options.data) / BATCH)
    return train(
        *recipe_of(method), out, steps, "--train.seed", seed, "--train.batch_size", BATCH,
        "--data.train", f"data/{options.data}/train-*.tar",
        "--data.held_out", f"data/{options.data}/test-*.tar", *DATA[options.data], *settings,
    )  # fmt: skip


def take_share(options: argparse.Namespace, share: float, seed: int) -> Path:
    source = Path("data") / options.data
    if share == 1:
        return source
    out = options.runs / f"{options.data}-labels-{share}-{seed}"
    if not (out / "dataset.json").is_file():
        call("pipelines/take_share.py", source, out, "--share", share, "--seed", seed)
    return out


def show(records: list[dict[str, Any]], plot: Path | None) -> None:
    if not records:
        raise UserError("the log holds no figures yet; measure some with run")
    for data, images in dict.fromkeys((record["data"], record["images"]) for record in records):
        own = [record for record in records if (record["data"], record["images"]) == (data, images)]
        print(f"\n{data}, {own[0]['flops'] / 1e12:.3g} TFLOP a figure (of {images:,} images)\n")
        print("| | " + " | ".join(f"{share:.0%} of the labels" for share in SHARES) + " |")
        print("|---|" + "---|" * len(SHARES))
        for method, groups in by_share(own):
            print(f"| {NAMES[method]} | " + " | ".join(cell(group, 1) for group in groups) + " |")
    if plot:
        draw(records, plot)


def by_share(records: list[dict[str, Any]]) -> Iterator[tuple[str, list[list[float]]]]:
    """Every method with the accuracies, in percent, of its seeds at each share."""
    for method in METHODS:
        own = [record for record in records if record["method"] == method]
        yield method, [[100 * r["accuracy"] for r in own if r["share"] == share] for share in SHARES]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    data = list(dict.fromkeys((record["data"], record["images"]) for record in records))
    shares = [100 * share for share in SHARES]
    figure = Figure(figsize=(5 * len(data), 4), layout="constrained")
    for place, (name, images) in enumerate(data, start=1):
        axes = figure.add_subplot(1, len(data), place)
        own = [record for record in records if (record["data"], record["images"]) == (name, images)]
        for number, (method, groups) in enumerate(by_share(own)):
            means, halves = zip(*map(interval, groups), strict=True)
            beside = [share * 1.06 ** (number - 1.5) for share in shares]  # intervals would hide each other
            axes.errorbar(beside, means, halves, label=NAMES[method], marker="o", capsize=3)
        axes.set(xscale="log", xlabel="% of the labels", ylabel="test accuracy, %", title=name)
        axes.set_xticks(shares, [f"{share:.0f}" for share in shares])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
