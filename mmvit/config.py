"""Settings as pydantic models, read from TOML and `--section.key value`; unknown keys are errors."""

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mmvit.errors import UserError, did_you_mean, nearest

FEW = 3  # problems shown one by one
VALID_KEYS = ": valid keys: "
RANGES = {  # pydantic's errors about a number's range, in words, and where the bound is
    "greater_than": ("a number greater than", "gt"),
    "greater_than_equal": ("a number of at least", "ge"),
    "less_than": ("a number less than", "lt"),
    "less_than_equal": ("a number of at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text",
    "path": "a path", "model": "a section",
}  # fmt: skip
KIND = "kind"  # the key that says which of several sections is meant

# Markers, as `Field(..., json_schema_extra=...)`, by which a recipe is resolved (mmvit/recipes/resolve.py)
FROM_DATA = {"from": "data"}  # shards and tokenizers say it; a recipe need not
OF_TRAINING = {"from": "training"}  # not part of an architecture: stays when a preset replaces the model
IN_STEPS = {"from": "steps"}  # a number of training steps: shrinks with train.steps


class Config(BaseModel):
    """Settings of one part. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Config)


def build_config(
    cls: type[Settings], values: dict[str, Any], source: str, overridden: Collection[str] = ()
) -> Settings:
    """Validates `values` as a `cls`; errors name the `source`, or the command line for `overridden` keys.

    Raises:
        UserError: for an unknown key (with the nearest valid one) or a wrong value.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems: dict[str, dict[str, str]] = {}
        for problem in error.errors():
            key = ".".join(find_setting(cls, problem["loc"])[0])
            if problem["type"] == "union_tag_invalid":
                key += f".{KIND}"
            parts = key.split(".")
            given = any(".".join(parts[:end]) in overridden for end in range(1, len(parts) + 1))
            given = given or any(name.startswith(f"{key}.") for name in overridden)  # a section's own check
            origin = "the command line" if given else source
            described = problems.setdefault(origin, {})
            described.setdefault(key, describe_problem(cls, problem))  # one problem a key, the first type's
        lines = [f"{origin}: {'; '.join(first_few([*texts.values()]))}" for origin, texts in problems.items()]
        raise UserError("; ".join(lines)) from None


def first_few(problems: list[str]) -> list[str]:
    """The first few problems, listing a section's valid keys only once."""
    listed: set[str] = set()
    shown = []
    for problem in problems[:FEW]:
        text, _, keys = problem.partition(VALID_KEYS)
        shown.append(text if keys in listed else problem)
        listed |= {keys} - {""}
    if left := len(problems) - len(shown):
        shown.append(f"and {left} more")
    return shown


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and nested too deep
        raise UserError(f"{path} is not valid TOML: {error}") from None


def split_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits `["NAME", "--train.steps", "100"]` into names and {key: value}; the last value of a key wins.

    Raises:
        UserError: for a key without a value.
    """
    names, settings, rest = [], {}, list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            names.append(key)
            continue
        key, equals, text = key[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} needs a value: --{key} VALUE")
            text = rest.pop(0)
        for name, value in flatten({key: parse_value(text)}).items():
            settings.pop(name, None)  # so that the last one is set last, too
            settings[name] = value
    return names, settings


def parse_value(text: str) -> Any:
    """A TOML value where the text is one (`3`, `true`, `[1, 2]`), otherwise the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def set_by_path(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets `values["a"]["b"]` for the key "a.b", making sections as needed."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--{key}: {section} is a value, not a section")
    values[last] = value


def describe_problem(cls: type[Config], problem: dict[str, Any]) -> str:
    """One pydantic error in the words of the configuration: the dotted key, what was found, the nearest valid
    key."""
    where, section = find_setting(cls, problem["loc"])
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        valid = list(section.model_fields)
        match = nearest(where[-1], valid)
        near = ".".join([*where[:-1], match]) if match else ""
        advice = f": did you mean {near}?" if near else f"{VALID_KEYS}{', '.join(valid)}"
        return f"unknown key {key}{advice}"
    if problem["type"] == "missing":
        return f"{key} is required"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        expected = [tag.strip("' ") for tag in problem["ctx"]["expected_tags"].split(",")]
        return (
            f"unknown {key}.{KIND} {problem['ctx']['tag']!r}{did_you_mean(problem['ctx']['tag'], expected)}"
        )
    if problem["type"] in RANGES:
        words, bound = RANGES[problem["type"]]
        reason = f"expected {words} {problem['ctx'][bound]:g}"
    if problem["type"] == "literal_error":
        reason = f"expected {problem['ctx']['expected']}"
    if problem["type"].endswith(("_type", "_parsing")) and (kind := problem["type"].split("_")[0]) in KINDS:
        reason = f"expected {KINDS[kind]}"
    if problem["type"] == "too_short":
        reason = f"expected at least {problem['ctx']['min_length']}"
    if problem["type"] in ("tuple_type", "list_type"):
        reason = 'expected a list, such as ["one", "two"]'
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
        if field and not sections:
            break  # what follows says which of the types that the setting may have
        if len(sections) == 1 and number < len(place):
            section = sections[0]
        kinds = {kind_of(inner): inner for inner in sections} if len(sections) > 1 else {}
    return keys, section


def sections_of(field: FieldInfo) -> list[type[Config]]:
    """The sections that a field may hold: one, several that differ in their `kind`, or none if it is a
    value."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]


def section_of(cls: type[Config], name: str) -> type[Config]:
    """The class of the section `name` of `cls`, which has one kind."""
    return sections_of(cls.model_fields[name])[0]


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


def setting_names(cls: type[Config], path: str = "") -> list[str]:
    """Every setting of `cls` by its dotted key."""
    names = []
    for name, field in cls.model_fields.items():
        sections = sections_of(field)
        inner = [key for section in sections for key in setting_names(section, f"{path}{name}.")]
        names += inner if sections else [path + name]
    return names


def merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`values` overlaid with `others`, section by section."""
    sections = {
        name: merged(values[name], others[name])
        for name in values.keys() & others.keys()
        if isinstance(values[name], dict) and isinstance(others[name], dict)
    }
    return {**values, **others, **sections}


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{"model": {"core": {"depth": 6}}}` → `{"model.core.depth": 6}`."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def to_toml(values: dict[str, Any], path: str = "") -> str:
    """A nested dict of plain values as TOML. None is left out, which means the default."""
    plain = {key: value for key, value in values.items() if value is not None and not isinstance(value, dict)}
    text = "".join(f"{toml_key(key)} = {toml_value(value)}\n" for key, value in plain.items())
    for key, value in values.items():
        if isinstance(value, dict):
            section = path + toml_key(key)
            text += f"\n[{section}]\n" + to_toml(value, f"{section}.")
    return text


def toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(key)} = {toml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(inner) for inner in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
