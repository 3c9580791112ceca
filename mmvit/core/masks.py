"""Who may attend to whom, as boolean matrices of (queries, keys) where True means that the query sees the
key.

A full mask is None. Masks are arguments of the Transformer, so one set of weights serves every kind of model.
"""

from typing import Literal

import torch
from torch import Tensor

Sparse = Literal["row", "column", "convolution"]


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


def sparse_causal(
    kind: Sparse,
    prefix_length: int,
    grid: tuple[int, int],
    kernel: int = 11,
    device: torch.device | None = None,
) -> Tensor:
    """DALL·E's attention (2102.12092, appendix B.1) over a prefix (the caption) and the codes of a grid in
    raster order: every token sees itself and the prefix before it, and a code, of the codes before it,

    - `row`: the last `columns` before it, back to the one above it;
    - `column`: those above it in its column;
    - `convolution`: those that a causal square of `kernel` x `kernel` codes around it covers.

    What leaves the picture on the left goes on at its right, one row higher; on the right, at its left, one
    row lower.

    Returns:
        (length, length) with length = prefix_length + rows · columns.
    """
    rows, columns = grid
    reach = kernel // 2
    if kind == "convolution" and (kernel % 2 == 0 or kernel > columns):
        raise ValueError(f"a convolution's kernel is odd and at most the {columns} columns, not {kernel}")
    place = torch.arange(rows * columns, device=device)
    back = place[:, None] - place[None, :]  # places from key to query
    if kind == "row":
        seen = back <= columns
    elif kind == "column":
        seen = back % columns == 0
    else:
        above = (back + reach).div(columns, rounding_mode="floor")  # rows from key to query
        aside = above * columns - back
        seen = (above <= reach) & (aside.abs() <= reach)
    mask = causal(prefix_length + rows * columns, device)
    mask[prefix_length:, prefix_length:] &= seen
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The boolean `mask` as a bias on attention logits: 0 where allowed, the most negative finite number
    elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)
