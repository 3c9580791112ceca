"""Recipes with `task = "joint"`: one core for a classifier and a generator."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from mmvit.models.joint import JointConfig
from mmvit.recipes.data import CaptionCodesConfig, ImagesConfig
from mmvit.recipes.facts import Fact, classes_in, codes_in, vocabulary
from mmvit.sampling.preview import PreviewConfig, check_preview
from mmvit.training.config import Recipe


class JointRecipe(Recipe):
    """`classes` are shards with `png|jpg|webp` and `cls`, `captions` shards with captions and codes."""

    task: Literal["joint"] = "joint"
    classes: ImagesConfig
    captions: CaptionCodesConfig
    model: JointConfig
    preview: PreviewConfig = PreviewConfig()

    selects: ClassVar[str] = "loss"

    @model_validator(mode="after")
    def _previews_can_be_drawn(self) -> Self:
        check_preview(self.preview, self.model.generator)
        return self

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Fact]:
        return [
            *classes_in(values, "classes", "model.classifier"),
            *vocabulary(cls, values, "captions", "model.generator"),
            *codes_in(values, "captions", "model.generator"),
        ]
