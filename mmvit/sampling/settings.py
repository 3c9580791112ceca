"""How codes are drawn: the settings that every way of sampling shares, and what they may be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from mmvit.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of `Generator.generate`.

    Args:
        guidance_scale: above 1 follows the caption more closely (2207.12598); needs a model trained with
            caption dropout.
        temperature: below 1 is more cautious; 0 always takes the likeliest code.
        top_k: draw among the k likeliest codes alone.
        top_p: draw among the likeliest codes that together have this probability.
        seed: picture j of a caption is drawn with seed + j, so it can be drawn again alone.
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
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}; it is a number")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it is 0 (the likeliest code) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; at least 1 code must remain")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is above 0 and at most 1")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; at least 1 picture is drawn at a time")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Raises UserError for a name that there is not."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"there is no setting {unknown[0]!r} for sampling; there are {', '.join(known)}")
        return cls(**settings)
