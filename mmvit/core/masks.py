"""Who may attend to whom, as boolean matrices of (queries, keys) where True means that the query sees the
key.

A full mask is None. Masks are arguments of the Transformer, so one set of weights serves every kind of model.
"""

import torch
from torch import Tensor


def causal(length: int, device: torch.device | None = None) -> Tensor:
    """Each token sees itself and all before it: the lower triangle, (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def prefix(length: int, prefix_length: int, device: torch.device | None = None) -> Tensor:
    """The first `prefix_length` tokens see each other in both directions, the rest is causal (prefix-LM of
    T5, 1910.10683)."""
    if not 0 <= prefix_length <= length:
        raise ValueError(f"prefix_length {prefix_length} is outside 0..{length}")
    mask = causal(length, device)
    mask[:prefix_length, :prefix_length] = True
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The boolean `mask` as a bias on attention logits: 0 where allowed, the most negative finite number
    elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)
