"""Recipes with `task = "clip"`: which image belongs to which caption."""

from typing import Any, ClassVar, Literal

from mmvit.data.augment import AugmentConfig
from mmvit.models.clip import CLIPConfig
from mmvit.recipes.data import CaptionsConfig
from mmvit.recipes.facts import Fact, vocabulary
from mmvit.training.config import Recipe


class CLIPData(CaptionsConfig):
    """Shards with `png|jpg|webp` and captions."""

    augment: AugmentConfig = AugmentConfig()


class CLIPRecipe(Recipe):
    """A CLIP (2103.00020)."""

    task: Literal["clip"] = "clip"
    data: CLIPData
    model: CLIPConfig = CLIPConfig()

    selects: ClassVar[str] = "caption_at_1"

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Fact]:
        return vocabulary(cls, values, "data", "model")
