"""What a run shows: a live bar on a terminal or in a notebook, plain lines elsewhere, and trackers."""

import sys
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmvit.errors import UserError
from mmvit.training.run import RunFolder, metrics_of
from mmvit.training.session import Session


class Display:
    """Shows the main process's progress; the other processes stay silent."""

    def __init__(self, session: Session, first_step: int):
        train = session.recipe.train
        self.total, self.batch_size, self.speaks = train.steps, train.batch_size, session.processes.is_main
        console = Console(file=sys.stdout)
        self.bar = None
        if self.speaks and (console.is_terminal or console.is_jupyter):
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=console,
            )
            self.task = self.bar.add_task("training", total=self.total, completed=first_step, text="")
        self.trackers = open_trackers(session) if self.speaks else []

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        for tracker in self.trackers:
            tracker.close()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """Shows a record of metrics.jsonl; training records go into the bar if there is one.

        The time left is estimated from the speed since the last record.
        """
        for tracker in self.trackers:
            tracker.write(record)
        if self.bar and record["kind"] == "train":
            self.bar.update(
                self.task, text=f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s"
            )
        else:
            self.say(describe(record, self.total, self.batch_size))

    def say_pace(self, seconds: float, left: int) -> None:
        """Says after the first steps how long the rest will take, where that is minutes."""
        if not self.bar and seconds * left > 120:
            self.say(f"about {seconds:.1f} s a step: {seconds * left / 60:.0f} minutes left")

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.speaks:
            print(text, flush=True)


def describe(record: dict[str, Any], total: int, batch_size: int) -> str:
    """A record as a line: `step 200/1000  held-out  loss 1.2345  accuracy 0.8100`."""
    values = metrics_of(record)
    shown = [
        f"{name} {value:.3e}" if name == "lr" else f"{name} {value:.4f}" for name, value in values.items()
    ]
    if "images_per_s" in record:
        left = (total - record["step"]) * batch_size / max(record["images_per_s"], 0.1)
        shown += [f"{record['images_per_s']:.0f} images/s", f"{left / 60:.1f} min left"]
    kind = "held-out  " if record["kind"] == "held_out" else ""
    epoch = f"epoch {record['epoch']:.2f}  " if "epoch" in record else ""
    return f"step {record['step']}/{total}  {epoch}{kind}" + "  ".join(shown)


class TensorBoard:
    def __init__(self, run: RunFolder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard needs TensorBoard: pip install 'mmvit[tensorboard]'") from None
        self.writer = SummaryWriter(str(run.path / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name not in ("kind", "step"):
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, run: RunFolder, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb needs Weights & Biases: pip install 'mmvit[wandb]'") from None
        name = run.path.resolve().name
        self.run = wandb.init(
            project="mmvit", name=name, dir=str(run.path), config=settings, id=name, resume="allow"
        )

    def write(self, record: dict[str, Any]) -> None:
        values = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("kind", "step")
        }
        self.run.log(values, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def open_trackers(session: Session) -> list[TensorBoard | WeightsAndBiases]:
    train, trackers = session.recipe.train, []
    if train.tensorboard:
        trackers.append(TensorBoard(session.run))
    if train.wandb:
        trackers.append(WeightsAndBiases(session.run, session.recipe.model_dump(mode="json")))
    return trackers
