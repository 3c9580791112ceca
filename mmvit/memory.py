"""Work on many rows in parts, which shrink when memory runs out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmvit.errors import UserError, is_out_of_memory


def in_parts(function: Callable[..., Tensor], rows: Sequence, *others: Any, size: int) -> Tensor:
    """Applies `function` to `size` rows at a time and concatenates its results.

    When memory runs out, parts of half the size are tried, down to one row.

    Args:
        rows, others: tensors and lists of equal length, of which every call gets the same part; anything
            else (None, a number) it gets as it is.

    Raises:
        UserError: when one row alone does not fit into memory.
    """
    results, first = [], 0
    while first < len(rows) or not results:
        part = slice(first, first + size)
        try:
            results.append(function(*(part_of(each, part) for each in (rows, *others))))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError("out of memory with a single image; use a device with more memory") from None
            size = max(1, min(size, len(rows) - first) // 2)
        else:
            first += size
    return torch.cat(results)


def part_of(value: Any, part: slice) -> Any:
    return value[part] if isinstance(value, Sequence | Tensor) else value
