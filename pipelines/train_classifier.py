"""Trains a classifier on shards of pictures with classes: a ViT, or a ResNet (`model.kind = "resnet"`).

    python pipelines/train_classifier.py configs/fashion_mnist.toml
    python pipelines/train_classifier.py configs/fashion_mnist.toml --train.steps 100 --output runs/short
    python pipelines/train_classifier.py configs/fashion_mnist.toml --resume
    torchrun --nproc_per_node 2 pipelines/train_classifier.py configs/fashion_mnist.toml
    deepspeed pipelines/train_classifier.py configs/fashion_mnist.toml \\
        --deepspeed configs/deepspeed/zero2.json --optimizer.name adamw

    python pipelines/train_classifier.py configs/fashion_mnist_vit.toml \\
        --start.model runs/fashion-mnist-masked

With `start.model` a run begins from trained weights (a run folder, or what pipelines/convert_weights.py has
written): `[model]` needs only what differs, positions are resized to its grid, and the head is a new one of
zeros. `start.freeze` takes parts out of training, `optimizer.layer_decay` slows the lower layers down.

The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and the
exported models best/ (by held-out accuracy) and last/. Ctrl-C saves first; --resume continues exactly there.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.mixing import Mixing, MixingConfig
from mmvit.data.samples import ClassifierSample, check_classes
from mmvit.data.shards import ShardPatterns
from mmvit.errors import run_script
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.models.classification import FitBatch
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.fine_tuning import ResizeMode, fine_tuned, freeze, take_core, what_changes
from mmvit.models.registry import build_model
from mmvit.models.resnet import ResNetConfig
from mmvit.models.sections import StartConfig, with_preset, with_start
from mmvit.training import Recipe, one_epoch, open_session, train, training_stream


class DataConfig(Config):
    """Shards with `png|jpg|webp` and `cls`, and what is done to the training pictures."""

    train: ShardPatterns
    held_out: ShardPatterns
    shuffle_buffer: int = Field(10_000, ge=0)
    augment: AugmentConfig = AugmentConfig()
    mixing: MixingConfig = MixingConfig()


class ClassifierStart(StartConfig):
    """How trained weights are taken over."""

    resize: ResizeMode = Field("official", description="whose way of resizing learnt positions")
    freeze: list[str] = Field([], description="parts that stay as they are, as stem or core.blocks.0")


class ClassifierRecipe(Recipe):
    """CONFIG.toml of this script. `model.kind` is "vit" where nothing is said."""

    data: DataConfig
    model: ClassifierConfig | ResNetConfig = Field(discriminator="kind")
    start: ClassifierStart = ClassifierStart()

    @model_validator(mode="before")
    @classmethod
    def _the_rest_is_that_of_the_start(cls, values: Any) -> Any:
        values = with_start(with_preset(values, cls), Classifier.kind, representation_width=None)
        own = values.get("model") if isinstance(values, dict) else None
        if not isinstance(own, dict) or not own:
            return values
        return {**values, "model": {"kind": "vit", **own}}


def main() -> None:
    with open_session(ClassifierRecipe, __doc__) as session:
        recipe, data, config = session.recipe, session.recipe.data, session.recipe.model
        classes = check_classes([*data.train, *data.held_out], config.num_classes)
        decode = ClassifierSample(config.height_width, config.num_classes, data.augment)
        stream = training_stream(session, data.train, decode, data.shuffle_buffer)
        decode = ClassifierSample(config.height_width, config.num_classes)
        held_out = one_epoch(session, data.held_out, decode, num_workers=recipe.train.num_workers)
        as_read = FitBatch(config)

        def evaluate(model: nn.Module) -> dict[str, float]:
            return classification_metrics(model, map(as_read, held_out))

        model = build_model(config)
        if recipe.start.model:
            source = Classifier.from_pretrained(recipe.start.model)
            model = fine_tuned(source, config, recipe.start.resize)
            if not session.resume:
                changes = what_changes(source.config, config)
                session.say(f"begins with the weights of {recipe.start.model}, {changes}")
        elif recipe.start.core:
            take_core(model, recipe.start.core)
        freeze(model, recipe.start.freeze)
        mix = Mixing(data.mixing, config.num_classes, config.channels)

        def prepare(batch: dict[str, Any]) -> dict[str, Any]:
            return mix(as_read(batch)) if data.mixing.does_anything else as_read(batch)

        def export(trained: nn.Module, folder: Path) -> None:
            ImageClassifier(trained, classes).save_pretrained(folder)

        train(session, model, stream, evaluate, select="accuracy", mode="max", prepare=prepare, export=export)


if __name__ == "__main__":
    run_script(main)
