"""Attention masks: boolean matrices (queries, keys), True where a query sees a key.

None stands for full attention. Masks are arguments of the Transformer, so one set of weights serves every
kind of model.
"""

from typing import Literal

import torch
from torch import Tensor

Sparse = Literal["row", "column", "convolution"]


def causal(length: int, device: torch.device | None = None) -> Tensor:
    """Each token sees itself and all before it: the lower triangle, (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def prefix(
    length: int, prefix_length: int, device: torch.device | None = None, is_causal: bool = True
) -> Tensor:
    """The first `prefix_length` tokens see each other in both directions, and nothing after them. The others
    see the prefix and those before them (T5's prefix LM, 1910.10683), or each other, too, if not
    `is_causal`."""
    if not 0 <= prefix_length <= length:
        raise ValueError(f"expected a prefix_length of 0 to {length}, got {prefix_length}")
    mask = causal(length, device)
    mask[:prefix_length, :prefix_length] = True
    if not is_causal:
        mask[prefix_length:, prefix_length:] = True
    return mask


def sparse_causal(
    kind: Sparse,
    prefix_length: int,
    grid: tuple[int, int],
    kernel: int = 11,
    device: torch.device | None = None,
) -> Tensor:
    """DALL·E's attention (2102.12092, appendix B.1) over a prefix (the caption) and the codes of a grid in
    raster order. Every token sees itself and the prefix before it. Of the codes before it, a code sees

    - `row`: the last `columns`, back to the one above it;
    - `column`: those above it in its column;
    - `convolution`: those in a causal square of `kernel` x `kernel` codes around it.

    Rows wrap around: to the left of the image, the window continues on the right one row higher; to the
    right, on the left one row lower.

    Returns:
        (length, length) with length = prefix_length + rows · columns.
    """
    rows, columns = grid
    reach = kernel // 2
    if kind == "convolution" and (kernel % 2 == 0 or kernel > columns):
        raise ValueError(f"expected a convolution kernel that is odd and at most {columns}, got {kernel}")
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
    """The boolean `mask` as a bias on attention logits: 0 where True, the most negative finite number
    elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)
