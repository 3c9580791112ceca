"""What processes on several hosts must have alike to train one model: the code, the recipe and the data."""

from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from typing import Any

import torch

from mmvit.config import flatten
from mmvit.places import PACKAGE, find, shipped
from mmvit.streams.address import Address
from mmvit.streams.shards import expand_shards
from mmvit.training import Session
from mmvit.training.config import Recipe

OF_A_HOST = ("cache", "cache_size", "num_workers", "output")  # settings that change no result
ADVICE = "Give all hosts the same version of mmvit, recipe and shards"


def check_alike(session: Session, data: dict[str, Any]) -> None:
    """Raises UserError if processes would train with different code, settings or shards, which it names.

    Shards are compared by name and size, and not by content.

    Args:
        data: the sections of the recipe that name shards.
    """
    if session.processes.world_size == 1:
        return
    own = session.processes.together(lambda: {**code(), **settings(session.recipe), **dict(files(data))})
    session.processes.check_alike(own, ADVICE)


@cache
def code() -> dict[str, str]:
    scripts = [*sorted(PACKAGE.rglob("*.py")), *sorted(shipped("pipelines").glob("*.py"))]
    content = digest(path.read_bytes() for path in scripts)
    return {"the content of mmvit": content, "the version of torch": torch.__version__}


def settings(recipe: Recipe) -> dict[str, Any]:
    every = flatten(recipe.model_dump(mode="json"))
    return {name: value for name, value in every.items() if name.rpartition(".")[2] not in OF_A_HOST}


def files(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The shards and text tokenizers of each section, in words."""
    for section, values in data.items():
        for name in ("train", "held_out"):
            shards = expand_shards(getattr(values, name))
            sizes = [0 if isinstance(shard, Address) else shard.stat().st_size for shard in shards]
            parts = zip(shards, sizes, strict=True)
            listed = digest(f"{shard.name} {size}\n".encode() for shard, size in parts)
            total = f"{len(shards)} shards, {sum(sizes):,} bytes (names and sizes {listed})"
            yield f"the content of {section}.{name}", total
        if tokenizer := getattr(values, "text_tokenizer", None):
            path = find(tokenizer)
            content = (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
            yield f"the content of {section}.text_tokenizer", digest([content])


def digest(parts: Iterable[bytes]) -> str:
    total = sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:8]
