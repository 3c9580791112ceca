"""Recipes with `task = "classifier"`: a ViT, or a ResNet (`model.kind = "resnet"`)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from mmvit.config import build_config
from mmvit.data.mixing import MixingConfig
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.fine_tuning import ResizeMode, check_fine_tuned
from mmvit.models.resnet import ResNetConfig
from mmvit.recipes.data import ImagesConfig
from mmvit.recipes.facts import Fact, classes_in
from mmvit.recipes.start import StartConfig
from mmvit.training.config import Recipe


class ClassifierData(ImagesConfig):
    """Shards with `png|jpg|webp` and `cls`."""

    mixing: MixingConfig = MixingConfig()


class ClassifierStart(StartConfig):
    """How trained weights are loaded."""

    resize: ResizeMode = Field("official", description="whose way of resizing learnt positions")
    freeze: list[str] = Field([], description="parts to freeze, such as stem or core.blocks.0")


class ClassifierRecipe(Recipe):
    """A classifier; `model.kind` is "vit" by default."""

    task: Literal["classifier"] = "classifier"
    data: ClassifierData
    model: ClassifierConfig | ResNetConfig = Field(discriminator="kind")
    start: ClassifierStart = ClassifierStart()

    selects: ClassVar[str] = "accuracy"
    starts_from: ClassVar[str] = Classifier.kind

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Fact]:
        return classes_in(values, "data", "model")

    def check_start(self, begun: dict[str, Any]) -> None:
        check_fine_tuned(build_config(ClassifierConfig, begun, source=str(self.start.model)), self.model)
