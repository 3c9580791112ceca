"""The command `mmvit`: finds a script by the command's name, and runs its `main` with the options parsed.

A script is a function `main` with typer annotations and a docstring that opens with what it is for:

    if __name__ == "__main__":
        run_script(main)

so `mmvit sample ...` and `python pipelines/sample_images.py ...` are the same thing. Scripts are imported
only when they run or print their help, which keeps `mmvit --help` fast.

Options that several scripts share are fields of a NamedTuple, which their `main` takes as one parameter.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from mmvit import __version__
from mmvit.errors import UserError, did_you_mean, reported_errors
from mmvit.places import load_script
from mmvit.streams.address import on_this_machine


class Command(NamedTuple):
    """A script, and the line about it in `mmvit --help`."""

    script: str
    summary: str


GROUPS = {
    "Draw and look": {
        "sample": Command("pipelines/sample_images.py", "draw images from captions"),
        "edit": Command("pipelines/edit_images.py", "redraw part of an image, or vary it"),
        "caption": Command("pipelines/caption_images.py", "choose the best caption for an image"),
        "classify": Command("pipelines/classify_images.py", "classify images with a trained classifier"),
        "serve": Command("pipelines/serve.py", "open a page that draws, edits and describes images"),
    },
    "Train and evaluate": {
        "train": Command("pipelines/train.py", "train the model that a recipe describes"),
        "copy": Command("pipelines/copy_recipe.py", "copy a recipe to a file of your own"),
        "evaluate": Command("pipelines/evaluate.py", "measure a model on held-out data"),
        "demo": Command("pipelines/demo.py", "prepare emoji, train a generator and draw with it"),
    },
    "Prepare data": {
        "shards": Command("pipelines/make_shards.py", "pack images, captions and classes into shards"),
        "index": Command("pipelines/index_shards.py", "index shards so that training starts quickly"),
        "encode": Command("pipelines/encode_images.py", "turn the images in shards into image codes"),
        "subset": Command("pipelines/take_share.py", "take the same share of every class"),
        "prepare emoji": Command("pipelines/prepare_emoji.py", "make the emoji data set"),
        "prepare emoji-groups": Command("pipelines/prepare_emoji_groups.py", "make emoji with classes"),
        "prepare fashion-mnist": Command("pipelines/prepare_fashion_mnist.py", "make Fashion-MNIST"),
        "tokenizer text": Command("tokenizers/train_text_tokenizer.py", "learn a text tokenizer"),
        "tokenizer image": Command("tokenizers/train_image_tokenizer.py", "learn an image tokenizer"),
    },
    "Models": {
        "presets": Command("pipelines/list_presets.py", "list the named models, their size and cost"),
        "plan": Command("pipelines/plan_memory.py", "estimate the memory that training needs"),
        "convert": Command("pipelines/convert_weights.py", "import or export other projects' weights"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
TOP_HELP = """mmvit: train image classifiers and caption-to-image generators on one Transformer core.

    mmvit sample "red apple" --num 4      draws with the bundled generator
    mmvit demo                            prepares data, trains a generator and draws with it, in minutes
    mmvit train --list                    shows what can be trained
"""
SETTINGS = {"help_option_names": ["--help", "-h"], "max_content_width": 110}
PLAIN = {  # what typer says of a wrong value, in our words
    r"Input should be a valid integer.*": "expected a whole number",
    r"Input should be a valid number.*": "expected a number",
    r"Input should be (greater|less) than or equal to (\S+)": r"expected a number \1 than or equal to \2",
}
ELSEWHERE = {  # what is sought as a command of its own
    "recipes": "mmvit train --list shows them",
    "recipe": "mmvit train --list shows them",
    "list": "mmvit train --list shows recipes, mmvit presets models",
    "completion": "mmvit --install-completion sets up your shell",
    "resume": "add --resume to mmvit train",
    "generate": "did you mean sample?",
    "draw": "did you mean sample?",
}
UsageError = typer.BadParameter.__bases__[0]  # what typer raises for every mistake in a command line


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line `arguments`, `sys.argv` by default; mistakes end with code 2 and one line."""
    with reported_errors():
        run(top_command(), sys.argv[1:] if arguments is None else arguments, "mmvit")


def run_script(main: Callable[..., None]) -> None:
    """Runs a script's `main` with the options of `sys.argv`; call it under `if __name__ == "__main__"`."""
    with reported_errors():
        run(command_of(main), sys.argv[1:], sys.argv[0])


def run(command: Any, arguments: list[str], program: str) -> None:
    try:
        code = command.main(without_rank(arguments), prog_name=program, standalone_mode=False)
    except UsageError as error:
        raise UserError(describe(error)) from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if isinstance(code, int) and code:
        sys.exit(code)


