"""Positions of tokens: a 1-D prefix (caption tokens, [CLS]) followed by a 2-D grid (patches or image codes)
in raster order.

`Positions.add` adds to token vectors when a model embeds them. All that happens inside the core, be it
addition, rotation or relative logits, reaches the Transformer as one argument, `LayerPositions`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

PositionKind = Literal["none", "learned_1d", "learned_2d", "learned_2d_concat", "sincos_2d", "rotary_2d"]
LEARNED_2D = ("learned_2d", "learned_2d_concat")


class LayerPositions(NamedTuple):
    """What one layer of the Transformer does with the positions of its tokens; by default nothing.

    - `added`: vectors (tokens, width) or (batch, tokens, width) added to the layer's input.
    - `rotations`: cosines and sines of the angles by which it rotates queries and keys, broadcastable to
      (batch, heads, tokens, head_dim / 2).
    - `offsets`: vectors (2 · tokens − 1, head_dim) of relative positions (`relative_logits`).
    """

    added: Tensor | None = None
    rotations: tuple[Tensor, Tensor] | None = None
    offsets: Tensor | None = None

    def add(self, x: Tensor) -> Tensor:
        return x if self.added is None else x + self.added.to(x.dtype)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.rotations is None:
            return query, key
        return rotate(query, self.rotations), rotate(key, self.rotations)

    def bias(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """The additive `mask` plus the relative logits of queries (batch, heads, tokens, head_dim)."""
        if self.offsets is None:
            return mask
        logits = relative_logits(query, self.offsets)
        return logits if mask is None else logits + mask

    def take(self, chosen: Tensor) -> "LayerPositions":
        """The positions of the tokens at the `chosen` places (batch, kept) alone."""
        if self.offsets is not None:
            raise ValueError("relative positions cannot leave out tokens")
        added, rotations = self.added, self.rotations
        if rotations is not None:
            rotations = tuple(table[chosen].unsqueeze(1) for table in rotations)  # the same for all heads
        return LayerPositions(None if added is None else added[chosen], rotations)


NO_POSITIONS = LayerPositions()


class Positions(nn.Module):
    """Position information for `prefix_length` tokens in a row, then `grid` = (rows, columns) tokens.

    - `none`: no positions; attention sees a set.
    - `learned_1d`: one vector per place in the sequence (ViT, 2010.11929).
    - `learned_2d`: one vector per prefix place; row vector + column vector on the grid (DALL·E, 2102.12092).
    - `learned_2d_concat`: as `learned_2d`, but half of the vector is the row's, half the column's (ViT's
      2-D).
    - `sincos_2d`: fixed sines and cosines; on the grid half of the width for rows, half for columns, each
      with the Transformer's frequencies (1706.03762). MoCo v3 and big_vision space them differently.
    - `rotary_2d`: rotary embedding (RoFormer, 2104.09864) of (row, column), half of each head's pairs for
      each; a prefix token at place i has row = column = i, which is the usual 1-D rotary embedding, and the
      grid's rows and columns start after the prefix.
    """

    def __init__(
        self,
        kind: PositionKind,
        width: int,
        head_dim: int,
        prefix_length: int,
        grid: tuple[int, int],
        rotary_base: float = 10000.0,
    ):
        super().__init__()
        self.kind, self.prefix_length, self.grid = kind, prefix_length, tuple(grid)
        rows, columns = grid
        check_widths(kind, width, head_dim)
        self.length = prefix_length + rows * columns
        if kind == "learned_1d":
            self.table = nn.Parameter(torch.empty(self.length, width))
        elif kind in LEARNED_2D:
            share = width // 2 if kind == "learned_2d_concat" else width
            # None, not a table without rows, which ZeRO 3 cannot share out
            self.prefix_table = nn.Parameter(torch.empty(prefix_length, width)) if prefix_length else None
            self.row_table = nn.Parameter(torch.empty(rows, share))
            self.column_table = nn.Parameter(torch.empty(columns, share))
        elif kind == "sincos_2d":
            places = self._coordinates(prefix_length, rows, columns, offset=0)
            self.register_buffer("table", sincos(places, width), persistent=False)
        elif kind == "rotary_2d":
            places = self._coordinates(prefix_length, rows, columns, offset=prefix_length)
            self.register_buffer("angles", rotary_angles(places, head_dim, rotary_base), persistent=False)
        elif kind != "none":
            raise ValueError(f"unknown position kind {kind!r}")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        if not prefix_length:
            self.register_load_state_dict_pre_hook(drop_empty_prefix)

    @staticmethod
    def _coordinates(prefix_length: int, rows: int, columns: int, offset: int) -> Tensor:
        """Row and column of every place, (prefix + rows · columns, 2)."""
        line = torch.arange(prefix_length).unsqueeze(1).expand(-1, 2)
        square = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2) + offset
        return torch.cat([line, square])

    def add(self, x: Tensor, start: int = 0) -> Tensor:
        """x (batch, tokens, width) plus the vectors of the places from `start` on, if the kind has any."""
        if not self.is_additive:
            return x
        return x + self.vectors()[start : start + x.shape[1]].to(x.dtype)

    @property
    def is_additive(self) -> bool:
        return self.kind not in ("none", "rotary_2d")

    def vectors(self) -> Tensor:
        """The vectors of an additive kind for every place, (length, width)."""
        if self.kind not in LEARNED_2D:
            return self.table
        rows, columns = self.row_table[:, None], self.column_table[None, :]
        if self.kind == "learned_2d":
            square = rows + columns  # (rows, columns, width)
        else:
            square = torch.cat([rows.expand(-1, self.grid[1], -1), columns.expand(self.grid[0], -1, -1)], -1)
        square = square.flatten(0, 1)
        return square if self.prefix_table is None else torch.cat([self.prefix_table, square])

    def in_layers(self, start: int, length: int) -> LayerPositions:
        """What every layer of the core does for the tokens at places `start` to `start + length`: rotations
        if the kind is rotary, nothing for the kinds that `add` applies."""
        if self.kind != "rotary_2d":
            return NO_POSITIONS
        angles = self.angles[start : start + length]
        return LayerPositions(rotations=(angles.cos(), angles.sin()))


def drop_empty_prefix(positions: Positions, weights: dict[str, Tensor], prefix: str, *more: object) -> None:
    """Loading hook for older weights, where positions without a prefix have a `prefix_table` of no rows."""
    name = f"{prefix}prefix_table"
    if name in weights and not weights[name].numel():
        del weights[name]


class RelativePositions(nn.Module):
    """A learnt vector for every offset between two of `length` tokens in a row, for each layer and shared by
    its heads (1803.02155; ViT's relative attention, 2010.11929, appendix D.4)."""

    def __init__(self, depth: int, length: int, head_dim: int):
        super().__init__()
        shape = 2 * length - 1, head_dim
        self.tables = nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for _ in range(depth))

    def in_layers(self) -> list[LayerPositions]:
        return [LayerPositions(offsets=table) for table in self.tables]


