"""How a recipe becomes settings: file, preset, start, command line, what the data say, one validation."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from mmvit.config import (
    FROM_DATA,
    IN_STEPS,
    KIND,
    OF_TRAINING,
    Config,
    build_config,
    flatten,
    kind_of,
    merged,
    read_toml,
    sections_of,
    set_by_path,
)
from mmvit.errors import MissingData, UserError
from mmvit.hub import find_model_folder, in_words, read_part_description, run_exports
from mmvit.models.presets import PRESETS, preset
from mmvit.places import find
from mmvit.recipes.facts import Fact
from mmvit.recipes.find import CONFIG, find_recipe, preparation
from mmvit.recipes.tasks import recipe_class
from mmvit.streams.shards import expand_shards
from mmvit.training.config import Recipe


class Resolved(NamedTuple):
    """A recipe ready to train, and lines about what was decided on the way."""

    recipe: Recipe
    notes: list[str]


def resolve(
    source: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    read_data: bool = True,
    task: str | None = None,
) -> Resolved:
    """Resolves a recipe. From weakest to strongest, `[model]` comes from

    1. the model that `start.model` names;
    2. the preset that the file names;
    3. the file: a TOML file, the name of a shipped recipe, or a run folder to resume;
    4. `settings`, from the command line. A preset, start or kind of model named there replaces the file's
       architecture, but keeps its settings of data and training (image size, dropout).

    Shards and tokenizers then say the classes, the vocabulary and the grid; contradicting them is an error.

    Args:
        settings: {"section.key": value}.
        resume: take the model and the start from the run folder, where the run has begun.
        read_data: False does without the data, so that nothing but the recipe needs to exist.
        task: the only task that will do; a recipe need not name it then.

    Raises:
        UserError: for anything missing, unknown or contradictory, naming the file and the key.
    """
    given = flatten(settings or {})
    path = find_recipe(source, resume)
    values = read_toml(path)
    is_run = Path(source).is_dir()
    if is_run:
        given = {"output": str(source), **given}  # where the run is now, wherever it was written
    recipe = recipe_class(values.get("task", task), str(path))
    if task and values.get("task", task) != task:
        raise UserError(f'{source} has task "{values["task"]}", not "{task}": run mmvit train {source}')
    check_sections(recipe, values, given, str(path))
    check_one_architecture(given)
    output = given.get("output", values.get("output"))
    run = read_run(output) if resume else {}
    notes = []

    begun: dict[str, Any] = {}
    model = dict_at(values, "model")
    base = preset_values(recipe, model.pop("preset", None), with_facts=not read_data)
    model = merged(base, model)
    if name := given.pop("model.preset", None):
        base = preset_values(recipe, name, with_facts=not read_data)
        model = merged(base, without_architecture(model, model_section(recipe, base)))
    if start := given.get("start.model", dict_at(values, "start").get("model")):
        begun = run.get("model") or start_values(recipe, start)
        section = model_section(recipe, begun)
        if (kind := given.get("model.kind", kind_of(section))) != kind_of(section):
            raise UserError(
                f"start.model {start} is of kind {kind_of(section)}, not {kind}: remove model.kind"
            )
        if "start.model" in given:
            model = without_architecture(model, section)
        model = merged(without_facts(deepcopy(begun), section), model)
        use_tokenizers_of(start, recipe, values, run)
    if (kind := given.get("model.kind")) and kind != model.get(KIND, default_kind(recipe)):
        model = {KIND: kind, **without_architecture(model, model_section(recipe, {KIND: kind}))}
    if default := default_kind(recipe):
        model = {KIND: default, **model}
    if model:
        values["model"] = model
    if not is_run:
        notes += shrink_schedules(recipe, values, given)
    for key, value in given.items():
        set_by_path(values, key, value)
    if run:
        notes += use_tokenizers_of_run(Path(str(output)), values, given)
    if read_data:
        try:
            for fact in recipe.facts(values):
                set_fact(values, fact, {"model": begun})
        except UserError as error:
            build_config(recipe, values, str(path), overridden=given)  # the recipe's own mistakes come first
            is_own = not any(key.endswith((".train", ".held_out")) for key in given)  # data that it names
            if isinstance(error, MissingData) and is_own and (steps := preparation(path)):
                raise UserError(f"{error}. The recipe's data are made by: {steps}") from None
            raise
    values = {**values, "train": {"select": recipe.selects, **dict_at(values, "train")}}
    resolved = build_config(recipe, values, str(path), overridden=given)
    if begun and not run:
        facts = {} if read_data else of_data(resolved.model)
        resolved.check_start({**begun, **facts})
    if read_data:
        notes += warn_of_shared_shards(resolved)
    return Resolved(resolved, notes)


def warn_of_shared_shards(recipe: Recipe) -> list[str]:
    """A warning for each data section whose held-out shards are also trained on."""
    warnings = []
    for name in type(recipe).model_fields:
        data = getattr(recipe, name)
        if hasattr(data, "held_out"):
            shared = {*expand_shards(data.train)} & {*expand_shards(data.held_out)}
            if shared:
                warnings.append(
                    f"warning: {name}.held_out has {len(shared)} of the shards in {name}.train "
                    f"({min(shared)}): held-out figures will be too good"
                )
    return warnings


def read_run(output: object) -> dict[str, Any]:
    """The resolved recipe of the run in the folder `output`; empty if none has begun there."""
    path = Path(str(output)) / CONFIG
    return read_toml(path) if path.is_file() else {}


def dict_at(values: dict[str, Any], section: str) -> dict[str, Any]:
    """A copy of a section, empty where it is missing; validation refuses one that is not a section."""
    return dict(found) if isinstance(found := values.get(section), dict) else {}


def check_sections(
    recipe: type[Recipe], values: dict[str, Any], given: Mapping[str, Any], source: str
) -> None:
    """Raises UserError if a value stands where a section belongs, such as `train = 5`."""
    for origin, found in ((source, values), ("the command line", given)):
        for name, field in recipe.model_fields.items():
            if sections_of(field) and name in found and not isinstance(found[name], dict):
                raise UserError(
                    f"{origin}: {name} is a section with settings of its own, got {found[name]!r}"
                )


def check_one_architecture(given: Mapping[str, Any]) -> None:
    """Raises UserError if the command line names two models."""
    named = [key for key in ("model.preset", "start.model") if key in given]
    if len(named) == 2:
        raise UserError("--model.preset and --start.model each name a model: give one of them")
    if "model.preset" in given and "model.kind" in given:
        raise UserError("--model.preset says the kind of model: remove --model.kind")


def model_sections(recipe: type[Recipe]) -> list[type[Config]]:
    return sections_of(recipe.model_fields["model"])


def default_kind(recipe: type[Recipe]) -> str:
    """The kind of model where a recipe may have several; empty where there is no choice."""
    sections = model_sections(recipe)
    return kind_of(sections[0]) if len(sections) > 1 else ""


def model_section(recipe: type[Recipe], model: dict[str, Any]) -> type[Config]:
    """The class of a `[model]` with these values."""
    sections = model_sections(recipe)
    return next((each for each in sections if kind_of(each) == model.get(KIND)), sections[0])


def preset_values(recipe: type[Recipe], name: str | None, with_facts: bool = False) -> dict[str, Any]:
    """What a preset sets in `[model]`; without what data determine, unless there are no data to say it."""
    if name is None:
        return {}
    config, kinds = preset(str(name)), tuple(model_sections(recipe))
    if not isinstance(config, kinds):
        fitting = [each for each in PRESETS if isinstance(PRESETS[each], kinds)]
        raise UserError(
            f'model.preset {name} does not fit task "{recipe.model_fields["task"].default}"; '
            f"choose from {', '.join(fitting) or 'none'}"
        )
    values = config.model_dump(exclude_unset=True)
    if hasattr(config, KIND):
        values[KIND] = config.kind
    return values if with_facts else without_facts(values, type(config))


def start_values(recipe: type[Recipe], start: str) -> dict[str, Any]:
    """The `[model]` of the trained model `start`."""
    expected = recipe.starts_from
    if expected is None:
        return {}
    folder = find_model_folder(str(start))
    described = read_part_description(folder, expected)
    if described[KIND] != expected:
        raise UserError(
            f"start.model: {folder} holds {in_words(described[KIND])}, expected {in_words(expected)}"
        )
    values = dict(described["config"])
    if "representation_width" in model_section(recipe, values).model_fields:
        values["representation_width"] = None  # belongs to the old head
    return values


def use_tokenizers_of(start: str, recipe: type[Recipe], values: dict[str, Any], run: dict[str, Any]) -> None:
    """Makes a generator's own tokenizers the default of `[data]`, which its trained weights depend on."""
    if "image_tokenizer" not in recipe.model_fields["data"].annotation.model_fields:
        return
    data = dict_at(values, "data")
    for name in ("text_tokenizer", "image_tokenizer"):
        if name not in data:
            place = dict_at(run, "data").get(name) or str(find_model_folder(str(start)) / name)
            values.setdefault("data", {})[name] = place


