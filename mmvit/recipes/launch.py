"""Running recipes: `mmvit.train` for notebooks, and what the command line of training scripts calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmvit.config import to_toml
from mmvit.errors import UserError
from mmvit.places import find, load_script, shipped
from mmvit.recipes.alike import check_alike
from mmvit.recipes.command import Train
from mmvit.recipes.plan import describe_cost
from mmvit.recipes.resolve import resolve
from mmvit.recipes.tasks import TASKS
from mmvit.streams.cache import used_cache
from mmvit.streams.shards import expand_shards
from mmvit.training import RunFolder, open_session
from mmvit.training.config import Recipe


def train(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    deepspeed: str | Path | None = None,
) -> RunFolder:
    """Trains what a recipe describes: `mmvit.train("emoji_demo", {"train.steps": 100})`.

    Args:
        recipe: a TOML file, the name of a shipped recipe, or a run folder to resume.
        settings: {"section.key": value}, over the recipe's own.
        resume: continue the run in the recipe's `output` from its last checkpoint.
        deepspeed: DeepSpeed's JSON settings, or the name of shipped ones (`zero2`).

    Returns:
        the run folder: `path`, `best`, `last`, `read_metrics()`.

    Raises:
        UserError: for any mistake in the recipe, the settings, the data or the run folder.
    """
    resolved = resolve(recipe, settings, resume=resume)
    return run_recipe(resolved.recipe, resolved.notes, resume, deepspeed)


def run_recipe(
    recipe: Recipe,
    notes: list[str],
    resume: bool,
    deepspeed: str | Path | None,
    train_session: Train | None = None,
) -> RunFolder:
    """Opens a session and runs the task's script in it."""
    json = find_deepspeed(deepspeed) if deepspeed else None
    sections = data_sections(recipe)
    data = sections.values()
    cache = used_cache(
        next((each.cache for each in data if each.cache), None),
        next((each.cache_size for each in data if each.cache_size), None),
    )
    with cache, open_session(recipe, resume=resume, deepspeed=json) as session:
        check_alike(session, sections)
        for note in notes:
            session.say(note)
        (train_session or load_script(TASKS[recipe.task].script).train_session)(session)
    return session.run


def has_data(recipe: Recipe) -> bool:
    """Whether the shards that a recipe names are there."""
    try:
        return all(expand_shards(section.train) for section in data_sections(recipe).values())
    except UserError:
        return False


def data_sections(recipe: Recipe) -> dict[str, Any]:
    """The sections that name shards to train on, by name."""
    sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return {name: section for name, section in sections.items() if hasattr(section, "held_out")}


def find_deepspeed(path: str | Path) -> Path:
    """The JSON settings that `path` means: a file, or the name of shipped ones such as `zero2`."""
    named = shipped(f"configs/deepspeed/{path}.json")
    return named if named.is_file() else find(path)


def print_plan(source: str, settings: Mapping[str, Any], resume: bool, task: str | None) -> None:
    """Prints the resolved recipe, and what training would cost."""
    try:
        recipe, notes = resolve(source, settings, resume=resume, task=task)
    except UserError as error:
        recipe, notes = resolve(source, settings, resume=resume, read_data=False, task=task)
        if has_data(recipe):  # then something else is wrong
            raise
        notes.append(f"classes, vocabulary and grid are defaults, because the data cannot be read: {error}")
    print(to_toml(recipe.model_dump(mode="json")))
    with torch.device("meta"):
        lines = describe_cost(recipe)
    print("\n".join(f"# {line}" for line in [*notes, *lines]))
