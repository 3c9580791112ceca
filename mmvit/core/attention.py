"""Multi-head self-attention with QK-norm, positions, a kernel chosen by device, and a static key/value
cache."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmvit.core.masks import additive, causal
from mmvit.core.norm import RMSNorm
from mmvit.core.positions import NO_POSITIONS, LayerPositions

Kernel = Literal["auto", "plain", "sdpa"]
# In training on a CPU, plain products beat the fused kernel up to this length (benchmarks/attention.py)
PLAIN_UP_TO = 192


class KeyValueCache:
    """Keys and values of all layers, allocated once: `keys[layer]` is (batch, heads, capacity, head_dim).

    The first `length` tokens are filled; the Transformer appends to them and advances `length`.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (depth, batch, num_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity, self.length = capacity, 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (batch, heads, tokens, head_dim) to a layer; returns views of all so
        far."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, got {end}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """softmax(QKᵀ / √d + mask) V over heads ("Attention Is All You Need", 1706.03762)."""

    def __init__(
        self, width: int, num_heads: int, bias: bool = True, qk_norm: bool = False, kernel: Kernel = "auto"
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.kernel = num_heads, width // num_heads, kernel
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        positions: LayerPositions = NO_POSITIONS,
        cache: tuple[KeyValueCache, int] | None = None,
    ) -> Tensor:
        """x (batch, tokens, width) → the same shape.

        Args:
            mask: additive bias, broadcastable to (batch, heads, queries, keys); None lets every query see
                every key.
            is_causal: causal attention among x's own tokens, without a mask (the fused kernel then needs none
                in memory).
            positions: this layer's; relative ones need a mask or full attention, and no cache.
            cache: the cache and this layer's number; it holds the keys and values of earlier tokens.
        """
        query, key, value = self.heads(x, positions)
        mask = positions.bias(query, mask)
        if cache is not None:
            store, layer = cache
            key, value = store.extend(layer, key, value)
        attended = attend(query, key, value, mask, is_causal, self.kernel)
        return self.out(rearrange(attended, "batch heads tokens dim -> batch tokens (heads dim)"))

    def heads(self, x: Tensor, positions: LayerPositions = NO_POSITIONS) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, tokens, width) → queries and keys, normalised and rotated, and values, each (batch,
        heads, tokens, head_dim)."""
        query, key, value = rearrange(
            self.qkv(x),
            "batch tokens (three heads dim) -> three batch heads tokens dim",
            three=3,
            heads=self.num_heads,
        )
        query, key = positions.rotate(self.query_norm(query), self.key_norm(key))
        return query, key, value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
    kernel: Kernel = "auto",
) -> Tensor:
    """Attention over (batch, heads, tokens, head_dim) by the fused kernel or by plain products, equal up to
    rounding."""
    if kernel == "auto":
        short = key.shape[2] <= PLAIN_UP_TO
        kernel = "plain" if query.device.type == "cpu" and short and torch.is_grad_enabled() else "sdpa"
    if kernel == "sdpa":
        if is_causal:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        mask = additive(causal(query.shape[2], query.device), logits.dtype)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1).to(value.dtype) @ value
