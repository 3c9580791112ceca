"""What shards and tokenizers say about a model: its classes, vocabulary, codebook and grid of codes."""

from pathlib import Path
from typing import Any, NamedTuple

from mmvit.config import Config, section_of
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import ENCODE_AGAIN
from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError, shorten
from mmvit.streams.address import Address
from mmvit.streams.remote import Missing, NotFound, facts_of
from mmvit.streams.shards import expand_shards


class Fact(NamedTuple):
    """A setting whose value the data determine; None where they do not say and the recipe has to."""

    key: str
    value: Any
    found_in: str  # who says so, for messages


def folders_of(*patterns: str | list[str] | tuple[str, ...]) -> list[Path]:
    """The folders of the shards that `patterns` name, in this order."""
    each = [pattern for entry in patterns for pattern in ([entry] if isinstance(entry, str) else entry)]
    return list(dict.fromkeys(shard.parent for pattern in each for shard in expand_shards(pattern)))


def folders_in(values: dict[str, Any], section: str) -> list[Path]:
    """The folders of a recipe's data section; none where validation will refuse the section anyway."""
    data = values.get(section)
    patterns = [data.get("train"), data.get("held_out")] if isinstance(data, dict) else []
    named = [each for each in patterns if each]
    flat = [part for each in named for part in (each if isinstance(each, list | tuple) else [each])]
    return folders_of(*flat) if all(isinstance(part, str) for part in flat) else []


def class_names(folders: list[Path]) -> list[str] | None:
    """The classes that dataset.json names beside the shards, None if it names none.

    Raises:
        UserError: if folders name different classes.
    """
    named = {folder: classes for folder in folders if (classes := read_dataset_card(folder).get("classes"))}
    for folder, classes in named.items():
        first = next(iter(named))
        if classes != named[first]:
            raise UserError(
                f"{first} and {folder} name different classes in dataset.json: {shorten(named[first])}; "
                f"{shorten(classes)}. Prepare both with the same classes"
            )
    return next(iter(named.values()), None)


def classes_in(values: dict[str, Any], data: str, model: str, required: bool = True) -> list[Fact]:
    """The number of classes in the shards of the section `data`, for the section `model`."""
    folders = folders_in(values, data)
    names = class_names(folders)
    if names is None and not required:
        return []
    naming = [folder for folder in folders if read_dataset_card(folder).get("classes")] or folders
    place = str(naming[0] / "dataset.json") if naming else "dataset.json"
    return [Fact(f"{model}.num_classes", names and len(names), place)]


def vocabulary(recipe: type[Config], values: dict[str, Any], data: str, model: str) -> list[Fact]:
    """The vocabulary of the text tokenizer that the section `data` names."""
    default = section_of(recipe, data).model_fields["text_tokenizer"].default
    section = values.get(data)
    path = section.get("text_tokenizer", default) if isinstance(section, dict) else default
    return [Fact(f"{model}.vocab_size", TextTokenizer.from_file(path).vocab_size, str(path))]


def codes_in(values: dict[str, Any], data: str, model: str) -> list[Fact]:
    """The grid and codebook of the codes in the shards of the section `data`.

    Raises:
        UserError: if their dataset.json does not say.
    """
    for folder in folders_in(values, data):
        card = read_dataset_card(folder)
        if not card and isinstance(folder, Address):
            refuse_denied(folder / "dataset.json")
        made_by = card.get("image_tokenizer", {})
        grid = made_by.get("grid")
        if not isinstance(grid, list) or len(grid) != 2 or "codebook_size" not in made_by:
            raise UserError(
                f"{folder} has no image codes, or its dataset.json does not say what made them; "
                f"{ENCODE_AGAIN}"
            )
        place = str(folder / "dataset.json")
        return [
            Fact(f"{model}.grid", tuple(grid), place),
            Fact(f"{model}.codebook_size", made_by["codebook_size"], place),
        ]
    return []


def refuse_denied(file: Address) -> None:
    """Raises UserError if a server does not let us read `file`, rather than say that there is none."""
    try:
        facts_of(file)
    except NotFound:
        pass
    except Missing as missing:
        raise UserError(
            f"cannot tell what made the image codes: {missing} (some servers also answer this where there is "
            "no such file)"
        ) from None


def describe_sizes(folders: list[Path], height_width: tuple[int, int]) -> str:
    """A line about the size that images are resized to, and the sizes that they have."""
    target = "x".join(map(str, height_width))
    sizes = [
        "x".join(map(str, size))
        for folder in folders
        if (size := (card := read_dataset_card(folder)).get("image_size") or card.get("image_size_median"))
    ]
    own = " and ".join(dict.fromkeys(sizes))
    if not own or own == target:
        return f"images of {target} pixels"
    return f"images of {own} pixels (median) are resized to {target}: change it with --model.image_size"
