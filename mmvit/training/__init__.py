"""Training: one loop for every model with `loss(batch)`, on plain torch or DeepSpeed, in one process or many.

A training script is a recipe and a call:

    class MyRecipe(Recipe):                # output, [train] and [optimizer] come with it
        data: MyData
        model: MyModelConfig

    def main() -> None:
        with open_session(MyRecipe, __doc__) as session:      # command line, processes, seeds, run folder
            recipe, processes = session.recipe, session.processes      # rank, world_size, device
            stream = training_stream(session, shards, decode, shuffle_buffer)  # this process's batches
            train(session, MyModel(recipe.model), stream, evaluate, select="loss")

    if __name__ == "__main__":
        run_script(main)                   # mmvit.errors
"""

from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import Processes
from mmvit.training.loop import train
from mmvit.training.resume import Progress, Stream
from mmvit.training.run import RunFolder
from mmvit.training.session import Recipe, Session, open_session
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
