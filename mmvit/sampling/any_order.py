"""In which order a generator of any order draws an image's codes, and how many at a time."""

import math

import torch
from torch import Tensor


def draw_order(known: Tensor, numbers: Tensor) -> Tensor:
    """The places (batch, places) in the order of drawing: those not `known` by their `numbers`, both (batch,
    places), then the others."""
    return (numbers + known).argsort(1)  # numbers are below 1


def group_bounds(unknown: Tensor, steps: int) -> list[Tensor]:
    """Where the groups of `steps` steps begin and end in the order of drawing, `steps` + 1 tensors (batch,).

    By step k, 1 − cos(π k / 2 steps) of the `unknown` codes (batch,) are drawn: few at first, while they
    decide most, many at the end (MaskGIT, 2202.04200). An image with no more codes than steps gets one a
    step, until it is done.
    """
    shares = torch.tensor(
        [1 - math.cos(math.pi * k / (2 * steps)) for k in range(steps + 1)], dtype=torch.float64
    )
    bounds = (shares.unsqueeze(1) * unknown.cpu()).round().long()
    at_least = torch.minimum(torch.arange(steps + 1).unsqueeze(1), unknown.cpu())  # one code a step
    bounds = torch.maximum(bounds, at_least)
    bounds[-1] = unknown.cpu()
    return [*bounds.to(unknown.device)]
