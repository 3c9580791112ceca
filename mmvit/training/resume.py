"""What a checkpoint holds besides weights, and how a run continues exactly where it stopped."""

import socket
from collections.abc import Generator
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import reduce
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

from pydantic import ValidationError
from torch import Tensor

from mmvit.config import find_setting, flatten, merged
from mmvit.errors import UserError
from mmvit.files import write_json
from mmvit.streams.stream import split_state
from mmvit.streams.tally import Tally
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
from mmvit.training.engine import Engine
from mmvit.training.session import Session, seed_everything

STATE, RECIPE = "training.pt", "recipe.json"
SEEDS_OF_A_STEP = 1_000_003


class Stream(Protocol):
    """Endless batches with a position, and a tally of what was read; `mmvit.streams` has one. Its
    iterator is a generator, which the loop closes."""

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
    lacks_evaluation: bool = False  # the one of this step failed, and is made up for on resuming

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
class View:
    """The checkpoints that one process sees: the content of each by its name."""

    rank: int
    where: str
    contents: dict[str, str | None]


def find_checkpoint(session: Session, checkpoints: Checkpoints) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the main process, under this process's path; None if there is none.

    The main process alone reads it through. Others may lack it: they are sent what they need.

    Returns:
        its folder, and what is wrong with newer ones.

    Raises:
        UserError: when all are damaged, or another process sees one that the main process does not have;
            then the other processes exit.
    """
    processes = session.processes

    def newest() -> tuple[str | None, list[str]]:
        folder, problems = checkpoints.latest()
        if problems and folder is None:
            last, start = session.run.last, getattr(session.recipe, "start", None)
            weights = f" from the weights in last/ (--start.model {last})" if start and last.is_dir() else ""
            raise UserError(
                f"{'; '.join(problems)}; there is no other one: put the files back, or start a new run"
                + weights
            )
        return folder and folder.name, problems

    name, problems = processes.from_main(newest)
    own = View(
        processes.rank,
        f"on {socket.gethostname()} in {checkpoints.root.resolve()}",
        {folder.name: content_of(folder) for folder in checkpoints.complete()},
    )
    views = processes.gather(own)
    processes.on_main(lambda: check_same_checkpoint(views))
    return checkpoints.root / name if name else None, problems


def content_of(folder: Path) -> str | None:
    """A digest of the manifest of a checkpoint, which has the checksums of its files."""
    with suppress(OSError):
        return sha256((folder / MANIFEST).read_bytes()).hexdigest()[:8]
    return None


def check_same_checkpoint(views: list[View]) -> None:
    """Raises UserError if the newest checkpoint that another process sees is none of the main one's."""
    main = views[0]
    for view in views[1:]:
        newest = max(view.contents, default=None)
        if newest is None or view.contents[newest] in (main.contents.get(newest, ""), None):
            continue
        found = [newest, max(main.contents, default="none")]
        if newest in main.contents:
            found = [f"a {newest} of content {each.contents[newest]}" for each in (view, main)]
        raise UserError(
            f"cannot resume: the processes see different checkpoints: rank {view.rank} {view.where} has "
            f"{found[0]}, and rank 0 {main.where} has {found[1]}. If that of rank 0 is the right one, remove "
            f"the run folder of rank {view.rank}; otherwise copy that one to the host of rank 0. If they "
            "share the folder, its listing is out of date on some hosts: wait and try again"
        )


def resume(session: Session, folder: Path, engine: Engine, stream: Stream) -> tuple[Progress, dict[str, str]]:
    """Restores engine, stream and random generators from the checkpoint in `folder`.

    Returns:
        the progress, and the `changed_settings`.

    Raises:
        UserError: if the checkpoint is damaged, or of another model (naming the settings that differ).
    """
    processes = session.processes
    changes = processes.from_main(lambda: check_same_model(folder, session.recipe))
    state = processes.from_main(lambda: read_state(folder / STATE))
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
    processes.together(lambda: engine.load(folder))
    stream.load_state_dict(place)
    if same_world:
        set_random_state(randomness, processes.device)
    else:  # numbers that the run has not drawn yet
        seed_everything(session.recipe.train.seed + 1 + processes.rank + SEEDS_OF_A_STEP * progress.step)
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
    before, after = flatten(with_defaults(type(recipe), then)), flatten(recipe.model_dump(mode="json"))
    for settings in (before, after):
        settings["train.select"] = settings.get("train.select") or recipe.selects
    return {
        key: f"{key} was {before.get(key)} and is now {after.get(key)}"
        for key in {**after, **before}
        if before.get(key) != after.get(key)
    }


def with_defaults(kind: type[Recipe], values: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version, with the defaults of the settings that it lacks. Settings that have
    gone since, or allow other values, stay as they are."""
    try:
        return kind.model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        known = deepcopy(values)
        for problem in error.errors():
            *sections, last = find_setting(kind, problem["loc"])[0]
            reduce(lambda section, name: section.get(name, {}), sections, known).pop(last, None)
        return merged(with_defaults(kind, known), values) if known != values else values
