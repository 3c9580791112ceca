"""What a checkpoint holds besides weights, and how a run continues exactly where it stopped."""

import socket
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

from pydantic import ValidationError
from torch import Tensor

from mmvit.config import flatten
from mmvit.data.stream import split_state
from mmvit.data.tally import Tally
from mmvit.errors import UserError
from mmvit.hub import shorten, write_json
from mmvit.training.checkpoint import (
    MANIFEST,
    Checkpoints,
    damaged,
    random_state,
    read_json,
    read_state,
    set_random_state,
    write_state,
)
from mmvit.training.config import Recipe
from mmvit.training.distributed import Processes
from mmvit.training.engine import Engine
from mmvit.training.session import Session

STATE, RECIPE = "training.pt", "recipe.json"


class Stream(Protocol):
    """Endless batches with a position, and a tally of what was read; `mmvit.data` has one. Its iterator is a
    generator, which the loop closes."""

    @property
    def tally(self) -> Tally: ...
    def __iter__(self) -> Generator[dict[str, Any], None, None]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0
    best: float | None = None  # value of the metric that chooses best/
    best_metric: str | None = None  # its name; checkpoints of earlier versions have none
    sums: dict[str, float | Tensor] = field(default_factory=dict)  # of the metrics since the last log line
    passes: dict[str, int] = field(default_factory=dict)  # in each of `sums`; some metrics begin later
    summed: int = 0  # in all of them, of a checkpoint that does not have `passes`

    def add(self, metrics: dict[str, float | Tensor]) -> None:
        """Adds the metrics of one pass, without waiting for the device."""
        for name, value in metrics.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            before = self.summed if name in self.sums else 0
            self.passes[name] = self.passes.get(name, before) + 1
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """The metrics averaged over the passes that had them; resets the sums."""
        means = {name: float(total) / self.passes.get(name, self.summed) for name, total in self.sums.items()}
        self.sums, self.passes, self.summed = {}, {}, 0
        return means

    def improves(self, metric: str, value: float, mode: Literal["min", "max"]) -> bool:
        """Whether `value` is the best so far of `metric`; if so, it is remembered. Another metric than before
        starts anew."""
        if self.best_metric not in (metric, None):
            self.best = None
        self.best_metric = metric
        better = self.best is None or (value < self.best if mode == "min" else value > self.best)
        if better:
            self.best = value
        return better


def save(
    session: Session, checkpoints: Checkpoints, engine: Engine, stream: Stream, progress: Progress
) -> None:
    """Writes a checkpoint; every process must call it."""
    processes = session.processes
    progress.sums = {name: float(total) for name, total in progress.sums.items()}
    own = {
        "stream": stream.state_dict(),
        "random": random_state(processes.device),
        "sums": progress.sums,
    }
    everyone = processes.gather(own)

    if processes.is_main:
        session.run.flush_metrics()

    def write(folder: Path) -> None:
        engine.save(folder)
        if processes.is_main:
            means = {name: fmean(each["sums"][name] for each in everyone) for name in progress.sums}
            shared = {**asdict(progress), "sums": means}
            write_state({"progress": shared, "processes": everyone}, folder / STATE)
            write_json(session.recipe.model_dump(mode="json"), folder / RECIPE)

    checkpoints.save(progress.step, write)


@dataclass(frozen=True)
class Finding:
    """The newest whole checkpoint as one process sees it, and what is wrong with newer ones."""

    rank: int
    host: str
    root: Path
    found: str = "none"
    problems: tuple[str, ...] = ()


def find_checkpoint(checkpoints: Checkpoints, processes: Processes) -> tuple[Path | None, tuple[str, ...]]:
    """The newest whole checkpoint, the same for all processes; None if there is none. Every process calls it.

    Returns:
        its folder, and what is wrong with newer ones.

    Raises:
        UserError: when all are damaged, or when the processes see different ones, as they do where each host
            has a run folder of its own; then the other processes exit.
    """
    folder, problems = checkpoints.latest()
    root = checkpoints.root.resolve()
    own = Finding(processes.rank, socket.gethostname(), root, problems=tuple(problems))
    if folder is not None:
        digest = sha256((folder / MANIFEST).read_bytes())
        digest.update((folder / STATE).read_bytes() if (folder / STATE).is_file() else b"")
        own = replace(own, found=f"step {int(folder.name[5:])} (content {digest.hexdigest()[:8]})")
    findings = processes.gather(own)
    processes.on_main(lambda: check_same_checkpoint(findings))
    return folder, own.problems


