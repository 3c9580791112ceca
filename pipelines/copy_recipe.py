"""Copy a shipped recipe to a file of your own, to edit and train.

    mmvit copy emoji_demo my.toml
    mmvit copy fashion_mnist recipes/mine.toml

Then `mmvit train my.toml` trains it.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument

from mmvit.cli import run_script
from mmvit.errors import UserError, did_you_mean
from mmvit.recipes.find import recipes


def main(
    name: Annotated[str, Argument(help="a shipped recipe (mmvit train --list)")],
    file: Annotated[Path, Argument(help="the file to write")],
) -> None:
    shipped = recipes()
    if name not in shipped:
        raise UserError(f"no recipe {name}{did_you_mean(name, shipped)}")
    if file.exists():
        raise UserError(f"{file} already exists: choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.write_text(shipped[name].read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        file.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    print(f"{file} written; train it with: mmvit train {file}")


if __name__ == "__main__":
    run_script(main)
