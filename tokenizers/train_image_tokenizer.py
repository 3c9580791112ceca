"""Trains a VQ image tokenizer on shards of pictures.

    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml
    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml --train.steps 500
    python tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml --resume
    torchrun --nproc_per_node 2 tokenizers/train_image_tokenizer.py configs/image_tokenizer_emoji.toml

Every evaluation reports the PSNR of held-out pictures, and the share of the codes that the training pictures
use. The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and
the exported models best/ (by held-out PSNR) and last/, which pipelines/encode_images.py takes.
"""

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import PixelsSample
from mmvit.data.stream import ShardStream
from mmvit.errors import run_script
from mmvit.evaluation.reconstruction import codebook_metrics, reconstruction_metrics
from mmvit.models.vq import VQConfig, VQModel
from mmvit.training import Recipe, Session, open_session, train


class DataConfig(Config):
    """Shards with `png|jpg|webp`, the size that their pictures get, and what is done to the training ones."""

    train: str
    held_out: list[str]
    image_size: tuple[int, int] = Field((64, 64), description="height and width in pixels")
    shuffle_buffer: int = Field(4000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class ImageTokenizerRecipe(Recipe):
    data: DataConfig
    model: VQConfig = VQConfig()


def main() -> None:
    with open_session(ImageTokenizerRecipe, __doc__) as session:
        data = session.recipe.data
        model = VQModel(session.recipe.model)
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
            return reconstruction_metrics(model, held_out) | codebook_metrics(model, training_once)

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
