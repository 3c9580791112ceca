"""Configurations: pydantic models read from TOML and `--section.key value`, where an unknown key is an error
by name."""

import difflib
import json
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mmvit.errors import UserError

FEW = 3  # problems that are told one by one
VALID_KEYS = ": valid keys: "
OTHER_SCRIPT = "; is this for another script? A recipe's header names its own"
KIND = "kind"  # the key by which sections that may be of several kinds differ


class Config(BaseModel):
    """Settings of one part. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def before_overrides(cls, values: dict[str, Any], overrides: dict[str, str]) -> dict[str, Any]:
        """The values of a file as they are where the command line says `overrides`, before these are set."""
        return values


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
    pairs = parse_overrides(overrides)
    values = cls.before_overrides(values, dict(pairs))
    for key, text in pairs:
        value = parse_value(text)
        drop_other_kinds(cls, values, key, value)
        set_by_path(values, key, value)
    source = "the command line" if path is None else str(path)
    return build_config(cls, values, source, overridden={key for key, _ in pairs})


def build_config(
    cls: type[Settings], values: dict[str, Any], source: str, overridden: Collection[str] = ()
) -> Settings:
    """Validates `values` as a `cls`; errors name the `source`, or the command line for keys that it has
    `overridden`."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            key = ".".join(find_setting(cls, problem["loc"])[0])
            if problem["type"] == "union_tag_invalid":
                key += f".{KIND}"
            parts = key.split(".")
            given = any(".".join(parts[:end]) in overridden for end in range(1, len(parts) + 1))
            given = given or any(name.startswith(f"{key}.") for name in overridden)  # a section's own check
            origin = "the command line" if given else source
            problems.setdefault(origin, []).append(describe_problem(cls, problem))
        lines = [f"{origin}: {'; '.join(shorten(texts))}" for origin, texts in problems.items()]
        raise UserError("; ".join(lines)) from None


def shorten(problems: list[str]) -> list[str]:
    """The first few, and a section's valid keys once; where there are many, it may be the configuration of
    something else."""
    told: set[str] = set()
    shown = []
    for problem in problems[:FEW]:
        text, _, keys = problem.partition(VALID_KEYS)
        shown.append(text if keys in told else problem)
        told |= {keys} - {""}
    if left := len(problems) - len(shown):
        shown.append(f"and {left} more{OTHER_SCRIPT}")
    return shown


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


def drop_other_kinds(cls: type[Config], values: dict[str, Any], key: str, value: Any) -> None:
    """Where `key` = `value` makes a section one of another kind than in the file, drops the keys of the file
    that only other kinds have."""
    *path, last = key.split(".")
    section: type[Config] = cls
    kinds: dict[str, type[Config]] = {}
    for part in path:
        field, values = section.model_fields.get(part), values.get(part)
        sections = sections_of(field) if field else []
        if not sections or not isinstance(values, dict):
            return
        section, kinds = sections[0], {kind_of(inner): inner for inner in sections}
    if last == KIND and value in kinds and values.get(KIND) != value:
        own = kinds[value].model_fields
        for name in [*values]:
            if name not in own and any(name in other.model_fields for other in kinds.values()):
                del values[name]


def describe_problem(cls: type[Config], problem: dict[str, Any]) -> str:
    """One pydantic error in the words of the configuration: the dotted key, what was found, the nearest valid
    key."""
    where, section = find_setting(cls, problem["loc"])
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        valid = list(section.model_fields)
        near = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.5)
        advice = (
            f": did you mean {'.'.join([*where[:-1], near[0]])}?"
            if near
            else f"{VALID_KEYS}{', '.join(valid)}{OTHER_SCRIPT if len(where) == 1 else ''}"
        )
        return f"unknown key {key}{advice}"
    if problem["type"] == "missing":
        return f"{key} is required"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        expected = [tag.strip("' ") for tag in problem["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(problem["ctx"]["tag"], expected, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(expected)}"
        return f"{key}.{KIND} = {problem['ctx']['tag']!r}: {advice}"
    if problem["type"] in ("tuple_type", "list_type"):
        reason = 'a list is wanted, written ["one", "two"]'
    if isinstance(problem["input"], dict):  # a rule over several keys, which its reason names
        return f"[{key}]: {reason}" if key else reason
    found = json.dumps(problem["input"], default=str, ensure_ascii=False)
    return f"{key} = {found if len(found) <= 80 else found[:77] + '...'}: {reason}"


def find_setting(cls: type[Config], place: Sequence[str | int]) -> tuple[list[str], type[Config]]:
    """The keys of a pydantic error's place, without the tag of the section's kind, and the section that the
    last key is in."""
    keys: list[str] = []
    section, kinds = cls, {}
    for number, part in enumerate(map(str, place), start=1):
        if part in kinds:
            section, kinds = kinds[part], {}
            continue
        keys.append(part)
        field = section.model_fields.get(part)
        sections = sections_of(field) if field else []
        if len(sections) == 1 and number < len(place):
            section = sections[0]
        kinds = {kind_of(inner): inner for inner in sections} if len(sections) > 1 else {}
    return keys, section


def sections_of(field: FieldInfo) -> list[type[Config]]:
    """The sections that a field may hold: one, several that differ in their `kind`, or none if it is a
    value."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]


def kind_of(section: type[Config]) -> str:
    """The value of a section's field `kind`, where it has one."""
    return section.model_fields[KIND].default if KIND in section.model_fields else ""


def describe_settings(cls: type[Config], path: str = "") -> list[str]:
    """Every setting of `cls` as a line: `train.steps = 1000`, and what it means where its name does not
    say."""
    lines = []
    for name, field in cls.model_fields.items():
        if sections := sections_of(field):
            for section in sections:
                lines += describe_settings(section, f"{path}{name}.")
            continue
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        kind = " | ".join(map(str, choices)) or getattr(field.annotation, "__name__", str(field.annotation))
        default = "(required)" if field.is_required() else f"= {field.get_default(call_default_factory=True)}"
        note = f"; {field.description}" if field.description else ""
        lines.append(f"  {path}{name} {default}    {kind}{note}")
    return lines


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
