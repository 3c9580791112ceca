"""Muon and AdamW in one optimizer, as DeepSpeed wants it, on flat parts of parameters."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmvit.training.muon import STACK, begin_directions, rate_of, wide
from mmvit.training.shards import Flat, Piece, Shards


@cache
def muon_settings() -> dict[str, Any]:
    """Muon's own defaults, which recipes leave as they are. To ask for them imports torch.compile."""
    return torch.optim.Muon([torch.zeros(1, 1)]).defaults


class FlatMuon(torch.optim.AdamW):
    """AdamW; for groups with `muon = True`, Muon as in `mmvit.training.muon.Muon`.

    A process keeps the momentum of its part of every matrix. To turn it into a direction, the processes join
    a few whole matrices at a time, of which each orthogonalises its share.

    `shards` says what is where, once DeepSpeed has shared out the parameters.
    """

    shards: Shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for values in group["params"] if group.get("muon") else []:
                self.turn(values, group)

    def turn(self, values: Tensor, group: dict[str, Any]) -> None:
        """Takes Muon's step with one flat tensor."""
        settings, state = muon_settings(), self.state[values]
        flat = next(flat for flat in self.shards.flats if flat.values is values)
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(values)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - settings["momentum"])
        averages = gradient.lerp(momentum, settings["momentum"])
        values.mul_(1 - group["lr"] * group["weight_decay"])
        for pieces in stacks(flat):
            matrices = [wide(whole.flatten(1)) for whole in self.shards.join(pieces, averages)]
            directions, arrival = begin_directions(
                matrices, settings["ns_coefficients"], settings["ns_steps"], settings["eps"]
            )
            if arrival is not None:
                arrival.wait()
            for piece, direction in zip(pieces, directions, strict=True):
                shape = piece.shape[0], piece.shape[1:].numel()
                own = (direction if direction.shape == shape else direction.T).reshape(-1)
                own = own[piece.start : piece.start + piece.count].to(values)
                self.shards.part(piece, values).add_(own, alpha=-rate_of(group["lr"], shape))


def stacks(flat: Flat) -> Iterator[list[Piece]]:
    """The pieces of matrices of one shape, or of its transpose, a few at a time."""
    by_shape: dict[tuple[int, ...], list[Piece]] = {}
    for piece in flat.pieces:
        rows, columns = piece.shape[0], piece.shape[1:].numel()
        by_shape.setdefault(tuple(sorted((rows, columns))), []).append(piece)
    for (rows, columns), pieces in by_shape.items():
        at_once = max(1, STACK // (rows * columns))
        for first in range(0, len(pieces), at_once):
            yield pieces[first : first + at_once]
