"""What every training script shares: its command line, its processes, its seeds and its run folder."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy
import torch
from pydantic import model_validator

from mmvit.config import Config, describe_settings, load_config, split_command_line
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError
from mmvit.models.sections import under_preset, with_preset
from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import Processes, open_processes
from mmvit.training.run import RunFolder


class Recipe(Config):
    """What a training script's CONFIG.toml holds; a script adds its `[data]` and `[model]`, which may name a
    `preset` to begin with."""

    output: Path
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @classmethod
    def before_overrides(cls, values: dict[str, Any], overrides: dict[str, str]) -> dict[str, Any]:
        """A preset that the command line names takes the place of the model that the file describes."""
        return under_preset(values, overrides[PRESET]) if PRESET in overrides else values

    @model_validator(mode="before")
    @classmethod
    def _a_preset_and_what_differs(cls, values: Any) -> Any:
        return with_preset(values, cls)


PRESET = "model.preset"
OwnRecipe = TypeVar("OwnRecipe", bound=Recipe)


@dataclass(frozen=True)
class Session(Generic[OwnRecipe]):
    """One start of a training script."""

    recipe: OwnRecipe
    processes: Processes
    run: RunFolder
    resume: bool = False
    deepspeed: Path | None = None
    evaluated: list[ShardStream] = field(default_factory=list)  # what evaluations read

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
    recipe_class: type[OwnRecipe], usage: str, arguments: list[str] | None = None
) -> Iterator[Session[OwnRecipe]]:
    """Reads the command line, joins the other processes and opens the run folder.

    The command line is `CONFIG.toml [--resume] [--deepspeed JSON] [--section.key value ...]`.
    The random generators are seeded alike everywhere, so that every process builds the same model.

    Args:
        usage: the script's docstring, which --help prints, with the settings of `recipe_class`.
        arguments: the command line without the script's name; `sys.argv` by default.

    Raises:
        UserError: for any mistake in the command line, the configuration or the run folder.
    """
    positional, own, overrides = split_command_line(
        sys.argv[1:] if arguments is None else arguments, flags={"resume", "help"}, options={"deepspeed"}
    )
    if "help" in own:
        print(usage.strip(), "\n\nSettings, in CONFIG.toml or as --section.key value:")
        print("\n".join(describe_settings(recipe_class)))
        raise SystemExit(0)
    if len(positional) != 1:
        raise UserError(
            f"one CONFIG.toml is wanted, found {positional or 'none'}; the ready ones are in configs/, "
            "--help shows the commands"
        )
    recipe = load_config(recipe_class, Path(positional[0]), overrides)
    deepspeed = Path(own["deepspeed"]) if "deepspeed" in own else None
    with open_processes(recipe.train.device, needs_group=deepspeed is not None) as processes:
        check_batch_divides(recipe.train, processes.world_size)
        resume = own.get("resume", False)
        run = RunFolder(recipe.output)
        processes.on_main(lambda: run.open(resume))
        seed_everything(recipe.train.seed)
        try:
            yield Session(recipe, processes, run, resume, deepspeed)
        except UserError:
            if processes.is_main:
                run.discard()
            raise


def check_batch_divides(train: TrainConfig, world_size: int) -> None:
    passes = train.accumulation * world_size
    if train.batch_size % passes:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be shared by {world_size} processes x "
            f"accumulation {train.accumulation}; "
            f"use a multiple of {passes}"
        )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