def take(positions: LayerPositions | Sequence[LayerPositions], chosen: Tensor) -> Sequence[LayerPositions]:
    """`LayerPositions.take` of those of all layers, or of each layer's own."""
    if isinstance(positions, LayerPositions):
        return positions.take(chosen)
    return [layer.take(chosen) for layer in positions]


def check_widths(kind: str, width: int, head_dim: int) -> None:
    """Raises ValueError if vectors of `width` and heads of `head_dim` cannot have positions of a kind."""
    if kind == "learned_2d_concat" and width % 2:
        raise ValueError(f"{kind} positions need an even width, got {width}")
    if kind == "sincos_2d" and width % 4:
        raise ValueError(f"{kind} positions need a width divisible by 4, got {width}")
    if kind == "rotary_2d" and head_dim % 4:
        raise ValueError(f"{kind} positions need a head size divisible by 4, got {head_dim}")


def relative_logits(query: Tensor, offsets: Tensor) -> Tensor:
    """The attention logits (batch, heads, tokens, tokens) of relative positions: products, over √head_dim, of
    queries (batch, heads, tokens, head_dim) with the vector of query's place − key's place.

    Args:
        offsets: (2 · tokens − 1, head_dim), from that of 1 − tokens to that of tokens − 1.

    Raises:
        ValueError: for another number of offsets.
    """
    tokens = query.shape[2]
    if len(offsets) != 2 * tokens - 1:
        raise ValueError(f"expected {2 * tokens - 1} offsets for {tokens} tokens, got {len(offsets)}")
    logits = (query * query.shape[-1] ** -0.5) @ offsets.to(query.dtype).T
    place = torch.arange(tokens, device=query.device)
    offset = place[:, None] - place[None, :] + tokens - 1
    return logits.gather(3, offset.expand(*query.shape[:2], -1, -1))


def sincos(coordinates: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """The fixed embedding (places, width) of (row, column): [sin row, cos row, sin column, cos column], a
    quarter of the width each."""
    frequencies = base ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = coordinates.float().unsqueeze(-1) * frequencies  # (places, 2, width / 4)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def rotary_angles(coordinates: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles (places, head_dim / 2): the first half grows with the row, the second with the column."""
    frequencies = base ** (-torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))
    return (coordinates.float().unsqueeze(-1) * frequencies).flatten(1)


def rotate(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of x (batch, heads, tokens, head_dim) by their angles."""
    cosines, sines = (table.to(x.dtype) for table in rotations)
    return Rotation.apply(x, cosines, sines)


class Rotation(torch.autograd.Function):
    """A rotation written into one new tensor: half the memory traffic of products, sums and a
    concatenation."""

    @staticmethod
    def forward(ctx, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return turn(x, cosines, sines, sign=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return turn(gradient, *ctx.saved_tensors, sign=-1), None, None


def turn(x: Tensor, cosines: Tensor, sines: Tensor, sign: int) -> Tensor:
    """x rotated by the angles, or by their negatives if `sign` is -1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cosines, out=out_first).addcmul_(second, sines, value=-sign)
    torch.mul(second, cosines, out=out_second).addcmul_(first, sines, value=sign)
    return out
