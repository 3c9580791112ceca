"""The VQ image tokenizer: pixels to a small grid of discrete codes and back (VQ-VAE, 1711.00937).

The encoder sees one patch at a time, with a margin of a few pixels around it, so equal patches get equal
codes wherever they are and whatever surrounds them. A generator then learns only once what two images have in
common. The decoder sees far, because it has to settle what single codes leave open.
"""

import math
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.core.hidden import HiddenLayers
from mmvit.core.transformer import Block, TransformerConfig
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.quantizers import QUANTIZERS, QuantizerConfig


class VQConfig(QuantizerConfig):
    """The shape of a `VQModel` and how its codes learn."""

    kind: Literal["vq"] = "vq"
    factor: int = Field(8, ge=1, description="pixels per code, along each side")
    margin: int = Field(2, ge=0, description="pixels around its patch on which a code depends, too")
    encoder_width: int = Field(256, ge=1)
    encoder_depth: int = Field(2, ge=0)
    decoder_widths: tuple[int, ...] = Field(
        (256, 128), min_length=1, description="of the stages, each at twice the resolution of the one before"
    )
    decoder_depths: tuple[int, ...] = Field((2, 3), description="residual blocks of each stage")
    attention_depth: int = Field(
        0, ge=0, description="attention blocks with which the decoder sees all codes"
    )

    @model_validator(mode="after")
    def _stages_fit(self):
        stages, depths = len(self.decoder_widths), len(self.decoder_depths)
        if stages != depths:
            raise ValueError(
                f"decoder_widths has {stages} stages, decoder_depths {depths}: give each stage both"
            )
        if self.factor % 2 ** (stages - 1):
            raise ValueError(
                f"factor must be a multiple of {2 ** (stages - 1)} for {stages} decoder stages, got "
                f"{self.factor}"
            )
        return self


class VQModel(ImageTokenizer):
    """pixels ↔ codes, for images of any size whose sides are multiples of `factor`."""

    config_class, kind = VQConfig, "vq"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.codebook = QUANTIZERS[config.quantizer](config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """Settings that change the codes but no weight (mmvit.hub.fingerprint)."""
        return ("levels",) if self.config.quantizer == "fsq" else ()

    def code_vectors(self) -> Tensor:
        """The vector of each code, (codebook_size, code_width)."""
        return self.codebook.vectors()

    def codes_of(self, pixels: Tensor) -> Tensor:
        return self.codebook.encode(self.encoder(pixels))

    def pixels_of(self, codes: Tensor) -> Tensor:
        return self.decoder(self.codebook.vectors()[codes] * self.codebook.scale).float().clamp(-1, 1)

    @property
    def last_weight(self) -> Tensor:
        """The matrix of the decoder's last layer, (channels, width, 3, 3)."""
        return self.decoder.head.weight

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """pixels (batch, 3, height, width) in [-1, 1] → their reconstruction, of that shape and not clamped;
        the quantiser's loss (1711.00937, equation 3); its metrics.

        In training mode, this also updates a codebook of moving averages.

        Raises:
            UserError: as `grid` does.
        """
        self.grid(*pixels.shape[-2:])
        quantized, quantizer_loss, metrics = self.codebook(self.encoder(pixels))
        return self.decoder(quantized * self.codebook.scale).float(), quantizer_loss, metrics

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`pixel_error` of the reconstruction of `batch["pixels"]` plus the quantiser's loss; otherwise as
        `reconstruct`."""
        reconstruction, quantizer_loss, metrics = self.reconstruct(batch["pixels"])
        error, parts = pixel_error(reconstruction, batch["pixels"])
        return error + quantizer_loss, {**parts, **metrics}


def pixel_error(reconstruction: Tensor, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + L2, averaged over all values, and both as metrics."""
    error = reconstruction - pixels
    l1, l2 = error.abs().mean(), error.square().mean()
    return l1 + l2, {"l1": l1.detach(), "l2": l2.detach()}


class Encoder(nn.Module):
    """An MLP over each patch with its margin: pixels → vectors (batch, rows, columns, quantized_width)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        width = config.encoder_width
        self.factor, self.margin = config.factor, config.margin
        self.patch = nn.Linear(3 * (config.factor + 2 * config.margin) ** 2, width)
        self.blocks = nn.Sequential(*(MLPBlock(width) for _ in range(config.encoder_depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.quantized_width)

    def forward(self, pixels: Tensor) -> Tensor:
        window = self.factor + 2 * self.margin
        pixels = F.pad(pixels, [self.margin] * 4, mode="replicate")
        patches = pixels.unfold(2, window, self.factor).unfold(3, window, self.factor)
        x = self.patch(rearrange(patches, "b c rows cols y x -> b rows cols (c y x)"))
        return self.head(self.norm(self.blocks(x)))


class Decoder(nn.Module):
    """Residual convolutions at low resolution, optionally with attention at the lowest: vectors (batch, rows,
    columns, quantized_width) → pixels."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.decoder_widths
        self.rest = config.factor // 2 ** (len(widths) - 1)  # of the factor, after the stages
        self.stem = Convolution(config.quantized_width, widths[0])
        shape = TransformerConfig(width=widths[0], num_heads=widths[0] // math.gcd(widths[0], 64))
        self.attention = nn.ModuleList(Block(shape, 0.0) for _ in range(config.attention_depth))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
            for width, depth in zip(widths, config.decoder_depths, strict=True)
        )
        self.doubles = nn.ModuleList(nn.Linear(width, 4 * following) for width, following in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = Convolution(widths[-1], 3 * self.rest**2)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.stem(vectors)
        for block in self.attention:
            x = block(x.flatten(1, 2)).view_as(x)
        x = self.stages[0](x)
        for double, stage in zip(self.doubles, self.stages[1:], strict=True):
            x = stage(pixel_shuffle(double(x), 2))
        return rearrange(pixel_shuffle(self.head(self.norm(x)), self.rest), "b y x c -> b c y x")


class MLPBlock(HiddenLayers):
    """x + MLP(norm(x)), at each position on its own."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.silu(self.expand(self.norm(x))))


class ConvBlock(HiddenLayers):
    """x + Linear(SiLU(Conv3x3(norm(x)))), which a CPU with matrix units computes faster than a depthwise
    one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = Convolution(width, width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.spread(self.norm(x))))


class Convolution(nn.Conv2d):
    """3x3 over (batch, rows, columns, channels), which is channels_last in memory, so nothing is copied."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(batch, rows, columns, factor² · channels) → (batch, factor · rows, factor · columns, channels)."""
    return rearrange(x, "b r c (y x k) -> b (r y) (c x) k", y=factor, x=factor)
