"""Pre-trains a classifier on shards of pictures without classes: by masked patch prediction as in the ViT
paper (`method = "masked_patches"`), by BYOL (`method = "byol"`) or by MAE (`method = "mae"`).

    python pipelines/pretrain_classifier.py configs/fashion_mnist_masked.toml
    python pipelines/train_classifier.py configs/fashion_mnist_vit.toml \\
        --start.model runs/fashion-mnist-masked

The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and the
exported classifiers best/ (by held-out loss) and last/, from which train_classifier.py starts. Ctrl-C saves
first; --resume continues exactly there.
"""

from typing import Any, Literal

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import PixelsSample
from mmvit.data.shards import ShardPatterns
from mmvit.data.views import Views, ViewsConfig
from mmvit.errors import UserError, run_script
from mmvit.evaluation.likelihood import mean_loss
from mmvit.models.byol import BYOL, BYOLConfig
from mmvit.models.classification import FitBatch
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig
from mmvit.models.masked_patches import MaskedPatches, MaskedPatchesConfig
from mmvit.training import Recipe, one_epoch, open_session, train, training_stream
from mmvit.training.deepspeed_engine import zero_stage


class DataConfig(Config):
    """Shards with `png|jpg|webp`, and what is done to the training pictures."""

    train: ShardPatterns
    held_out: ShardPatterns
    shuffle_buffer: int = Field(10_000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class PretrainingRecipe(Recipe):
    """CONFIG.toml of this script."""

    data: DataConfig
    model: ClassifierConfig
    method: Literal["masked_patches", "byol", "mae"]
    masked_patches: MaskedPatchesConfig = MaskedPatchesConfig()
    byol: BYOLConfig = BYOLConfig()
    mae: MaskedAutoencoderConfig = MaskedAutoencoderConfig()
    views: ViewsConfig = ViewsConfig()


def build_objective(recipe: PretrainingRecipe) -> nn.Module:
    classifier = Classifier(recipe.model)
    if recipe.method == "byol":
        return BYOL(classifier, recipe.byol, recipe.train.steps, recipe.train.accumulation)
    if recipe.method == "mae":
        return MaskedAutoencoder(classifier, recipe.mae)
    return MaskedPatches(classifier, recipe.masked_patches)


def main() -> None:
    with open_session(PretrainingRecipe, __doc__) as session:
        recipe, data = session.recipe, session.recipe.data
        if recipe.method == "byol" and zero_stage(session.deepspeed) == 3:
            raise UserError("stage 3 of ZeRO cuts up weights that BYOL's target follows: use 0, 1 or 2")
        if recipe.optimizer.layer_decay < 1:
            raise UserError(
                "optimizer.layer_decay is for fine-tuning, which has trained layers: leave it out"
            )
        size = recipe.model.height_width
        stream = training_stream(session, data.train, PixelsSample(size, data.augment), data.shuffle_buffer)
        held_out = one_epoch(session, data.held_out, PixelsSample(size))

        objective = build_objective(recipe)
        as_read = FitBatch(recipe.model)
        views = Views(recipe.views, size) if recipe.method == "byol" else None

        def prepare(batch: dict[str, Any]) -> dict[str, Any]:
            return as_read(batch if views is None else views(batch))

        def evaluate(objective: nn.Module) -> dict[str, float]:
            return mean_loss(objective, map(prepare, held_out), count="pixels")

        train(
            session,
            objective,
            stream,
            evaluate,
            prepare=prepare,
            export=lambda objective, folder: objective.classifier.save_pretrained(folder),
        )


if __name__ == "__main__":
    run_script(main)
