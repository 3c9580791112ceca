"""Trains an image tokenizer on shards of pictures: VQ, or DALL·E's discrete VAE (`model.kind = "dvae"`).

    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml
    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml --train.steps 500
    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml --resume
    torchrun --nproc_per_node 2 tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml

Every evaluation reports the PSNR of held-out pictures, and the share of the codes that the training pictures
use. The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and
the exported models best/ (by held-out PSNR) and last/, which pipelines/encode_images.py takes.
"""

import warnings
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import PixelsSample
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError, run_script
from mmvit.evaluation.reconstruction import codebook_metrics, reconstruction_metrics
from mmvit.models.dvae import DiscreteVAEConfig
from mmvit.models.presets import MODELS
from mmvit.models.vq import VQConfig, VQModel
from mmvit.training import Recipe, Session, open_session, train

COLLAPSED = 0.5  # share of the codes in use below which an evaluation warns


class DataConfig(Config):
    """Shards with `png|jpg|webp`, the size that their pictures get, and what is done to the training ones."""

    train: str
    held_out: list[str]
    image_size: tuple[int, int] = Field((64, 64), description="height and width in pixels")
    shuffle_buffer: int = Field(4000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class ImageTokenizerRecipe(Recipe):
    """CONFIG.toml of this script. `model.kind` is "vq" where nothing is said."""

    data: DataConfig
    model: VQConfig | DiscreteVAEConfig = Field(VQConfig(), discriminator="kind")

    @model_validator(mode="before")
    @classmethod
    def _vq_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(model := values.get("model"), dict):
            return {**values, "model": {"kind": VQModel.kind, **model}}
        return values


def main() -> None:
    with open_session(ImageTokenizerRecipe, __doc__) as session:
        data = session.recipe.data
        if session.deepspeed and getattr(session.recipe.model, "codebook_update", "") == "gradient":
            raise UserError(
                "model.codebook_update = 'gradient' revives dead codes in place, which DeepSpeed's copies "
                "undo; use 'ema', or leave --deepspeed out"
            )
        model = MODELS[type(session.recipe.model)](session.recipe.model)
        model.grid(*data.image_size)
        training_once, held_out = one_epoch(session, data.train), one_epoch(session, data.held_out)
        stream = ShardStream(
            data.train,
            PixelsSample(data.image_size, data.augment),
            session.micro_batch_size,
            seed=session.recipe.train.seed,
            rank=session.processes.rank,
            world_size=session.processes.world_size,
            num_workers=session.recipe.train.num_workers,
            shuffle_buffer=data.shuffle_buffer,
        )

        def evaluate(model: nn.Module) -> dict[str, float]:
            metrics = reconstruction_metrics(model, held_out) | codebook_metrics(model, training_once)
            if metrics["codes_in_use"] < COLLAPSED and session.processes.is_main:
                warnings.warn(
                    f"only {metrics['codes_in_use']:.0%} of the codes are in use over the training pictures. "
                    "If that does not rise, the codebook is collapsing: begin again with a lower "
                    "optimizer.lr or fewer codes",
                    stacklevel=2,
                )
            return metrics

        train(session, model, stream, evaluate, select="psnr", mode="max")


def one_epoch(session: Session[ImageTokenizerRecipe], shards: str | list[str]) -> ShardStream:
    """Every picture of `shards` once, as it is."""
    return ShardStream(
        shards,
        PixelsSample(session.recipe.data.image_size),
        session.micro_batch_size,
        rank=session.processes.rank,
        world_size=session.processes.world_size,
        shuffle_buffer=0,
        repeat=False,
    )


if __name__ == "__main__":
    run_script(main)
