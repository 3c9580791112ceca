"""What can be trained: the recipe class and the script of every `task`."""

import importlib
from typing import NamedTuple

from mmvit.errors import UserError, did_you_mean
from mmvit.training.config import Recipe


class Task(NamedTuple):
    recipe: str  # module:class
    script: str


TASKS = {
    "classifier": Task("classifier:ClassifierRecipe", "pipelines/train_classifier.py"),
    "generator": Task("generator:GeneratorRecipe", "pipelines/train_caption_to_image.py"),
    "joint": Task("joint:JointRecipe", "pipelines/train_joint.py"),
    "clip": Task("clip:CLIPRecipe", "pipelines/train_clip.py"),
    "image-tokenizer": Task("image_tokenizer:ImageTokenizerRecipe", "tokenizers/train_image_tokenizer.py"),
    "pretraining": Task("pretraining:PretrainingRecipe", "pipelines/pretrain_classifier.py"),
}


def recipe_class(task: object, source: str) -> type[Recipe]:
    """The recipe class of `task`, as the recipe `source` names it. Raises UserError for an unknown task."""
    if task is None:
        raise UserError(
            f'{source} does not say what it trains: put task = "..." on its first line, with one of '
            f"{', '.join(TASKS)}"
        )
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{source}: unknown task {task!r}{did_you_mean(str(task), TASKS)}")
    module, _, name = TASKS[task].recipe.partition(":")
    return getattr(importlib.import_module(f"mmvit.recipes.{module}"), name)
