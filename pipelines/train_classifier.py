"""Trains a ViT classifier on shards of pictures with classes.

    python pipelines/train_classifier.py configs/fashion_mnist.toml
    python pipelines/train_classifier.py configs/fashion_mnist.toml --train.steps 100 --output runs/short
    python pipelines/train_classifier.py configs/fashion_mnist.toml --resume
    torchrun --nproc_per_node 2 pipelines/train_classifier.py configs/fashion_mnist.toml
    deepspeed pipelines/train_classifier.py configs/fashion_mnist.toml \\
        --deepspeed configs/deepspeed/zero2.json --optimizer.name adamw

The run folder (`output` in the recipe) gets config.toml, metrics.jsonl, curves.png, checkpoints/, and the
exported models best/ (by held-out accuracy) and last/. Ctrl-C saves first; --resume continues exactly there.
"""

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.samples import ClassifierSample
from mmvit.data.shards import ShardPatterns
from mmvit.data.stream import ShardStream
from mmvit.errors import run_script
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.training import Recipe, open_session, train


class DataConfig(Config):
    """Shards with `png|jpg|webp` and `cls`, and what is done to the training pictures."""

    train: ShardPatterns
    held_out: ShardPatterns
    shuffle_buffer: int = Field(10_000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class ClassifierRecipe(Recipe):
    data: DataConfig
    model: ClassifierConfig


def main() -> None:
    with open_session(ClassifierRecipe, __doc__) as session:
        recipe, processes = session.recipe, session.processes
        data, config = recipe.data, recipe.model
        place = {"rank": processes.rank, "world_size": processes.world_size}
        stream = ShardStream(
            data.train,
            ClassifierSample(config.height_width, config.num_classes, data.augment),
            session.micro_batch_size,
            seed=recipe.train.seed,
            num_workers=recipe.train.num_workers,
            shuffle_buffer=data.shuffle_buffer,
            **place,
        )
        held_out = ShardStream(
            data.held_out,
            ClassifierSample(config.height_width, config.num_classes),
            session.micro_batch_size,
            num_workers=recipe.train.num_workers,
            shuffle_buffer=0,
            repeat=False,
            **place,
        )

        def evaluate(model: nn.Module) -> dict[str, float]:
            return classification_metrics(model, held_out)

        train(session, Classifier(config), stream, evaluate, select="accuracy", mode="max")


if __name__ == "__main__":
    run_script(main)
