"""One start of a training run: its recipe, its processes, its seeds and its run folder."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy
import torch

from mmvit.errors import UserError
from mmvit.streams.stream import ShardStream
from mmvit.training.config import Recipe, TrainConfig
from mmvit.training.deepspeed_engine import building
from mmvit.training.distributed import Processes, open_processes
from mmvit.training.run import RunFolder

OwnRecipe = TypeVar("OwnRecipe", bound=Recipe)


@dataclass
class Session(Generic[OwnRecipe]):
    """What a training script works with."""

    recipe: OwnRecipe
    processes: Processes
    run: RunFolder
    resume: bool = False
    deepspeed: Path | None = None
    continues: bool = False  # a checkpoint, of whatever process, will give this run its weights
    evaluated: list[ShardStream] = field(default_factory=list)  # what evaluations have read
    samples_per_epoch: int | None = None  # of the training data

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass in one process: the batch size of its stream."""
        train = self.recipe.train
        return train.batch_size // (train.accumulation * self.processes.world_size)

    def say(self, text: str) -> None:
        """A line for the user, from the main process alone."""
        if self.processes.is_main:
            print(text, flush=True)


@contextmanager
def open_session(
    recipe: OwnRecipe, *, resume: bool = False, deepspeed: Path | None = None
) -> Iterator[Session[OwnRecipe]]:
    """Joins the other processes, opens the run folder, and seeds the random generators.

    They are seeded alike in every process, so that each builds the same model.

    Args:
        deepspeed: DeepSpeed's JSON settings; None trains with plain torch.

    Raises:
        UserError: if the run folder cannot be used, or another process uses it, or the batch does not divide
            over the processes.
    """
    needs_group = deepspeed is not None
    with open_processes(recipe.train.device, needs_group, recipe.train.timeout) as processes:
        check_batch_divides(recipe.train, processes.world_size)
        run = RunFolder(recipe.output)
        try:
            processes.on_main(lambda: run.open(resume))
            seed_everything(recipe.train.seed)
            with discarded_on_mistakes(run, processes):
                [has_checkpoint] = processes.largest(any(run.checkpoints.glob("step-*")))
                with building(recipe.train, processes, deepspeed):
                    yield Session(
                        recipe, processes, run, resume, deepspeed, continues=resume and bool(has_checkpoint)
                    )
        finally:
            run.close()


@contextmanager
def discarded_on_mistakes(run: RunFolder, processes: Processes) -> Iterator[None]:
    """Removes the folder of a run that a `UserError` ends before it has trained."""
    try:
        yield
    except UserError:
        if processes.is_main:
            run.discard()
        raise


def check_batch_divides(train: TrainConfig, world_size: int) -> None:
    passes = train.accumulation * world_size
    if train.batch_size % passes:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide over {world_size} processes x accumulation "
            f"{train.accumulation}: use a multiple of {passes}"
        )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
