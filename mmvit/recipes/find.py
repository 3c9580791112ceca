"""Where recipes are: the shipped ones, TOML files, and run folders. Imports nothing heavy."""

import re
from pathlib import Path

from mmvit.config import read_toml
from mmvit.errors import UserError, did_you_mean
from mmvit.places import shipped

CONFIG = "config.toml"  # a run's resolved recipe


def recipes() -> dict[str, Path]:
    """The recipes that ship with mmvit, by name."""
    return {path.stem: path for path in sorted(shipped("configs").glob("*.toml"))}


def find_recipe(source: str | Path, resume: bool = False) -> Path:
    """The TOML file that `source` means: itself, a shipped recipe's name, or a run folder to resume."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / CONFIG).is_file():
        if not resume:
            raise UserError(f"{path} is a run folder: add --resume to continue it, or name a recipe")
        return path / CONFIG
    if path.is_dir():
        raise UserError(f"{path} is a folder without {CONFIG}: expected a recipe or a run folder")
    if len(path.parts) > 1 or path.suffix:
        raise UserError(f"no recipe or run folder {path}; mmvit train --list shows the shipped recipes")
    names = recipes()
    if str(source) in names:
        return names[str(source)]
    raise UserError(f"no recipe {source}{did_you_mean(path.stem, names)} (mmvit train --list shows all)")


def preparation(path: Path) -> str:
    """The commands in a shipped recipe's header that come before its training, joined; empty for others."""
    if path not in recipes().values():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#   ")]
    return "; ".join(each for each in commands if re.search(r"mmvit (prepare|encode|shards|convert)", each))


def table_of_recipes() -> str:
    """The shipped recipes by task, each with the first sentence of its header."""
    by_task: dict[str, list[str]] = {}
    width = max(map(len, recipes())) + 2
    for name, path in recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        header = next(line for line in lines if line.startswith("# ")).removeprefix("# ")
        by_task.setdefault(read_toml(path)["task"], []).append(f"  {name:<{width}}{header.rstrip('.')}")
    return "\n\n".join("\n".join([task, *lines]) for task, lines in by_task.items())
