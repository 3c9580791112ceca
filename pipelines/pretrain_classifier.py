"""Pre-train a classifier on shards of images without classes.

    mmvit train fashion_mnist_masked
    mmvit train fashion_mnist_vit --start.model runs/fashion-mnist-masked

`method` is "masked_patches" (masked patch prediction as in the ViT paper), "byol" or "mae". The run folder
(`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and the exported
classifiers best/ (by held-out loss) and last/, for `start.model`. Ctrl-C saves before it stops; --resume
continues.
"""

from typing import Any

from torch import nn

from mmvit.cli import run_script
from mmvit.data.samples import PixelsSample
from mmvit.data.views import Views
from mmvit.errors import UserError
from mmvit.evaluation.likelihood import mean_loss
from mmvit.models.byol import BYOL
from mmvit.models.classification import FitBatch
from mmvit.models.classifier import Classifier
from mmvit.models.masked_autoencoder import MaskedAutoencoder
from mmvit.models.masked_patches import MaskedPatches
from mmvit.recipes.command import training_script
from mmvit.recipes.pretraining import PretrainingRecipe
from mmvit.training import Session, one_epoch, train, training_stream
from mmvit.training.deepspeed_engine import zero_stage


def train_session(session: Session[PretrainingRecipe]) -> None:
    recipe, data = session.recipe, session.recipe.data
    if recipe.method == "byol" and zero_stage(session.deepspeed) == 3:
        raise UserError("BYOL's target follows whole weights, which ZeRO 3 shards: use stage 0, 1 or 2")
    if recipe.optimizer.layer_decay < 1:
        raise UserError("optimizer.layer_decay needs trained layers: use it for fine-tuning only")
    size = recipe.model.height_width
    stream = training_stream(session, data.train, PixelsSample(size, data.augment), data.shuffle_buffer)
    held_out = one_epoch(session, data.held_out, PixelsSample(size))
    as_read = FitBatch(recipe.model)
    views = Views(recipe.views, size) if recipe.method == "byol" else None

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return as_read(batch if views is None else views(batch))

    def evaluate(objective: nn.Module) -> dict[str, float]:
        return mean_loss(objective, map(prepare, held_out), count="pixels")

    train(
        session,
        build_objective(recipe),
        stream,
        evaluate,
        prepare=prepare,
        export=lambda objective, folder: objective.classifier.save_pretrained(folder),
    )


def build_objective(recipe: PretrainingRecipe) -> nn.Module:
    classifier = Classifier(recipe.model)
    if recipe.method == "byol":
        return BYOL(classifier, recipe.byol, recipe.train.steps, recipe.train.accumulation)
    if recipe.method == "mae":
        return MaskedAutoencoder(classifier, recipe.mae)
    return MaskedPatches(classifier, recipe.masked_patches)


main = training_script(train_session, "pretraining")

if __name__ == "__main__":
    run_script(main)
