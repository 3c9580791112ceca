"""What the tests of training share: a small classifier, its recipe, and a run on shards."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.data.samples import ClassifierSample
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.streams.stream import ShardStream
from mmvit.streams.tally import Tally
from mmvit.training import OptimizerConfig, Processes, Recipe, RunFolder, Session, TrainConfig, train

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
MODEL = ClassifierConfig(
    image_size=16,
    patch_size=8,
    num_classes=4,
    core=TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.2),
)
SETTINGS = {
    "steps": 12,
    "batch_size": 8,
    "log_every": 5,
    "evaluate_every": 4,
    "checkpoint_every": 100,
    "ema_decay": 0.9,
    "precision": "fp32",
    "num_workers": 1,
    "select": "accuracy",
}


class ClassifierRecipe(Recipe):
    task: str = "classifier"
    model: ClassifierConfig = MODEL


def new_session(output: Path, resume: bool = False, model: ClassifierConfig = MODEL, **settings) -> Session:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2)
    recipe = ClassifierRecipe(
        output=output, model=model, train=TrainConfig(**SETTINGS | settings), optimizer=optimizer
    )
    run = RunFolder(output)
    run.open(resume)
    torch.manual_seed(recipe.train.seed)
    return Session(recipe, ALONE, run, resume)


def train_on_shards(
    session: Session,
    shards: Path,
    at_batch: Callable[[int, dict], None] = lambda n, batch: None,
    model: nn.Module | None = None,
) -> None:
    """Trains `model`, or a new one, on real shards; `at_batch(number, batch)` may meddle with every batch."""
    decode = ClassifierSample((16, 16), 4)
    train_config = session.recipe.train

    class Meddled(ShardStream):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), start=1):
                at_batch(number, batch)
                yield batch

    stream = Meddled(
        f"{shards}/train-*.tar",
        decode,
        session.micro_batch_size,
        num_workers=train_config.num_workers,
        shuffle_buffer=20,
    )
    held_out = ShardStream(f"{shards}/held-out-*.tar", decode, 8, repeat=False, shuffle_buffer=0)

    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)  # what an evaluation draws must not show in training
        return classification_metrics(model, held_out)

    model = model or Classifier(session.recipe.model)
    train(session, model, stream, evaluate)


def terminate_at(batch_number: int, number: int = signal.SIGTERM) -> Callable[[int, dict], None]:
    return lambda n, batch: os.kill(os.getpid(), number) if n == batch_number else None


def comparable_metrics(run: RunFolder) -> list[dict]:
    timing = ("seconds", "images_per_s")
    return [
        {key: value for key, value in record.items() if key not in timing} for record in run.read_metrics()
    ]


class Repeat:
    """One batch without end; `open` until its iterator is closed."""

    tally, open = Tally(), False

    def __iter__(self):
        self.open = True
        try:
            while True:
                yield {"pixels": torch.zeros(8, 3, 16, 16), "labels": torch.arange(8) % 4}
        finally:
            self.open = False

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
