"""The run folder: config.toml, metrics.jsonl, curves.png, checkpoints/, previews/, best/ and last/ models."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmvit.config import Config, to_toml
from mmvit.errors import UserError
from mmvit.files import whole_file
from mmvit.lock import release_lock, take_lock
from mmvit.training.disk import flush, put_in_place, put_right, writing

CONFIG, LOCK = "config.toml", ".lock"


class RunFolder:
    """The folder of a run's results. Only the main process writes."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics, self.curves = path / "metrics.jsonl", path / "curves.png"
        self.checkpoints, self.best, self.last, self.previews = (
            path / name for name in ("checkpoints", "best", "last", "previews")
        )
        self.lock_file: int | None = None  # its descriptor, while this process holds the folder

    def open(self, resume: bool) -> None:
        """Makes the folder, or opens an existing one to resume in, and keeps other processes out of it until
        `close` or the end of this one.

        Raises:
            UserError: if a new run would overwrite something, there is nothing to resume, or another process
                trains in the folder.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise UserError(f"output: {str(self.path)!r} is not valid UTF-8; choose another folder") from None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output: {self.path} is not a folder; choose another with --output")
        if resume and not self.path.is_dir():
            raise UserError(f"nothing to resume: no run folder {self.path}; remove --resume to start one")
        if (self.path / LOCK).exists():
            self.lock()  # first: that the run goes on is a better reason to refuse than that it has files
        if not resume and self.path.is_dir() and self.holds_results():
            raise UserError(
                f"{self.path} is not empty: add --resume to continue its run, or choose another folder with "
                "--output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: cannot make the folder {self.path}: {error.strerror}") from None
        self.lock()
        put_right(self.path)
        put_right(self.checkpoints)

    def close(self) -> None:
        """Lets other processes open the folder."""
        if self.lock_file is not None:
            release_lock(self.path / LOCK, self.lock_file)
            self.lock_file = None

    def lock(self) -> None:
        if self.lock_file is None:
            advice = "wait for it to end, or choose another folder with --output"
            self.lock_file = take_lock(self.path / LOCK, "is in use by", advice)

    def holds_results(self) -> bool:
        """Whether there is more in the folder than what a start that failed before it trained leaves."""
        return any(path.name not in (CONFIG, LOCK) for path in self.path.iterdir())

    def refuse_lost_checkpoints(self) -> None:
        """Raises UserError when the run has written checkpoints; for a resume that finds none. A run that
        died before its first may start over."""
        try:
            settings = tomllib.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = {}
        trained_to = max((record["step"] for record in self.read_metrics()), default=0)
        if self.last.exists() or trained_to > settings.get("train", {}).get("checkpoint_every", 0):
            evidence = f"was trained to step {trained_to}" if trained_to else "has a model in last/"
            raise UserError(
                f"nothing to resume: {self.path} {evidence}, but there are no checkpoints in "
                f"{self.checkpoints}; put them back, or start a new run with another --output"
            )

    def discard(self) -> None:
        """Removes the folder of a run that failed before it trained; one that holds more stays."""
        if self.path.is_dir() and not self.holds_results():
            shutil.rmtree(self.path)

    def write_config(self, recipe: Config) -> None:
        """Writes the resolved recipe, config.toml."""
        with whole_file(self.path / CONFIG) as partial:
            partial.write_text(to_toml(recipe.model_dump(mode="json")), encoding="utf-8")

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drops the lines of metrics.jsonl that were written after `step`, those of its evaluation unless it
        is `evaluated`, and those that are no records."""
        last_held_out = step if evaluated else step - 1
        records = [
            record
            for record in self.read_metrics()
            if record["step"] <= (last_held_out if record["kind"] == "held_out" else step)
        ]
        with whole_file(self.metrics) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def write_metrics(self, record: dict[str, Any]) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # which names no file where the disk is full
            raise UserError(f"{self.metrics} cannot be written: {error.strerror}") from None

    def flush_metrics(self) -> None:
        """Brings metrics.jsonl to the disk, before a checkpoint that is of a later step."""
        if self.metrics.exists():
            flush(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl: `kind` is "train" or "held_out", `step` the optimizer step. Damaged
        lines are left out."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def export(self, folder: Path, write: Callable[[Path], Any]) -> None:
        """Replaces `folder`, `best` or `last`, by what `write(folder)` puts there."""
        shutil.rmtree(writing(folder), ignore_errors=True)
        try:
            write(writing(folder))
            put_in_place(folder)
        except BaseException:
            shutil.rmtree(writing(folder), ignore_errors=True)
            raise

    def draw_curves(self) -> None:
        """Plots every training and held-out metric over the steps in curves.png, losses first."""
        from matplotlib.figure import Figure  # takes half a second to import

        records = [record for record in self.read_metrics() if record["kind"] in ("train", "held_out")]
        names = dict.fromkeys(name for record in records for name in metrics_of(record))
        if not names:
            return
        figure = Figure(figsize=(10, 3 * ((len(names) + 1) // 2)), layout="constrained")
        for place, name in enumerate(sorted(names, key=lambda name: ("loss" not in name, name)), start=1):
            axes = figure.add_subplot((len(names) + 1) // 2, 2, place)
            for kind, style in (
                ("train", {"linewidth": 1, "alpha": 0.7}),
                ("held_out", {"marker": ".", "linewidth": 1.5}),
            ):
                points = [
                    (record["step"], record[name])
                    for record in records
                    if record["kind"] == kind and name in record
                ]
                if points:
                    alone = {"marker": "."} if len(points) == 1 else {}
                    axes.plot(*zip(*points, strict=True), label=kind.replace("_", "-"), **style | alone)
            axes.set(title=name.replace("_", " "), xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        with whole_file(self.curves) as partial:
            figure.savefig(partial, dpi=100)


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record. A total loss that has one part only is left out."""
    bookkeeping = {"kind", "step", "examples", "epoch", "seconds", "images_per_s"}
    if sum(name.endswith("_loss") for name in record) == 1:
        bookkeeping.add("loss")
    return {name: value for name, value in record.items() if name not in bookkeeping}
