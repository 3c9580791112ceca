"""How codes are drawn: the settings that every way of sampling shares, and what they may be."""

import difflib
import json
import math
import numbers
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from mmvit.errors import UserError
from mmvit.hub import write_json

FILE = "generation_config.json"  # in a generator's folder
OWN = ("guidance_scale", "temperature", "top_k", "top_p")  # settings that it may name
WHOLE = ("top_k", "seed", "batch_size")  # settings that are whole numbers


def add_options(parser: Any) -> None:
    """Declares the options of `given`, with candidates, scorer and seed, in an argparse parser or group."""
    of_folder = "(what the model's folder says, else {})".format
    parser.add_argument(
        "--guidance-scale", type=float, help=f"above 1 follows the caption more closely {of_folder(1)}"
    )
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest code {of_folder(1)}")
    parser.add_argument(
        "--top-k", type=int, help=f"draw among the k likeliest codes, 0 for all {of_folder('all')}"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        help=f"draw among the likeliest codes of so much probability {of_folder(1)}",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="picture j of a caption has seed + j (%(default)s)"
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        help="pictures drawn for each that is kept, the best by the model's own likelihood of the caption "
        "or by --scorer (%(default)s)",
    )
    parser.add_argument("--scorer", help="a CLIP's folder or Hub repository (pipelines/train_clip.py)")


def given(options: Namespace, *more: str) -> dict[str, Any]:
    """Of a script's options those of `OWN`, and of `more`, that were given."""
    values = {name: getattr(options, name) for name in (*OWN, *more)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of `Generator.generate`; a generator's folder may name its own defaults.

    Args:
        guidance_scale: above 1 follows the caption more closely (2207.12598), 0 not at all; needs a model
            trained with caption dropout. From about 5 on pictures get coarse.
        temperature: below 1 is more cautious; 0 always takes the likeliest code.
        top_k: draw among the k likeliest codes alone; None or 0 takes all.
        top_p: draw among the likeliest codes that together have this probability.
        seed: picture j of a caption is drawn with seed + j, so it can be drawn again alone: the same codes,
            and colours that rounding moves by one level of 255 at most.
        batch_size: pictures drawn at a time.

    Raises:
        UserError: for a setting outside its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        for field in fields(self):
            check_number(field.name, getattr(self, field.name))
        if not (self.guidance_scale >= 0 and math.isfinite(self.guidance_scale)):
            raise UserError(
                f"guidance_scale is {self.guidance_scale}; it is 0 (the caption does not count) or more; a "
                "negative caption names what to lead away from"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it is 0 (the likeliest code) or more")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it is how many codes remain, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it is a whole number of 64 bits")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; at least 1 picture is drawn at a time")

    def but(self, settings: Mapping[str, Any]) -> Self:
        """These with some exchanged. Raises UserError for a name that there is not."""
        check_names(settings, [field.name for field in fields(self)])
        return replace(self, **settings)

    def save(self, folder: Path) -> None:
        """Writes what a generator in `folder` is to be sampled with where nothing else is said."""
        write_json({name: value for name, value in asdict(self).items() if name in OWN}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote, the defaults where nothing was. Raises UserError for anything else."""
        if not (path := folder / FILE).is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{path} is a {type(found).__name__}; it is {{{', '.join(OWN)}}} with numbers")
        try:
            check_names(found, OWN)
            return cls().but(found)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def check_names(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises UserError for a setting that is none of the known, with the nearest of these."""
    if unknown := [name for name in settings if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no setting {unknown[0]!r} for sampling: {advice}")


def check_number(name: str, value: Any) -> None:
    """Raises UserError for a setting that is no number, or no whole one where it has to be."""
    if value is None and name == "top_k":
        return
    kind = numbers.Integral if name in WHOLE else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it is a {'whole ' if name in WHOLE else ''}number")