def use_tokenizers_of_run(run: Path, values: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Makes a run's own copies of tokenizers take the place of those that are gone from where they were,
    unless they are `given` now; returns a line about each."""
    notes = []
    for key, value in flatten(values).items():
        name = key.rpartition(".")[2]
        is_tokenizer = name in ("text_tokenizer", "image_tokenizer")
        if not is_tokenizer or key in given or find(str(value)).exists():
            continue
        for export in run_exports(run):
            if (own := export / name).is_dir():
                set_by_path(values, key, str(own))
                notes.append(f"{key}: {value} is not on this disk, so the run's own copy is used, {own}")
                break
    return notes


def origin(section: type[Config], name: str) -> Any:
    field = section.model_fields.get(name)
    return field.json_schema_extra if field else None


def without_facts(values: dict[str, Any], section: type[Config]) -> dict[str, Any]:
    """A `[model]` without the settings that data determine."""
    return {name: value for name, value in values.items() if origin(section, name) is not FROM_DATA}


def of_data(model: Config) -> dict[str, Any]:
    """The settings of a `[model]` that data determine."""
    values = model.model_dump()
    return {name: value for name, value in values.items() if origin(type(model), name) is FROM_DATA}


def without_architecture(values: dict[str, Any], section: type[Config]) -> dict[str, Any]:
    """Of a `[model]` what a model of another architecture, a `section`, keeps: the settings of data and
    training."""
    kept = {}
    for name, value in values.items():
        inner = sections_of(section.model_fields[name]) if name in section.model_fields else []
        if inner and isinstance(value, dict):
            if own := without_architecture(value, inner[0]):
                kept[name] = own
        elif origin(section, name) in (FROM_DATA, OF_TRAINING):
            kept[name] = value
    return kept


def set_fact(values: dict[str, Any], fact: Fact, start: dict[str, Any]) -> None:
    """Sets what the data specify, or else what the start has.

    Raises:
        UserError: if the recipe contradicts them, or nothing specifies it.
    """
    own, begun = value_at(values, fact.key), value_at(start, fact.key)
    if fact.value is None:
        if own is None and begun is None:
            raise UserError(f"{fact.found_in} does not say {fact.key.rpartition('.')[2]}: set {fact.key}")
        set_by_path(values, fact.key, begun if own is None else own)
    elif own not in (None, fact.value):
        raise UserError(f"{fact.key} is {own}, but {fact.found_in} has {fact.value}; leave it out")
    else:
        set_by_path(values, fact.key, fact.value)


def value_at(values: Any, key: str) -> Any:
    """What `values` has at "a.b", None if nothing; lists as tuples."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return tuple(values) if isinstance(values, list) else values


def shrink_schedules(recipe: type[Recipe], values: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Shortens what is counted in steps where the command line trains for fewer steps than the recipe.

    Intervals, warm-up and the like keep their share of the run unless the command line sets them, too.
    """
    default = sections_of(recipe.model_fields["train"])[0].model_fields["steps"].default
    before, now = dict_at(values, "train").get("steps", default), given.get("train.steps")
    with suppress(TypeError, ValueError, OverflowError):  # which validation explains
        before, now = int(before), int(float(now))
    if not (type(now) is type(before) is int and 0 < now < before):
        return []
    shrunk = []
    for key, value in counted_in_steps(recipe, values):
        if value and key not in given and (shorter := max(1, round(value * now / before))) < value:
            set_by_path(values, key, shorter)
            shrunk.append(f"{key} is {shorter}")
    return [f"{now} steps instead of the recipe's {before}, so {', '.join(shrunk)}"] if shrunk else []


def counted_in_steps(
    section: type[Config], values: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, int]]:
    """Every setting that counts training steps, with its value."""
    for name, field in section.model_fields.items():
        value = values.get(name)
        if inner := sections_of(field):
            own = value if isinstance(value, dict) else {}
            chosen = next((each for each in inner if kind_of(each) == own.get(KIND)), inner[0])
            yield from counted_in_steps(chosen, own, f"{path}{name}.")
        elif field.json_schema_extra is IN_STEPS:
            if value is None and path in ("train.", "optimizer."):  # always in use, set or not
                value = field.default
            if isinstance(value, int):
                yield path + name, value
