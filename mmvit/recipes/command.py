"""The command line of training scripts and of `mmvit train`. Imports torch only to train."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from mmvit.config import describe_settings, read_toml, setting_names, split_settings
from mmvit.errors import UserError, did_you_mean
from mmvit.recipes.find import find_recipe, table_of_recipes

Train = Callable[[Any], None]  # a script's function of a session
OPTIONS = ("--resume", "--deepspeed", "--dry-run", "--settings", "--list", "--output", "--help")


class CommandLine(NamedTuple):
    """What a training script was called with."""

    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE [--section.key value ...]", help="a name or TOML file, and settings"),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="continue from the last checkpoint")] = False
    deepspeed: Annotated[
        str | None, typer.Option(help="train with DeepSpeed: a JSON file, or zero0 to zero3")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved recipe and its cost; train nothing")
    ] = False
    list_settings: Annotated[
        bool, typer.Option("--settings", help="list every setting of RECIPE with its default")
    ] = False

    def run(self, train_session: Train | None = None, task: str | None = None) -> None:
        for argument in self.arguments or []:
            option = argument.partition("=")[0]
            if option.startswith("--") and "." not in option and option[2:] not in top_level_keys():
                raise UserError(f"unknown option {option}{nearest_setting(option)}")
        names, settings = split_settings(self.arguments or [])
        if len(names) != 1:
            found = " and ".join(names) or "none"
            raise UserError(f"expected one recipe, got {found}; mmvit train --list shows the shipped ones")
        source = names[0]
        path = find_recipe(source, resume=True)  # a mistyped name should not wait for torch
        from mmvit.recipes.launch import print_plan, run_recipe
        from mmvit.recipes.resolve import resolve
        from mmvit.recipes.tasks import recipe_class

        if self.list_settings:
            kind = recipe_class(read_toml(path).get("task", task), str(path))
            print("\n".join(describe_settings(kind)))
        elif self.dry_run:
            print_plan(source, settings, self.resume, task)
        else:
            recipe, notes = resolve(source, settings, resume=self.resume, task=task)
            run_recipe(recipe, notes, self.resume, self.deepspeed, train_session)


def training_script(train_session: Train, task: str) -> Callable[..., None]:
    """The command line of a script that trains one `task`: `RECIPE [--resume] [--section.key value ...]`."""

    def main(command: CommandLine) -> None:
        command.run(train_session, task)

    return as_command(main, train_session.__globals__["__doc__"])


def recipe_command(docstring: str) -> Callable[..., None]:
    """The command line of `mmvit train`: that of every training script, whose recipe says which one runs."""

    def main(
        command: CommandLine,
        list_recipes: Annotated[bool, typer.Option("--list", help="list the shipped recipes")] = False,
    ) -> None:
        if list_recipes:
            print(table_of_recipes())
            return
        command.run()

    return as_command(main, docstring)


def as_command(main: Callable[..., None], docstring: str) -> Callable[..., None]:
    main.takes_settings, main.help_text = True, docstring
    return main


def nearest_setting(option: str) -> str:
    """The advice for an option without a section: `--lr` was meant as `--optimizer.lr`."""
    from mmvit.recipes.tasks import TASKS, recipe_class

    last = option.removeprefix("--").replace("-", "_")
    names = [name for task in TASKS for name in setting_names(recipe_class(task, ""))]
    exact = [f"--{name}" for name in dict.fromkeys(names) if name.rpartition(".")[2] == last]
    if last == "epochs":
        return ": set --train.steps, the number of optimizer steps"
    return f": did you mean {' or '.join(exact[:3])}?" if exact else did_you_mean(option, OPTIONS)


def top_level_keys() -> set[str]:
    """The keys of all recipes that are not in a section, and the names of their sections."""
    from mmvit.recipes.tasks import TASKS, recipe_class

    return {key for task in TASKS for key in recipe_class(task, "").model_fields}
