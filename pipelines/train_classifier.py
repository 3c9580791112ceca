"""Train a classifier on shards of images with classes: a ViT, or a ResNet (`model.kind = "resnet"`).

    mmvit train fashion_mnist
    mmvit train fashion_mnist --train.steps 100 --output runs/short
    mmvit train fashion_mnist --resume
    mmvit train fashion_mnist_vit --start.model runs/fashion-mnist-masked
    torchrun --nproc_per_node 2 -m mmvit train fashion_mnist

With `start.model`, training starts from trained weights (a run folder, or what `mmvit convert` wrote).
`[model]` then needs only what differs, positions are resized to its grid, and the head is new.
`start.freeze` freezes parts; `optimizer.layer_decay` slows down the lower layers.

The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and the
exported models best/ and last/. Ctrl-C saves before it stops; --resume continues exactly there.
"""

from pathlib import Path
from typing import Any

from torch import nn

from mmvit.cli import run_script
from mmvit.data.mixing import Mixing
from mmvit.data.samples import ClassifierSample
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.models.classification import FitBatch
from mmvit.models.classifier import Classifier
from mmvit.models.fine_tuning import describe_changes, fine_tuned, freeze, take_core
from mmvit.models.registry import build_model
from mmvit.recipes.classifier import ClassifierRecipe
from mmvit.recipes.command import training_script
from mmvit.recipes.facts import class_names, describe_sizes, folders_of
from mmvit.training import Session, one_epoch, train, training_stream


def train_session(session: Session[ClassifierRecipe]) -> None:
    recipe, data, config = session.recipe, session.recipe.data, session.recipe.model
    folders = folders_of(data.train, data.held_out)
    session.say(describe_sizes(folders, config.height_width))
    decode = ClassifierSample(config.height_width, config.num_classes, data.augment)
    stream = training_stream(session, data.train, decode, data.shuffle_buffer)
    decode = ClassifierSample(config.height_width, config.num_classes)
    held_out = one_epoch(session, data.held_out, decode, num_workers=recipe.train.num_workers)
    as_read = FitBatch(config)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return classification_metrics(model, map(as_read, held_out))

    model = starting_model(session)
    freeze(model, recipe.start.freeze)
    mix = Mixing(data.mixing, config.num_classes, config.channels)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return mix(as_read(batch)) if data.mixing.does_anything else as_read(batch)

    def export(trained: nn.Module, folder: Path) -> None:
        ImageClassifier(trained, class_names(folders)).save_pretrained(folder)

    train(session, model, stream, evaluate, prepare=prepare, export=export)


def starting_model(session: Session[ClassifierRecipe]) -> nn.Module:
    """The model before its first step; a resumed run gets its weights from the checkpoint."""
    recipe = session.recipe
    start, model = recipe.start, build_model(recipe.model)
    if session.continues:
        return model
    if start.model:
        source = Classifier.from_pretrained(start.model)
        model = fine_tuned(source, recipe.model, start.resize)
        session.say(f"starting from {start.model}: {describe_changes(source.config, recipe.model)}")
    elif start.core:
        take_core(model, start.core)
    return model


main = training_script(train_session, "classifier")

if __name__ == "__main__":
    run_script(main)
