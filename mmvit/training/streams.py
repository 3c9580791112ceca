"""The data of a training script: an endless shuffled stream, and one epoch of what it is evaluated on."""

from mmvit.data.reader import Decode
from mmvit.data.stream import ShardStream
from mmvit.training.session import Session


def training_stream(session: Session, shards: list[str], decode: Decode, shuffle_buffer: int) -> ShardStream:
    """This process's share of `shards`, shuffled, again and again, in batches for one pass."""
    return ShardStream(
        shards,
        decode,
        session.micro_batch_size,
        seed=session.recipe.train.seed,
        rank=session.processes.rank,
        world_size=session.processes.world_size,
        num_workers=session.recipe.train.num_workers,
        shuffle_buffer=shuffle_buffer,
    )


def one_epoch(
    session: Session, shards: list[str], decode: Decode, whole: bool = False, num_workers: int = 0
) -> ShardStream:
    """This process's share of `shards` once, in order; all of it in every process where `whole`. The session
    remembers it, to tell at the end what was skipped."""
    stream = ShardStream(
        shards,
        decode,
        session.micro_batch_size,
        rank=0 if whole else session.processes.rank,
        world_size=1 if whole else session.processes.world_size,
        num_workers=num_workers,
        shuffle_buffer=0,
        repeat=False,
    )
    session.evaluated.append(stream)
    return stream
