"""The data of a training script: an endless shuffled stream, and single epochs of held-out samples."""

from mmvit.streams.reader import Decode
from mmvit.streams.stream import ShardStream
from mmvit.training.session import Session


def training_stream(session: Session, shards: list[str], decode: Decode, shuffle_buffer: int) -> ShardStream:
    """This process's share of `shards`, shuffled, again and again, in batches for one pass."""
    stream = ShardStream(
        shards,
        decode,
        session.micro_batch_size,
        seed=session.recipe.train.seed,
        rank=session.processes.rank,
        world_size=session.processes.world_size,
        num_workers=session.recipe.train.num_workers,
        shuffle_buffer=shuffle_buffer,
    )
    session.samples_per_epoch = session.samples_per_epoch or stream.samples
    return stream


def one_epoch(
    session: Session, shards: list[str], decode: Decode, whole: bool = False, num_workers: int = 0
) -> ShardStream:
    """This process's share of `shards` once, in order; with `whole`, all of it in every process.

    The session keeps it, to report skipped samples at the end.
    """
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
