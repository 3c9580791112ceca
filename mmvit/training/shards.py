"""The parts of a model's weights that processes hold under DeepSpeed: what is in them, and how to join them.

DeepSpeed puts the parameters of a group into one flat tensor and gives each process a part of it. In stage 3
that is an equal share of every parameter, rounded up; in stages 1 and 2 one stretch of the whole group; in
stage 0 every process has all. The optimizer's state, our averages and Muon's momentum are flat tensors alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """What this process holds of a parameter: `count` elements from `start`, at `offset` of a flat tensor."""

    parameter: nn.Parameter
    shape: torch.Size
    offset: int
    start: int
    count: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor of this process, and the pieces of parameters in it. All processes have the same ones in
    the same order, some of them empty."""

    values: Tensor
    pieces: list[Piece]


class Shards:
    """The trained weights of a DeepSpeed engine in full precision, by flat tensors.

    Args:
        zero: DeepSpeed's optimizer; None in stage 0, where `optimizer` trains the parameters themselves.
    """

    def __init__(self, stage: int, zero: Any, optimizer: torch.optim.Optimizer):
        self.stage, self.zero, self.optimizer = stage, zero, optimizer
        self.flats = [*self.find_flats()]
        self.places = {
            id(piece.parameter): (number, piece)
            for number, flat in enumerate(self.flats)
            for piece in flat.pieces
        }

    def find_flats(self) -> Iterator[Flat]:
        rank = dist.get_rank()
        if self.stage == 0:
            for group in self.optimizer.param_groups:
                for each in group["params"]:
                    yield Flat(each, [Piece(each, each.shape, 0, 0, each.numel())])
        elif self.stage == 3:
            for values, group in zip(
                self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True
            ):
                pieces, offset = [], 0
                for each in group:
                    share = each.partition_numel()
                    count = max(0, min(share, each.ds_numel - rank * share))
                    pieces.append(Piece(each, each.ds_shape, offset, rank * share, count))
                    offset += share
                yield Flat(values, pieces)
        else:
            for number, values in enumerate(self.zero.single_partition_of_fp32_groups):
                first = rank * len(values)
                pieces = []
                group = self.zero.round_robin_bit16_groups[number]
                for each, offset in zip(group, self.zero.round_robin_bit16_offsets[number], strict=True):
                    begin = max(first, offset)
                    count = max(0, min(first + len(values), offset + each.numel()) - begin)
                    pieces.append(Piece(each, each.shape, begin - first, begin - offset, count))
                yield Flat(values, pieces)

    def join(self, pieces: Sequence[Piece], values: Tensor) -> list[Tensor]:
        """The whole tensors of `pieces` of one flat tensor; every process must call it.

        Args:
            values: the flat tensor, or one of its moments or its average.
        """
        if self.stage == 0 or dist.get_world_size() == 1:
            flat = values.reshape(-1)
            return [flat[p.offset : p.offset + p.count].view(p.shape) for p in pieces]
        sizes = [piece.shape.numel() for piece in pieces]
        device = pieces[0].parameter.device
        if self.stage == 3:  # a padded share of each from each process
            shares = [piece.parameter.partition_numel() for piece in pieces]
            own = torch.cat([values[p.offset : p.offset + n] for p, n in zip(pieces, shares, strict=True)])
            parts = own.new_empty(dist.get_world_size() * len(own), device=device)
            dist.all_gather_into_tensor(parts, own.to(device))
            by_piece = parts.view(-1, len(own)).split(shares, 1)
            return [
                part.reshape(-1)[:size].view(piece.shape)
                for part, size, piece in zip(by_piece, sizes, pieces, strict=True)
            ]
        everyone = values.new_zeros(sum(sizes), device=device)
        for piece, tensor in zip(pieces, everyone.split(sizes), strict=True):
            tensor[piece.start : piece.start + piece.count] = self.part(piece, values)
        dist.all_reduce(everyone)
        return [part.view(piece.shape) for part, piece in zip(everyone.split(sizes), pieces, strict=True)]

    def part(self, piece: Piece, values: Tensor) -> Tensor:
        """This process's part of a parameter in a flat tensor."""
        return values.reshape(-1)[piece.offset : piece.offset + piece.count]

    def put(self, piece: Piece, values: Tensor, whole: Tensor) -> None:
        """Writes this process's part of a `whole` tensor into a flat tensor."""
        own = whole.reshape(-1)[piece.start : piece.start + piece.count]
        self.part(piece, values).copy_(own)

    @torch.no_grad()
    def show(self) -> None:
        """Lets the model compute with what is in the flat tensors."""
        for flat in self.flats if self.stage else []:
            for piece in flat.pieces:
                if self.stage == 3:
                    piece.parameter.ds_tensor[: piece.count].copy_(self.part(piece, flat.values))
                    refresh(piece.parameter)
                else:
                    piece.parameter.copy_(self.join([piece], flat.values)[0])
        if self.stage == 3 and (small := self.zero.persistent_parameters):
            small[0].all_gather(
                small
            )  # as after every step: the next pass would take them in lower precision

    @torch.no_grad()
    def exchange(self, contents: Sequence[Tensor]) -> None:
        """Lets the model compute with `contents`, a tensor like each flat one, and keeps there what it
        computed with; done again, all is as before."""
        for flat, values in zip(self.flats, contents, strict=True):
            for piece in flat.pieces:
                parameter, own = piece.parameter, self.part(piece, values)
                if self.stage in (1, 2):  # all weights are in each process, and its part of them elsewhere
                    master = self.part(piece, flat.values)
                    before = own.clone()
                    own.copy_(master)
                    master.copy_(before)
                    parameter.copy_(self.join([piece], flat.values)[0])
                    continue
                shown = self.part(piece, parameter) if self.stage == 0 else parameter.ds_tensor[: piece.count]
                before = shown.clone()
                shown.copy_(own)
                own.copy_(before)
                if self.stage == 3:
                    refresh(parameter)


def refresh(parameter: nn.Parameter) -> None:
    """Copies the shares of a parameter into its whole, which stage 3 keeps of small ones."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.copy_(whole_of(parameter))


def whole_of(parameter: Tensor) -> Tensor:
    """The content of a parameter that stage 3 shares out, as exact as its shares."""
    share = parameter.ds_tensor.detach().to(parameter.device)
    parts = share.new_empty(dist.get_world_size() * share.numel())
    dist.all_gather_into_tensor(parts, share.contiguous())
    return parts[: parameter.ds_numel].view(parameter.ds_shape)
