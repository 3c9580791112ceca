"""Training: one loop for every model with `loss(batch)`, on plain torch or DeepSpeed, in one process or many.

A training script is a function of a session, which holds the resolved recipe, this process's rank and device,
and the run folder:

    def train_my_model(session: Session[MyRecipe]) -> None:
        recipe = session.recipe
        stream = training_stream(session, recipe.data.train, decode, recipe.data.shuffle_buffer)
        train(session, MyModel(recipe.model), stream, evaluate)

mmvit/recipes has the recipes, and `training_script` that makes the command line of such a function.
"""

from mmvit.training.config import OptimizerConfig, Recipe, TrainConfig
from mmvit.training.distributed import Processes
from mmvit.training.loop import train
from mmvit.training.resume import Progress, Stream
from mmvit.training.run import RunFolder
from mmvit.training.session import Session, open_session
from mmvit.training.streams import one_epoch, training_stream

__all__ = [
    "OptimizerConfig",
    "Processes",
    "Progress",
    "Recipe",
    "RunFolder",
    "Session",
    "Stream",
    "TrainConfig",
    "one_epoch",
    "open_session",
    "train",
    "training_stream",
]
