"""What the studies share: running recipes, counting their FLOPs, logs and intervals."""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from speed import count_flops

from mmvit.config import flatten, split_settings
from mmvit.errors import UserError
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.joint import JointConfig
from mmvit.models.registry import build_model
from mmvit.places import load_script
from mmvit.recipes.resolve import resolve

ROOT = Path(__file__).resolve().parent.parent
# 97.5% quantile of Student's t by the number of figures
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
PLAIN_KERNEL = ("--model.core.attention_kernel", "plain")  # whose products are seen by the counter
IMAGES = 8  # in a batch whose FLOPs are counted


def call(script: str, *arguments: Any) -> None:
    """Runs a script of the checkout to its end. Raises UserError with its output if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # benchmarks/busy_cores.py
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


def train(script: str, config: Path, out: Path, steps: int, *settings: Any) -> dict[str, Any]:
    """Trains the run `out`, or continues it, and evaluates it at its end only; returns the held-out figures.
    Raises UserError if `out` was trained with other settings."""
    settings = (
        "--output", out, "--train.steps", steps, "--train.evaluate_every", steps,
        "--train.checkpoint_every", steps, "--optimizer.warmup_steps", max(1, steps // 20), *settings,
    )  # fmt: skip
    if out.is_dir():
        check_settings(config, out, settings)
    if (found := last_figures(out, steps)) is None:
        call(script, config, *settings, *(("--resume",) if out.is_dir() else ()))
        found = last_figures(out, steps)
    if found is None:
        raise UserError(f"{out} was not evaluated at step {steps}; it may have another length: remove it")
    return found


def check_settings(config: Path, out: Path, settings: Sequence[Any]) -> None:
    """Raises UserError if the run in `out` was trained with other settings: its figures would mislead."""
    _, given = split_settings([*map(str, settings)])
    expected = flatten(resolve(config, given).recipe.model_dump(mode="json"))
    found = flatten(resolve(out, resume=True).recipe.model_dump(mode="json"))
    keys = (expected | found).keys() - {"output"}
    if other := [key for key in keys if expected.get(key) != found.get(key)]:
        described = ", ".join(
            f"{key} = {found.get(key)}, not {expected.get(key)}" for key in sorted(other)[:3]
        )
        raise UserError(f"{out} was trained with {described}: remove it to train it again")


def last_figures(run: Path, steps: int) -> dict[str, Any] | None:
    """The held-out figures of a run at its last step; None if it has not got there."""
    records = [r for r in read_log(run / "metrics.jsonl") if r["kind"] == "held_out" and r["step"] == steps]
    return records[-1] if records else None


@functools.cache
def flops_of(script: str, config: Path, settings: tuple[str, ...] = ()) -> float:
    """FLOPs of training on one image, forward and backward, by the objective of a recipe."""
    _, given = split_settings([*settings, *PLAIN_KERNEL])
    recipe = resolve(config, given).recipe
    build = getattr(load_script(script), "build_objective", lambda recipe: build_model(recipe.model))
    objective = build(recipe)
    batch = random_batch(recipe.model)
    return count_flops(lambda: objective.loss(batch)[0].backward()) / IMAGES


def random_batch(config: ClassifierConfig | GeneratorConfig | JointConfig) -> dict[str, torch.Tensor]:
    if isinstance(config, JointConfig):
        return {**random_batch(config.classifier), **random_batch(config.generator)}
    if isinstance(config, GeneratorConfig):
        return {
            "caption_ids": torch.ones(IMAGES, config.text_length, dtype=torch.long),
            "codes": torch.zeros(IMAGES, config.num_codes, dtype=torch.long),
        }
    pixels = torch.randn(IMAGES, config.channels, *config.height_width)
    return {"pixels": pixels, "other_pixels": pixels, "labels": torch.zeros(IMAGES, dtype=torch.long)}


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def missing(options: argparse.Namespace, names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Seeds and variants whose figures of this budget the log lacks."""
    done = {(r["variant"], r["seed"], r["images"]) for r in read_log(options.log)}
    for seed in range(options.seeds):
        for name in names:
            if (name, seed, options.images) not in done:
                yield seed, name


def write_log(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval; NaN for too few values."""
    if not values:
        return float("nan"), float("nan")
    if len(values) == 1:
        return values[0], float("nan")
    quantile = STUDENT.get(len(values), 2.26)  # a little wide for more than ten
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """`79.6 ± 0.4` for a table, with the `sign` "+" for gains; the mean alone without an interval."""
    mean, half = interval(values)
    if mean != mean:
        return ""
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")


def run_study(
    usage: str,
    name: str,
    measure: Callable[[argparse.Namespace], None],
    show: Callable[[list[dict[str, Any]]], None],
    images: int,
    of: str,
    seeds: int = 3,
    variants: Collection[str] = (),
    extend: Callable[[argparse.ArgumentParser], None] = lambda run: None,
    plot: Callable[[list[dict[str, Any]], Path], None] | None = None,
) -> None:
    """The command line `run`, which measures, and `table LOG`, which prints the figures of each budget.

    Args:
        usage: the script's docstring.
        name: of the log and of the folder of runs, by default.
        images, of: the default budget in images, and of which model.
        variants: the names that `run --only` chooses from.
        extend: adds further options to `run`.
        plot: draws all figures to a file, as `table LOG --plot FILE`.
    """
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--images", type=int, default=images, help=f"images that {of} trains on")
    run.add_argument("--seeds", type=int, default=seeds)
    if variants:
        run.add_argument("--only", nargs="+", choices=variants, default=[*variants], metavar="VARIANT")
    extend(run)
    run.add_argument("--log", type=Path, default=Path(f"{name}.jsonl"))
    run.add_argument("--runs", type=Path, default=Path(f"runs/{name}"), help="where runs go")
    table = commands.add_parser("table")
    table.add_argument("log", type=Path)
    if plot is not None:
        table.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.command == "run":
        measure(options)
        return
    if not (records := read_log(options.log)):
        raise UserError(f"{options.log} holds no figures yet")
    for budget in dict.fromkeys(record["images"] for record in records):
        own = [record for record in records if record["images"] == budget]
        print(f"\n{own[0]['flops'] / 1e12:.3g} TFLOP a figure (of {budget:,} images)\n")
        show(own)
    if plot is not None and options.plot:
        plot(records, options.plot)


def retrieval(run: Path, *settings: Any) -> float:
    """Retrieval@1 of the held-out combinations of emoji, by the last generator of a run."""
    call("pipelines/evaluate.py", run / "last", "data/emoji", "--out", run / "sheet.png", *settings)
    return json.loads((run / "last" / "evaluation-combinations.json").read_text())["retrieval@1"]