def check_same_checkpoint(findings: list[Finding]) -> None:
    """Raises UserError unless all processes see the same whole checkpoint, or none at all."""
    is_same = len({(finding.found, len(finding.problems)) for finding in findings}) == 1
    for finding in findings:
        if finding.problems and (finding.found == "none" or not is_same):
            where = f" (rank {finding.rank} on {finding.host}, in {finding.root})"
            alone = "; there is no other one: put its files back, or start a new run" if is_same else ""
            raise UserError(finding.problems[0] + (where if len(findings) > 1 else "") + alone)
    if len({finding.found for finding in findings}) == 1:
        return
    ranks: dict[str, list[str]] = {}
    for finding in findings:
        view = f"on {finding.host} has {finding.found} in {finding.root}"
        ranks.setdefault(view, []).append(str(finding.rank))
    views = [f"rank{'s' * (len(own) > 1)} {shorten(own)} {view}" for view, own in ranks.items()]
    more = f"; and {len(views) - 5} more" if len(views) > 5 else ""
    raise UserError(
        f"cannot resume: the processes see different checkpoints: {'; '.join(views[:5])}{more}. Put the run "
        "folder on a disk that all hosts share, or copy it from the host of rank 0 to the others; if they "
        "share it already, its listing is out of date on some: wait and try again"
    )


def resume(session: Session, folder: Path, engine: Engine, stream: Stream) -> tuple[Progress, dict[str, str]]:
    """Restores engine, stream and random generators from the checkpoint in `folder`.

    Returns:
        the progress, and the `changed_settings`.

    Raises:
        UserError: if the checkpoint is damaged, or of another model (naming the settings that differ).
    """
    processes = session.processes
    changes = check_same_model(folder, session.recipe)
    state = read_state(folder / STATE)
    try:
        progress, saved = Progress(**state["progress"]), state["processes"]
        same_world = len(saved) == processes.world_size
        own = saved[processes.rank if same_world else 0]
        randomness = own["random"]
        if same_world:
            progress.sums = own.get("sums", progress.sums)  # before 2026-12, only those of rank 0 were kept
        place = split_state([each["stream"] for each in saved], processes.rank, same_world)
    except (LookupError, TypeError):
        raise damaged(folder, f"{STATE} does not hold the state of a run") from None
    engine.load(folder)
    stream.load_state_dict(place)
    if same_world:
        set_random_state(randomness, processes.device)
    return progress, changes


def check_same_model(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Refuses to resume with another `[model]`; returns the `changed_settings`."""
    changes = changed_settings(folder, recipe)
    if changed := [text for key, text in changes.items() if key.startswith("model.")]:
        raise UserError(
            f"{folder} holds another model: {', '.join(changed[:5])}; set them back, or start a new run "
            "with another --output"
        )
    return changes


def changed_settings(folder: Path, recipe: Recipe) -> dict[str, str]:
    """The settings of `recipe` that the checkpoint in `folder` was not trained with: key → what it was and
    is. Those that are newer than the checkpoint had their defaults."""
    then = read_json(folder / RECIPE)
    if not isinstance(then, dict):
        raise damaged(folder, f"{RECIPE} holds no recipe")
    with suppress(ValidationError):  # otherwise a setting has gone, and is named below
        then = type(recipe).model_validate(then).model_dump(mode="json")
    before, after = flatten(then), flatten(recipe.model_dump(mode="json"))
    return {
        key: f"{key} was {before.get(key)} and is now {after.get(key)}"
        for key in {**after, **before}
        if before.get(key) != after.get(key)
    }
