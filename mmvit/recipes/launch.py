"""Running recipes: the command line of training scripts, and `mmvit.train` for notebooks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from mmvit.config import describe_settings, read_toml, split_settings, to_toml
from mmvit.errors import UserError, did_you_mean
from mmvit.places import find, load_script, shipped
from mmvit.recipes.resolve import find_recipe, recipes, resolve
from mmvit.recipes.tasks import TASKS, recipe_class
from mmvit.training import RunFolder, Session, open_session
from mmvit.training.config import Recipe

Train = Callable[[Session], None]
OPTIONS = ("--resume", "--deepspeed", "--dry-run", "--settings", "--list", "--output", "--help")


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
    with open_session(recipe, resume=resume, deepspeed=json) as session:
        for note in notes:
            session.say(note)
        (train_session or load_script(TASKS[recipe.task].script).train_session)(session)
    return session.run


def training_script(train_session: Train, task: str) -> Callable[..., None]:
    """The command line of a script that trains one `task`: `RECIPE [--resume] [--section.key value ...]`."""

    def main(
        arguments: Arguments = None,
        resume: Resume = False,
        deepspeed: DeepSpeed = None,
        dry_run: DryRun = False,
        list_settings: ListSettings = False,
    ) -> None:
        command = CommandLine(arguments, resume, deepspeed, dry_run, list_settings)
        command.run(train_session, task)

    return as_command(main, train_session.__globals__["__doc__"])


def recipe_command(docstring: str) -> Callable[..., None]:
    """The command line of `mmvit train`: that of every training script, whose recipe says which one runs."""

    def main(
        arguments: Arguments = None,
        resume: Resume = False,
        deepspeed: DeepSpeed = None,
        dry_run: DryRun = False,
        list_settings: ListSettings = False,
        list_recipes: Annotated[bool, typer.Option("--list", help="list the shipped recipes")] = False,
    ) -> None:
        if list_recipes:
            print(table_of_recipes())
            return
        CommandLine(arguments, resume, deepspeed, dry_run, list_settings).run()

    return as_command(main, docstring)


def as_command(main: Callable[..., None], docstring: str) -> Callable[..., None]:
    main.takes_settings, main.help_text = True, docstring
    return main


Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE [--section.key value ...]", help="a name or TOML file, and settings"),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the last checkpoint")]
DeepSpeed = Annotated[str | None, typer.Option(help="train with DeepSpeed: a JSON file, or zero0 to zero3")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the resolved recipe and its cost; train nothing")
]
ListSettings = Annotated[
    bool, typer.Option("--settings", help="list every setting of RECIPE with its default")
]


class CommandLine(NamedTuple):
    """What a training script was called with."""

    arguments: list[str] | None
    resume: bool
    deepspeed: str | None
    dry_run: bool
    list_settings: bool

    def run(self, train_session: Train | None = None, task: str | None = None) -> None:
        for argument in self.arguments or []:
            option = argument.partition("=")[0]
            if option.startswith("--") and "." not in option and option[2:] not in top_level_keys():
                raise UserError(f"unknown option {option}{did_you_mean(option, OPTIONS)}")
        names, settings = split_settings(self.arguments or [])
        if len(names) != 1:
            found = " and ".join(names) or "none"
            raise UserError(f"expected one recipe, got {found}; mmvit train --list shows the shipped ones")
        source = names[0]
        if self.list_settings:
            print("\n".join(describe_settings(class_of(source, task))))
            return
        if self.dry_run:
            print_plan(source, settings, self.resume)
            return
        recipe, notes = resolve(source, settings, resume=self.resume, task=task)
        run_recipe(recipe, notes, self.resume, self.deepspeed, train_session)


def top_level_keys() -> set[str]:
    """The keys of all recipes that are not in a section, and the names of their sections."""
    return {key for task in TASKS for key in recipe_class(task, "").model_fields}


def class_of(source: str, task: str | None) -> type[Recipe]:
    path = find_recipe(source, resume=True)
    return recipe_class(read_toml(path).get("task", task), str(path))


def table_of_recipes() -> str:
    """The shipped recipes by task, each with the first sentence of its header."""
    by_task: dict[str, list[str]] = {}
    width = max(map(len, recipes())) + 2
    for name, path in recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        task = read_toml(path).get("task", "")
        by_task.setdefault(task, []).append(f"  {name:<{width}}{comment.partition('. ')[0].rstrip('.')}")
    return "\n\n".join("\n".join([f"{task}", *lines]) for task, lines in by_task.items())


def find_deepspeed(path: str | Path) -> Path:
    """The JSON settings that `path` means: a file, or the name of shipped ones such as `zero2`."""
    named = shipped(f"configs/deepspeed/{path}.json")
    return named if named.is_file() else find(path)


def print_plan(source: str, settings: Mapping[str, Any], resume: bool) -> None:
    """Prints the resolved recipe, and what training would cost."""
    from mmvit.recipes.plan import describe_cost

    try:
        recipe, notes = resolve(source, settings, resume=resume)
    except UserError as error:
        recipe, notes = resolve(source, settings, resume=resume, read_data=False)
        notes.append(f"classes, vocabulary and grid are defaults, because the data cannot be read: {error}")
    print(to_toml(recipe.model_dump(mode="json")))
    with torch.device("meta"):
        lines = describe_cost(recipe)
    print("\n".join(f"# {line}" for line in [*notes, *lines]))
