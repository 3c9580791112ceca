"""The shared core: a pre-norm Transformer over vectors. It knows no pixels, captions or devices; masks and
positions are arguments."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvit.config import OF_TRAINING, Config
from mmvit.core.attention import Attention, Kernel, KeyValueCache
from mmvit.core.dropout import Dropout
from mmvit.core.hidden import HiddenLayers
from mmvit.core.masks import additive
from mmvit.core.norm import RMSNorm
from mmvit.core.positions import NO_POSITIONS, LayerPositions
from mmvit.sharding import shared, whole


class TransformerConfig(Config):
    """Shape and parts of the core. The defaults are ViT's (2010.11929)."""

    width: int = Field(192, gt=0)
    depth: int = Field(6, gt=0)
    num_heads: int = Field(3, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = Field(1e-6, gt=0)
    bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    stochastic_depth: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    attention_kernel: Kernel = Field("auto", json_schema_extra=OF_TRAINING)
    activation_checkpointing: Literal["none", "blocks", "attention"] = Field(
        "none",
        json_schema_extra=OF_TRAINING,
        description="what the backward pass computes again instead of keeping it: whole blocks, or the first "
        "half of each, attention with its norm",
    )
    activation_checkpointing_every: int = Field(
        1, gt=0, json_schema_extra=OF_TRAINING, description="2: only in every second block"
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _true_means_blocks(cls, value: Any) -> Any:
        return ("blocks" if value else "none") if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        return self

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Hidden units of the MLP. SwiGLU has three matrices, so it gets two thirds, rounded to a multiple of
        64."""
        if self.mlp == "swiglu":
            return max(64, round(self.width * self.mlp_ratio * 2 / 3 / 64) * 64)
        return round(self.width * self.mlp_ratio)


class Mlp(nn.Module):
    """Linear → activation → linear; or SwiGLU, silu(gate) · value (2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.kind = config.mlp
        gates = 2 if config.mlp == "swiglu" else 1
        self.up = nn.Linear(config.width, gates * config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(self.dropout(hidden))


class Branch(nn.Module):
    """The end of a residual branch, before it is added: dropout, LayerScale (2103.17239), stochastic depth
    (1603.09382)."""

    def __init__(self, config: TransformerConfig, drop_probability: float):
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.scale = (
            None
            if config.layer_scale is None
            else nn.Parameter(torch.full((config.width,), config.layer_scale))
        )
        self.drop_probability = drop_probability

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if self.scale is not None:
            x = x * self.scale.to(x.dtype)
        if self.training and self.drop_probability > 0:
            kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_probability
            x = x * (kept / (1 - self.drop_probability)).to(x.dtype)
        return x


class Block(HiddenLayers):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, drop_probability: float):
        super().__init__()
        self.norm1, self.norm2 = build_norm(config), build_norm(config)
        self.attention = Attention(
            config.width, config.num_heads, config.bias, config.qk_norm, config.attention_kernel
        )
        self.mlp = Mlp(config)
        self.branch1, self.branch2 = Branch(config, drop_probability), Branch(config, drop_probability)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        positions: LayerPositions = NO_POSITIONS,
        cache: tuple[KeyValueCache, int] | None = None,
        recompute_attention: bool = False,
    ) -> Tensor:
        """As `Attention.forward`; with `recompute_attention` the backward pass computes the first half
        again."""
        inputs = (x, mask, is_causal, positions, cache)
        if recompute_attention:
            x = x + checkpoint(self.attend, *inputs, use_reentrant=False)
        else:
            x = x + self.attend(*inputs)
        return x + self.branch2(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.branch1(self.attention(self.norm1(x), *inputs))


class Transformer(nn.Module):
    """`depth` blocks and a last norm. Stochastic depth grows linearly from 0 in the first block to its full
    value in the last."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        last = max(1, config.depth - 1)
        self.blocks = nn.ModuleList(
            shared(Block(config, config.stochastic_depth * i / last)) for i in range(config.depth)
        )
        self.norm = build_norm(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises linear weights from N(0, .02), divided by √(2·depth) for those that write into the
        residual stream (GPT-2), and biases with zeros."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith((".out", ".down"))
                std = 0.02 / (2 * self.config.depth) ** 0.5 if writes_residual else 0.02
                with whole(*module.parameters()):
                    nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Sequence[Tensor] | None = None,
        is_causal: bool = False,
        positions: LayerPositions | Sequence[LayerPositions] = NO_POSITIONS,
        cache: KeyValueCache | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """x (batch, tokens, width) → the same shape, after the last norm if `normalized`.

        Args:
            mask: boolean (queries, keys) or broadcastable to (batch, heads, queries, keys), True where a
                query sees a key; None for full attention; or one for each layer. With a cache, keys are the
                cached tokens followed by x's own.
            is_causal: causal attention, in place of a mask.
            positions: what all layers do with the positions of x's tokens, or what each layer does.
            cache: earlier tokens' keys and values; x's are appended.
        """
        if is_causal and mask is not None:
            raise ValueError("give a mask or is_causal, not both")
        places = [positions] * len(self.blocks) if isinstance(positions, LayerPositions) else positions
        if len(places) != len(self.blocks):
            raise ValueError(f"expected positions for {len(self.blocks)} layers, got {len(places)}")
        if (is_causal or cache is not None) and any(place.offsets is not None for place in places):
            raise ValueError("relative positions work with a mask, not with is_causal or a cache")
        device = "cuda" if x.is_meta else x.device.type  # as in mmvit.models.trace
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # keeps the residual stream in lower precision, too
        masks = bias_of_layers(mask, len(self.blocks), x.dtype)
        for layer, block in enumerate(self.blocks):
            slot = None if cache is None else (cache, layer)
            x = places[layer].add(x)
            inputs = (x, masks[layer], is_causal, places[layer], slot)
            chosen = self.training and layer % self.config.activation_checkpointing_every == 0
            recomputed = self.config.activation_checkpointing if chosen else "none"
            if recomputed == "blocks":
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs, recompute_attention=recomputed == "attention")
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x) if normalized else x

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> KeyValueCache:
        """An empty cache for `capacity` tokens of this core."""
        config = self.config
        return KeyValueCache(config.depth, batch, config.num_heads, capacity, config.head_dim, dtype, device)


def bias_of_layers(
    mask: Tensor | Sequence[Tensor] | None, depth: int, dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """A bias on attention logits for each layer; a mask that several layers share is converted once."""
    if mask is None or isinstance(mask, Tensor):
        return [None if mask is None else additive(mask, dtype)] * depth
    if len(mask) != depth:
        raise ValueError(f"expected masks for {depth} layers, got {len(mask)}")
    made = {id(one): one for one in mask}
    made = {key: additive(one, dtype) for key, one in made.items()}
    return [made[id(one)] for one in mask]


def build_norm(config: TransformerConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.width, eps=config.norm_eps)
