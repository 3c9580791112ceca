"""A whole split of a data set in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvit.data.reader import Decode
from mmvit.data.shards import shards_of
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError


def read_split(folder: Path, split: str, decode: Decode) -> dict[str, Any]:
    """All samples of a split, `*` for all splits, in their order: {"keys": [...], ...} with what `decode`
    gives, tensors as one and the rest as lists.

    Raises:
        UserError: when the split holds no sample, or a shard is damaged: figures of the rest would not
            compare with others.
    """
    stream = ShardStream(shards_of(folder, split), decode, batch_size=256, shuffle_buffer=0, repeat=False)
    batches = list(stream)
    refuse_broken(stream)
    if not batches:
        raise UserError(f"{folder}/{split}-*.tar holds no samples")
    whole: dict[str, Any] = {}
    for name, value in batches[0].items():
        parts = [batch[name] for batch in batches]
        is_tensor = isinstance(value, Tensor)
        whole[name] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    return whole


def refuse_broken(stream: ShardStream) -> None:
    """Raises UserError where a shard that `stream` has read to its end is damaged."""
    for problem in stream.report()["broken_shards"].values():
        raise UserError(f"{problem}; figures of what is left would not compare with others: write it again")