def without_rank(arguments: list[str]) -> list[str]:
    """The arguments without what DeepSpeed's launcher adds; the rank is in the environment, too."""
    return [each for each in arguments if not each.startswith(("--local_rank=", "--local-rank="))]


def describe(error: Any) -> str:
    """A mistake in the command line as one sentence, with the nearest option and where to read more."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if (option := getattr(error, "option_name", None)) and context:
        known = [name for parameter in context.command.params for name in parameter.opts if name[:2] == "--"]
        message = f"unknown option {option}" + (did_you_mean(option, known) if known else "")
    for pydantic, plain in PLAIN.items():
        message = re.sub(pydantic, plain, message)
    more = f"; see {context.command_path} --help" if context else ""
    return f"{message[:1].lower()}{message[1:]}{more}"


def command_of(main: Callable[..., None], name: str | None = None) -> Any:
    """The parsed form of a script's `main`: a typer command whose help is the script's docstring."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {**SETTINGS, "ignore_unknown_options": getattr(main, "takes_settings", False)}
    text = help_text(getattr(main, "help_text", main.__globals__["__doc__"]))
    app.command(name, help=text, context_settings=settings, no_args_is_help=False)(with_shared_options(main))
    return typer.main.get_command(app)


def with_shared_options(main: Callable[..., None]) -> Callable[..., None]:
    """`main` with the fields of each parameter that is a NamedTuple as options of its own."""
    shared: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(main).parameters.items():
        if hasattr(parameter.annotation, "_fields"):
            shared[name] = parameter.annotation
            options += inspect.signature(parameter.annotation).parameters.values()
        else:
            options.append(parameter)

    @functools.wraps(main)
    def command(**values: Any) -> None:
        for name in {"out", "file"} & values.keys():
            try:
                on_this_machine(values[name] or Path())
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        for name, group in shared.items():
            values[name] = group(**{field: values.pop(field) for field in group._fields})
        main(**values)

    command.__signature__ = inspect.Signature([each.replace(kind=each.KEYWORD_ONLY) for each in options])
    return command


def help_text(docstring: str) -> str:
    """The docstring for --help, its indented examples kept as they are."""
    paragraphs = docstring.strip().split("\n\n")
    return "\n\n".join(f"\b\n{text}" if text.startswith("    ") else text for text in paragraphs)


class Scripts(TyperGroup):
    """A group of commands, each a script that is imported when it is needed."""

    prefix = ""

    def list_commands(self, context: Any) -> list[str]:
        names = [name.removeprefix(self.prefix) for name in COMMANDS if name.startswith(self.prefix)]
        return list(dict.fromkeys(name.split()[0] for name in names))

    def get_command(self, context: Any, name: str) -> Any:
        full = self.prefix + name
        if full in COMMANDS:
            return command_of(load_script(COMMANDS[full].script).main, name)
        if any(other.startswith(f"{full} ") for other in COMMANDS):
            return group_of(f"{full} ")
        return None

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        name = arguments[0]
        if advice := ELSEWHERE.get(self.prefix + name):
            raise UserError(f"unknown command {self.prefix}{name}: {advice}")
        if not name.startswith("-") and self.get_command(context, name) is None:
            known = self.list_commands(context)
            raise UserError(f"unknown command {self.prefix}{name}{did_you_mean(name, known)}")
        return super().resolve_command(context, arguments)

    def shell_complete(self, context: Any, incomplete: str) -> list[Any]:
        self.get_command = self.summary_of  # all that is shown; a script takes seconds to import
        return super().shell_complete(context, incomplete)

    def summary_of(self, context: Any, name: str) -> TyperCommand:
        command = COMMANDS.get(self.prefix + name)
        return TyperCommand(name, help=command.summary if command else None)

    def format_help(self, context: Any, formatter: Any) -> None:
        if not self.prefix:
            formatter.write(TOP_HELP)
        width = max(map(len, COMMANDS)) + 2
        for title, commands in GROUPS.items():
            shown = {name: each for name, each in commands.items() if name.startswith(self.prefix)}
            if shown:
                formatter.write(f"\n{title}\n")
            for name, command in shown.items():
                formatter.write(f"  {name:<{width}}{command.summary}\n")
        formatter.write(
            "\nmmvit COMMAND --help explains a command; mmvit --install-completion sets up your shell.\n"
        )


def group_of(prefix: str, completion: bool = False) -> Any:
    group = type("Scripts", (Scripts,), {"prefix": prefix})
    app = typer.Typer(cls=group, add_completion=completion, rich_markup_mode=None, context_settings=SETTINGS)
    app.callback(invoke_without_command=True)(show_help)
    return typer.main.get_command(app)


def top_command() -> Any:
    return group_of("", completion=True)


def show_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False,
) -> None:
    if version:
        typer.echo(f"mmvit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
