"""Recipes with `task = "generator"`: captions to image codes, on shards made by `mmvit encode`."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmvit.config import build_config
from mmvit.errors import UserError
from mmvit.hub import find_model_folder
from mmvit.models.fine_tuning import check_continued
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.recipes.data import CaptionCodesConfig
from mmvit.recipes.facts import Fact, codes_in, vocabulary
from mmvit.recipes.start import StartConfig
from mmvit.sampling.preview import PreviewConfig, check_preview
from mmvit.training.config import Recipe


class GeneratorStart(StartConfig):
    """Without trained weights, codes start from the image tokenizer's codebook and the rest at random."""

    codebook: bool = Field(
        True, description="whether the embeddings and logits of codes start from the tokenizer's codebook"
    )
    translate_from: str | None = Field(
        None,
        description="the language that start.model reads: tokens its captions never use start as mixtures "
        "of the tokens that mean the same in that language",
    )

    @model_validator(mode="after")
    def _translations_need_a_model(self) -> Self:
        if self.translate_from and not self.model:
            raise ValueError("start.translate_from needs a model that reads this language: set start.model")
        return self

    def other(self, tokenizer: str) -> UserError:
        """What to raise where the data have another tokenizer than the model."""
        return UserError(
            f"{self.model} was trained with another {tokenizer}: set data.{tokenizer} to "
            f"{find_model_folder(self.model) / tokenizer}, or leave it out"
        )


class GeneratorRecipe(Recipe):
    """A caption-to-image generator."""

    task: Literal["generator"] = "generator"
    data: CaptionCodesConfig
    model: GeneratorConfig = GeneratorConfig()
    start: GeneratorStart = GeneratorStart()
    preview: PreviewConfig = PreviewConfig()

    selects: ClassVar[str] = "image_loss"
    starts_from: ClassVar[str] = GeneratorTransformer.kind

    @model_validator(mode="after")
    def _previews_can_be_drawn(self) -> Self:
        check_preview(self.preview, self.model)
        return self

    @classmethod
    def facts(cls, values: dict[str, Any]) -> list[Fact]:
        return [*vocabulary(cls, values, "data", "model"), *codes_in(values, "data", "model")]

    def check_start(self, begun: dict[str, Any]) -> None:
        before = build_config(GeneratorConfig, begun, source=str(self.start.model))
        if before.vocab_size != self.model.vocab_size:
            raise self.start.other("text_tokenizer")
        if before.codebook_size != self.model.codebook_size:
            raise self.start.other("image_tokenizer")
        check_continued(before, self.model)
