"""Work on many rows in parts, which shrink when memory runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmvit.errors import UserError, is_out_of_memory

Result = TypeVar("Result")


def in_parts(function: Callable[..., Tensor], rows: Sequence, *others: Any, size: int) -> Tensor:
    """Applies `function` to `size` rows at a time and concatenates its results, as `results_in_parts` does.

    Args:
        rows, others: tensors and lists of equal length, of which every call gets the same part; anything
            else (None, a number) it gets as it is.
    """

    def results(part: slice) -> list[Tensor]:
        return [function(*(part_of(each, part) for each in (rows, *others)))]

    return torch.cat([*results_in_parts(results, len(rows), size)])


def results_in_parts(
    results: Callable[[slice], Iterable[Result]], number: int, size: int
) -> Iterator[Result]:
    """Yields the `results` of `size` of `number` rows at a time; of no rows, those of one empty part.

    When memory runs out, the part begins again with half as many rows, down to one.

    Raises:
        UserError: when one row alone does not fit into memory.
    """
    first = 0
    while True:
        try:
            yield from results(slice(first, first + size))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError("out of memory with a single image; use a device with more memory") from None
            size = max(1, min(size, number - first) // 2)
        else:
            first += size
            if first >= number:
                return


def part_of(value: Any, part: slice) -> Any:
    return value[part] if isinstance(value, Sequence | Tensor) else value
