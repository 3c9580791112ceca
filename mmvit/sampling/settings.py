"""Sampling settings: how codes are drawn, the defaults that a generator's folder names, and the options by
which commands set them."""

import json
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, ConfigDict, Field, field_validator
from typer import Option

from mmvit.config import Config, build_config
from mmvit.errors import UserError, did_you_mean
from mmvit.files import read_json, write_json
from mmvit.hub import SHIPPED

FILE = "generation_config.json"  # in a generator's folder
SAVED_FIELDS = (
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "num_steps",
)  # settings that the file may hold


MOST_GUIDANCE = 1000.0  # far beyond use, and far below what overflows


def check_guidance_scale(scale: float) -> float:
    if not 0 <= scale <= MOST_GUIDANCE:
        raise ValueError(
            f"expected 0 (ignore the caption) to {MOST_GUIDANCE:g}; to lead away from a caption, use "
            "`negative`"
        )
    return scale


GuidanceScale = Annotated[float, AfterValidator(check_guidance_scale)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingSettings(Config):
    """Settings of `Generator.draw`; a generator's folder may name its own defaults.

    Args:
        guidance_scale: above 1 follows the caption more closely (2207.12598), 0 ignores it; needs a model
            trained with caption dropout. From about 5 on images get coarse.
        temperature: below 1 is more cautious; 0 always takes the likeliest code.
        top_k: draw among the k likeliest codes only; None or 0 means all.
        top_p: draw among the likeliest codes that together have this probability.
        num_steps: forwards of the model per image, for a generator that draws in any order; None means
            `default_steps`. More steps draw fewer codes at a time, which then fit each other better.
        seed: image j of a caption is drawn with seed + j, so it can be drawn again alone: with the same
            codes, and colours that differ by at most one level of 255, from rounding.
        batch_size: images drawn at a time; fewer when memory runs out.
    """

    model_config = ConfigDict(strict=True)  # no "0.7" and no True for a number

    guidance_scale: GuidanceScale = 1.0
    temperature: Temperature = 1.0
    top_k: int | None = Field(None, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    num_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    batch_size: int = Field(64, ge=1)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any) -> Any:
        """NumPy's numbers as Python's, which strict fields expect."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return value
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    @property
    def decoding(self) -> dict[str, Any]:
        """The settings that are arguments of `mmvit.sampling.decoding.decode`."""
        return self.model_dump(include={"temperature", "top_k", "top_p", "num_steps"})

    def replace(self, settings: Mapping[str, Any]) -> Self:
        """These settings with some replaced. Raises UserError for an unknown name or a bad value."""
        return build_config(type(self), {**self.model_dump(), **settings}, source="sampling settings")

    def save(self, folder: Path) -> None:
        """Writes the defaults of the generator in `folder`."""
        write_json(self.model_dump(include={*SAVED_FIELDS}), folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote; the class's defaults when there is no file. Raises UserError for anything
        else."""
        if not (path := folder / FILE).is_file():
            return cls()
        found = read_json(path)
        if not isinstance(found, dict):
            fields = ", ".join(SAVED_FIELDS)
            raise UserError(f"{path}: expected {{{fields}}} with numbers, got {json.dumps(found)[:40]}")
        if unknown := [name for name in found if name not in SAVED_FIELDS]:
            advice = did_you_mean(unknown[0], SAVED_FIELDS)
            raise UserError(f"{path}: unknown sampling setting {unknown[0]}{advice}")
        return build_config(cls, found, source=str(path))


def check_counts(**counts: int) -> None:
    """Raises UserError for a count that is not a whole number from 1 on."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{name}: expected a whole number of at least 1, got {count!r}")


# options of commands that draw; None leaves a setting as the model's folder has it
GuidanceScaleOption = Annotated[
    float | None, Option(help="above 1, follow the caption more closely (default: the model's, else 1)")
]
TemperatureOption = Annotated[
    float | None, Option(help="0 always takes the likeliest code (default: the model's, else 1)")
]
TopKOption = Annotated[
    int | None, Option(help="draw among the k likeliest codes, 0 for all (default: the model's, else all)")
]
TopPOption = Annotated[
    float | None,
    Option(help="draw among the likeliest codes of this total probability (default: the model's, else 1)"),
]
NumStepsOption = Annotated[
    int | None,
    Option(
        min=1,
        help="forwards per image of a generator that draws in any order (default: the model's, else √codes)",
    ),
]
ScorerOption = Annotated[
    str | None, Option(help="a CLIP to choose candidates: a folder, a run or a Hub repository")
]


class DrawingOptions(NamedTuple):
    """The options that `mmvit sample` and `mmvit edit` share."""

    model: Annotated[
        str, Option(help="a generator: its folder, a run or a Hub repository", show_default="the shipped one")
    ] = str(SHIPPED)
    seed: Annotated[int, Option(help="image j of a caption is drawn with seed + j")] = 0
    guidance_scale: GuidanceScaleOption = None
    temperature: TemperatureOption = None
    top_k: TopKOption = None
    top_p: TopPOption = None
    num_steps: NumStepsOption = None
    negative: Annotated[str, Option(help="a caption to lead away from, with --guidance-scale above 1")] = ""
    candidates: Annotated[
        int,
        Option(min=1, help="draw this many per image and keep the best, by the model itself or by --scorer"),
    ] = 1
    scorer: ScorerOption = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Those of `SamplingSettings` that are set."""
        return explicit_options(**{name: getattr(self, name) for name in SAVED_FIELDS})


def explicit_options(**options: Any) -> dict[str, Any]:
    """The options that a command line sets."""
    return {name: value for name, value in options.items() if value is not None}
