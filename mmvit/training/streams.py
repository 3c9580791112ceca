"""The data of a training script: an endless shuffled stream, and single epochs of held-out samples."""

from mmvit.data.reader import Decode
from mmvit.data.shards import expand_shards
from mmvit.data.stream import ShardStream
from mmvit.data.writing import read_dataset_card
from mmvit.training.session import Session


def training_stream(session: Session, shards: list[str], decode: Decode, shuffle_buffer: int) -> ShardStream:
    """This process's share of `shards`, shuffled, again and again, in batches for one pass."""
    session.samples_per_epoch = session.samples_per_epoch or count_samples(shards)
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


def count_samples(shards: list[str]) -> int | None:
    """The samples of all splits that `shards` are of, by their dataset.json; None where one does not say."""
    splits = {(shard.parent, shard.name.rpartition("-")[0]) for shard in expand_shards(shards)}
    counts = [read_dataset_card(folder).get("samples", {}).get(split) for folder, split in splits]
    return sum(counts) if counts and all(isinstance(count, int) for count in counts) else None


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
