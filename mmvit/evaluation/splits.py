"""A whole split of a data set in memory, and its way through an image tokenizer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvit.data.reader import Decode
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError
from mmvit.models.image_tokenizer import ImageTokenizer


def read_split(folder: Path, split: str, decode: Decode) -> dict[str, Any]:
    """All samples of a split, `*` for all splits, in their order: {"keys": [...], ...} with what `decode`
    gives, tensors as one and the rest as lists.

    Raises:
        UserError: when the split holds no sample.
    """
    stream = ShardStream(f"{folder}/{split}-*.tar", decode, batch_size=256, shuffle_buffer=0, repeat=False)
    batches = list(stream)
    if not batches:
        raise UserError(f"{folder}/{split}-*.tar holds no samples")
    whole: dict[str, Any] = {}
    for name, value in batches[0].items():
        parts = [batch[name] for batch in batches]
        is_tensor = isinstance(value, Tensor)
        whole[name] = torch.cat(parts) if is_tensor else [one for part in parts for one in part]
    return whole


def encode(tokenizer: ImageTokenizer, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Pixels (pictures, 3, height, width) → codes (pictures, rows, columns)."""
    device = next(tokenizer.parameters()).device
    return torch.cat([tokenizer.encode(part.to(device)) for part in pixels.split(batch_size)])


def decode(tokenizer: ImageTokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """The inverse of `encode`, as far as the tokenizer can; on the CPU."""
    return torch.cat([tokenizer.decode(part).cpu() for part in codes.split(batch_size)])
