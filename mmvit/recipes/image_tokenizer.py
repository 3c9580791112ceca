"""Recipes with `task = "image-tokenizer"`: VQ, or DALL·E's discrete VAE (`model.kind = "dvae"`)."""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmvit.models.dvae import DiscreteVAEConfig
from mmvit.models.tokenizer_objective import ObjectiveConfig
from mmvit.models.vq import VQConfig, VQModel
from mmvit.recipes.data import ImagesConfig
from mmvit.training.config import Recipe


class TokenizerData(ImagesConfig):
    """Shards with `png|jpg|webp`, and the size that their images are resized to."""

    image_size: tuple[int, int] = Field((64, 64), description="pixels: one number, or [height, width]")
    shuffle_buffer: int = Field(4000, ge=0, description="samples among which the order is mixed")

    @field_validator("image_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value


class ImageTokenizerRecipe(Recipe):
    """An image tokenizer; `model.kind` is "vq" by default."""

    task: Literal["image-tokenizer"] = "image-tokenizer"
    data: TokenizerData
    model: VQConfig | DiscreteVAEConfig = Field(VQConfig(), discriminator="kind")
    loss: ObjectiveConfig = ObjectiveConfig()

    selects: ClassVar[str] = "psnr"

    @model_validator(mode="after")
    def _losses_fit_the_model(self) -> Self:
        if self.model.kind != VQModel.kind and self.loss != ObjectiveConfig():
            changed = ", ".join(f"loss.{key}" for key in self.loss.model_dump(exclude_defaults=True))
            raise ValueError(
                f"{changed} cannot be used with model.kind {self.model.kind!r}, whose loss is a likelihood: "
                f"remove [loss], or set model.kind to {VQModel.kind!r}"
            )
        passes = self.train.steps * self.train.accumulation
        if self.loss.adversarial_weight and self.loss.adversarial_start >= passes:
            raise ValueError(
                f"loss.adversarial_start {self.loss.adversarial_start} is beyond the {passes} training "
                "passes, so the discriminator would never have a say: lower it"
            )
        if self.loss.adversarial_adaptive and self.train.compile:
            raise ValueError(
                "loss.adversarial_adaptive reads gradients in the middle of a pass, which train.compile "
                "does not support: turn one of them off"
            )
        return self
