"""Trains a generator: captions in, image codes out, on shards made by pipelines/encode_images.py.

    python pipelines/train_caption_to_image.py configs/emoji_demo.toml
    python pipelines/train_caption_to_image.py configs/emoji_demo.toml --train.steps 100 --output runs/short
    torchrun --nproc_per_node 2 pipelines/train_caption_to_image.py configs/emoji_demo.toml
    deepspeed pipelines/train_caption_to_image.py configs/emoji_demo.toml \\
        --deepspeed configs/deepspeed/zero2.json --optimizer.name adamw

The same command with --resume continues. The run folder then holds the model with both tokenizers (best/,
last/), ready for pipelines/sample_images.py, and a grid of samples at every evaluation (samples/).
"""

from pathlib import Path

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.errors import run_script
from mmvit.evaluation.likelihood import mean_loss
from mmvit.models.fine_tuning import take_core
from mmvit.models.generator import GeneratorConfig, GeneratorTransformer
from mmvit.sampling.generator import Generator
from mmvit.sampling.preview import PreviewConfig, check_preview, draw_preview
from mmvit.training import Recipe, open_session, train
from mmvit.training.caption_codes import CaptionCodesConfig, open_caption_codes


class StartConfig(Config):
    """What training begins from: codes from the image tokenizer's codebook, all else at random."""

    core: str | None = Field(
        None, description="a run folder, model or Hub repository whose core is taken, as a classifier's"
    )
    codebook: bool = Field(
        True, description="whether codes begin with vectors and logits of what they look like"
    )


class GeneratorRecipe(Recipe):
    """CONFIG.toml of this script."""

    data: CaptionCodesConfig
    model: GeneratorConfig = GeneratorConfig()
    start: StartConfig = StartConfig()
    samples: PreviewConfig = PreviewConfig()


def main() -> None:
    with open_session(GeneratorRecipe, __doc__) as session:
        recipe = session.recipe
        check_preview(recipe.samples, recipe.model)
        data = open_caption_codes(session, recipe.data, recipe.model)
        model = GeneratorTransformer(data.config)
        if recipe.start.codebook:
            model.start_from_codebook(data.image_tokenizer.code_vectors())
        if recipe.start.core:
            take_core(model, recipe.start.core)

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
            evaluate=lambda model: mean_loss(model, data.held_out, count="codes"),
            select="image_loss",
            after_evaluation=draw,
            export=export,
        )


if __name__ == "__main__":
    run_script(main)
