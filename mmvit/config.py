"""Configurations: pydantic models read from TOML and `--section.key value`, where an unknown key is an error
by name."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mmvit.errors import UserError


class Config(BaseModel):
    """Settings of one part. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Config)


def load_config(cls: type[Settings], path: Path | None, overrides: list[str] = ()) -> Settings:
    """Builds a `cls` from a TOML file and command-line overrides.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: `["--train.steps", "100", "--optimizer.lr=1e-3"]`; a later one wins over an earlier one and
            over the file.

    Raises:
        UserError: for a missing or unreadable file, an unknown key (with the nearest valid one) or an
        ill-typed value.
    """
    values = read_toml(path) if path is not None else {}
    for key, text in parse_overrides(overrides):
        set_by_path(values, key, parse_value(text))
    return build_config(cls, values, source=str(path) if path is not None else "the command line")


def build_config(cls: type[Settings], values: dict[str, Any], source: str) -> Settings:
    """Validates `values` as a `cls`; `source` names the file in errors."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [describe_problem(cls, problem) for problem in error.errors()]
        raise UserError(f"{source}: " + "; ".join(problems)) from None


def read_toml(path: Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no configuration file {path}; the ready ones are in configs/*.toml")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def parse_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """`["--a.b", "1", "--c=2"]` → `[("a.b", "1"), ("c", "2")]`."""
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; settings are written --section.key value")
        key, equals, text = key[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} lacks a value; write --{key} VALUE")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def parse_value(text: str) -> Any:
    """A TOML value where the text is one (`3`, `true`, `[1, 2]`), otherwise the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def set_by_path(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--{key}: {section} is a value, not a section")
    values[last] = value


def describe_problem(cls: type[Config], problem: dict[str, Any]) -> str:
    """One pydantic error in the words of the configuration: the dotted key, what was found, the nearest valid
    key."""
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        valid = section_fields(cls, where[:-1])
        near = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.5)
        advice = (
            f"did you mean {'.'.join([*where[:-1], near[0]])}?" if near else f"valid keys: {', '.join(valid)}"
        )
        return f"unknown key {key}: {advice}"
    if problem["type"] == "missing":
        return f"{key} is required"
    found = json.dumps(problem["input"], default=str, ensure_ascii=False)
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{key} = {found[:80]}: {reason}" if key else reason


def section_fields(cls: type[Config], path: list[str]) -> list[str]:
    """The valid keys of the section at `path` inside `cls`."""
    for part in path:
        field = cls.model_fields.get(part)
        inner = [field.annotation, *get_args(field.annotation)] if field else []
        sections = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, Config)]
        if not sections:
            return []
        cls = sections[0]
    return list(cls.model_fields)


def split_command_line(
    arguments: list[str], flags: set[str], options: set[str]
) -> tuple[list[str], dict[str, Any], list[str]]:
    """Splits a script's arguments into positionals, its own flags and options, and configuration overrides.

    `flags` take no value, `options` take one. `--local_rank`, which DeepSpeed's launcher appends, is dropped.
    """
    positional, own, overrides, rest = [], {}, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            positional.append(argument)
        elif name in flags:
            own[name] = True
        else:
            if not equals:
                if not rest:
                    raise UserError(f"--{name} lacks a value; write --{name} VALUE")
                text = rest.pop(0)
            if name in options:
                own[name] = text
            elif name not in ("local_rank", "local-rank"):
                overrides += [f"--{name}={text}"]
    return positional, own, overrides
