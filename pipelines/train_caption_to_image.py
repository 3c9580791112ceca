"""Trains a generator: captions in, image codes out, on shards made by pipelines/encode_images.py.

    python pipelines/train_caption_to_image.py configs/emoji_demo.toml
    python pipelines/train_caption_to_image.py configs/emoji_demo.toml --train.steps 100 --output runs/short
    torchrun --nproc_per_node 2 pipelines/train_caption_to_image.py configs/emoji_demo.toml
    deepspeed pipelines/train_caption_to_image.py configs/emoji_demo.toml \\
        --deepspeed configs/deepspeed/zero2.json --optimizer.name adamw
    python pipelines/train_caption_to_image.py configs/emoji.toml --start.model generators/emoji

With `start.model` a trained generator is trained on, on captions and codes of the tokenizers that it has;
`[model]` then needs only what differs, and its core is that of the start. With `start.translate_from = "en"`
it goes on from English to the languages of data.languages: captions of the same pictures tell which words say
the same. The same command with --resume continues. The run folder then holds the model with both tokenizers
(best/, last/), ready for pipelines/sample_images.py, and a grid of samples at every evaluation (samples/).
"""

from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from mmvit.data.translation import token_translations
from mmvit.errors import UserError, run_script
from mmvit.evaluation.likelihood import generator_loss
from mmvit.hub import find_model_folder
from mmvit.models.fine_tuning import continued, take_core
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.sections import StartConfig, with_preset, with_start
from mmvit.sampling.generator import Generator
from mmvit.sampling.preview import PreviewConfig, check_preview, draw_preview
from mmvit.training import Recipe, open_session, train
from mmvit.training.caption_codes import CaptionCodes, CaptionCodesConfig, open_caption_codes


class GeneratorStart(StartConfig):
    """Without a trained model, codes begin by the image tokenizer's codebook, all else at random."""

    codebook: bool = Field(
        True, description="whether codes begin with vectors and logits of what they look like"
    )
    translate_from: str | None = Field(
        None,
        description="the language that `model` reads: tokens that its captions do not have begin as mixtures "
        "of those that say the same in it",
    )

    @model_validator(mode="after")
    def _translations_are_of_a_model(self) -> Self:
        if self.translate_from and not self.model:
            raise ValueError("start.translate_from is for a model that reads this language: set start.model")
        return self


class GeneratorRecipe(Recipe):
    """CONFIG.toml of this script."""

    data: CaptionCodesConfig
    model: GeneratorConfig = GeneratorConfig()
    start: GeneratorStart = GeneratorStart()
    samples: PreviewConfig = PreviewConfig()

    @model_validator(mode="before")
    @classmethod
    def _the_rest_is_that_of_the_start(cls, values: Any) -> Any:
        return with_start(with_preset(values, cls), GeneratorTransformer.kind)


def begin(start: GeneratorStart, data: CaptionCodes) -> GeneratorTransformer:
    """The model before its first step. Raises UserError for a start that learnt other words or codes."""
    if start.model:
        source = Generator.from_pretrained(start.model, "cpu")
        for what, same in (
            ("text_tokenizer", source.text_tokenizer.is_same(data.text_tokenizer)),
            ("image_tokenizer", same_weights(source.image_tokenizer, data.image_tokenizer)),
        ):
            if not same:
                raise UserError(
                    f"{start.model} has learnt another {what} than data.{what}: set it to the one in its "
                    f"folder, {find_model_folder(start.model) / what}"
                )
        return continued(source.transformer, data.config)
    model = GeneratorTransformer(data.config)
    if start.codebook:
        model.start_from_codebook(data.image_tokenizer.code_vectors())
    if start.core:
        take_core(model, start.core)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights in bfloat16, as which they may have been kept."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].bfloat16(), theirs[name].cpu().bfloat16()) for name in ours
    )


def main() -> None:
    with open_session(GeneratorRecipe, __doc__) as session:
        recipe = session.recipe
        check_preview(recipe.samples, recipe.model)
        data = open_caption_codes(session, recipe.data, recipe.model)
        model = begin(recipe.start, data)
        if known := recipe.start.translate_from:
            words = token_translations(recipe.data.train, data.text_tokenizer, known, recipe.data.languages)
            begun = model.start_from_translations(*words)
            session.say(f"{begun:,} tokens that no caption in {known} has begin as mixtures of its tokens")

        def whole(model: nn.Module) -> Generator:
            return Generator(model, data.text_tokenizer, data.image_tokenizer, recipe.samples.settings)

        def draw(model: nn.Module, step: int) -> None:
            draw_preview(whole(model), recipe.samples, session.run.samples / f"step-{step:06d}.png")

        def export(model: nn.Module, folder: Path) -> Path:
            return whole(model).save_pretrained(folder)

        train(
            session,
            model,
            data.stream,
            evaluate=lambda model: generator_loss(model, data.held_out),
            select="image_loss",
            after_evaluation=draw,
            export=export,
        )


if __name__ == "__main__":
    run_script(main)
