"""Recipes with `task = "pretraining"`: a classifier's body on images without classes.

`method` is masked patch prediction as in the ViT paper, BYOL or MAE.
"""

from typing import Any, ClassVar, Literal

from pydantic import field_validator

from mmvit.data.views import ViewsConfig
from mmvit.models.byol import BYOLConfig
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.masked_autoencoder import MaskedAutoencoderConfig
from mmvit.models.masked_patches import MaskedPatchesConfig
from mmvit.recipes.data import ImagesConfig
from mmvit.recipes.facts import Fact, classes_in
from mmvit.training.config import Recipe


class PretrainingRecipe(Recipe):
    """A classifier to fine-tune later, with `start.model` in a recipe of task "classifier"."""

    task: Literal["pretraining"] = "pretraining"
    data: ImagesConfig
    model: ClassifierConfig
    method: Literal["masked_patches", "byol", "mae"]
    masked_patches: MaskedPatchesConfig = MaskedPatchesConfig()
    byol: BYOLConfig = BYOLConfig()
    mae: MaskedAutoencoderConfig = MaskedAutoencoderConfig()
    views: ViewsConfig = ViewsConfig()

    selects: ClassVar[str] = "loss"

    @field_validator("model")
    @classmethod
    def _no_head(cls, model: ClassifierConfig) -> ClassifierConfig:
        if model.representation_width:
            raise ValueError(
                "model.representation_width is a layer of a classifier's head, which pre-training leaves "
                "random: remove it"
            )
        return model

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Fact]:
        return classes_in(values, "data", "model", required=False)
