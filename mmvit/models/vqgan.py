"""VQGAN (2012.09841), the image tokenizer of many published generators: residual convolutions and attention.

It runs weights that others have trained (mmvit.interop.vqgan imports them) and has no `loss`; to train a
tokenizer, use `VQModel` or `DiscreteVAE`.
"""

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.models.image_tokenizer import ImageTokenizer


class VQGANConfig(Config):
    """The shape of a `VQGAN`, and how it chooses codes. The defaults are the paper's model with 16384 codes.

    Level 0 has the resolution of the image, each further level half of the one before.
    """

    kind: Literal["vqgan"] = "vqgan"
    codebook_size: int = Field(16384, ge=2)
    code_width: int = Field(256, ge=1, description="dimensions of a code")
    latent_width: int = Field(256, ge=1, description="channels between encoder and decoder")
    stem_width: int = Field(128, ge=1, description="channels of the encoder's first convolution")
    widths: tuple[int, ...] = Field((128, 128, 256, 256, 512), min_length=1, description="of the levels")
    blocks_per_level: int = Field(2, ge=1, description="in the encoder; the decoder has one more")
    encoder_attention: tuple[int, ...] = Field((4,), description="levels with attention after every block")
    decoder_attention: tuple[int, ...] = Field((4,), description="levels with attention after every block")
    middle_attention: bool = Field(True, description="between the two blocks at the lowest resolution")
    num_groups: int = Field(32, ge=1, description="of every group normalisation")
    decoder: bool = Field(True, description="whether there is a decoder; Chameleon's weights have none")
    cosine: bool = Field(False, description="whether codes are chosen by angle instead of Euclidean distance")
    unit_codes: bool = Field(False, description="whether the decoder's codes are scaled to length 1")
    black: Literal[-1, 0] = Field(-1, description="value of the darkest pixel in training; the lightest is 1")

    @model_validator(mode="after")
    def _parts_fit(self):
        if uneven := [width for width in (self.stem_width, *self.widths) if width % self.num_groups]:
            raise ValueError(f"widths must be multiples of num_groups {self.num_groups}, got {uneven}")
        levels = range(len(self.widths))
        if beyond := {*self.encoder_attention, *self.decoder_attention} - {*levels}:
            raise ValueError(f"attention levels must be 0 to {len(levels) - 1}, got {sorted(beyond)}")
        return self


class VQGAN(ImageTokenizer):
    """pixels ↔ codes, for images whose sides are multiples of `factor`."""

    config_class, kind = VQGANConfig, "vqgan"
    fingerprinted = ("cosine", "unit_codes", "black")  # change codes or pixels, but no weight

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_code = nn.Conv2d(config.latent_width, config.code_width, 1)
        self.codebook = nn.Embedding(config.codebook_size, config.code_width)
        self.from_code = nn.Conv2d(config.code_width, config.latent_width, 1)
        self.decoder = Decoder(config) if config.decoder else None

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config.widths) - 1)

    def code_vectors(self) -> Tensor:
        """The decoder's vector for each code, (codebook_size, code_width)."""
        vectors = self.codebook.weight
        return F.normalize(vectors, dim=-1) if self.config.unit_codes else vectors

    def codes_of(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous()
        latents = self.to_code(self.encoder(pixels if self.config.black == -1 else (pixels + 1) / 2))
        return self.nearest(latents.permute(0, 2, 3, 1))

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors (..., code_width) → each one's nearest code, (...)."""
        codes = self.codebook.weight
        if self.config.cosine:  # its own length does not change which code is nearest in angle
            return (vectors @ F.normalize(codes, dim=-1).T).argmax(-1)
        # |e − v|² without |v|², which is the same for all codes
        return (codes.square().sum(-1) - 2 * vectors @ codes.T).argmin(-1)

    def pixels_of(self, codes: Tensor) -> Tensor:
        if self.decoder is None:
            raise UserError(
                "this image tokenizer can only encode: its weights came without a decoder. Decode with one "
                "of the same codebook that has a decoder"
            )
        # in channels_last, group normalisation on a CPU is off by 1e-5 or more where the mean is large
        vectors = self.code_vectors()[codes].permute(0, 3, 1, 2).contiguous()
        pixels = self.decoder(self.from_code(vectors)).float()
        return (pixels if self.config.black == -1 else pixels * 2 - 1).clamp(-1, 1)


class Encoder(nn.Module):
    """pixels (batch, 3, height, width) → latents (batch, latent_width, rows, columns)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.stem = nn.Conv2d(3, config.stem_width, 3, padding=1)
        self.levels = nn.ModuleList()
        before, last = config.stem_width, len(config.widths) - 1
        for place, width in enumerate(config.widths):
            attention = place in config.encoder_attention
            resample = Downsample(width) if place != last else nn.Identity()
            self.levels.append(
                Level(before, width, config.blocks_per_level, attention, resample, config.num_groups)
            )
            before = width
        self.middle = build_middle(before, config)
        self.norm = group_norm(before, config.num_groups)
        self.head = nn.Conv2d(before, config.latent_width, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for level in self.levels:
            x = level(x)
        return self.head(F.silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """latents (batch, latent_width, rows, columns) → pixels; levels are in running order, lowest resolution
    first."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        before = config.widths[-1]
        self.stem = nn.Conv2d(config.latent_width, before, 3, padding=1)
        self.middle = build_middle(before, config)
        self.levels = nn.ModuleList()
        for place, width in reversed(list(enumerate(config.widths))):
            attention = place in config.decoder_attention
            resample = Upsample(width) if place != 0 else nn.Identity()
            self.levels.append(
                Level(before, width, config.blocks_per_level + 1, attention, resample, config.num_groups)
            )
            before = width
        self.norm = group_norm(before, config.num_groups)
        self.head = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.stem(latents))
        for level in self.levels:
            x = level(x)
        return self.head(F.silu(self.norm(x)))


class Level(nn.Module):
    """Residual blocks, each optionally followed by attention, then a change of resolution."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_blocks: int,
        attention: bool,
        resample: nn.Module,
        num_groups: int,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(out_width if place else in_width, out_width, num_groups) for place in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            Attention(out_width, num_groups) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Block(nn.Module):
    """skip(x) + two 3x3 convolutions, each after group normalisation and SiLU."""

    def __init__(self, in_width: int, out_width: int, num_groups: int):
        super().__init__()
        self.norm1 = group_norm(in_width, num_groups)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = group_norm(out_width, num_groups)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.skip = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(residual)))


class Attention(nn.Module):
    """x + single-head attention over all places, without positions."""

    def __init__(self, width: int, num_groups: int):
        super().__init__()
        self.norm = group_norm(width, num_groups)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = rearrange(self.norm(x), "b c rows cols -> b 1 (rows cols) c")
        mixed = F.scaled_dot_product_attention(self.query(places), self.key(places), self.value(places))
        return x + rearrange(self.out(mixed), "b 1 (rows cols) c -> b c rows cols", cols=x.shape[-1])


class Downsample(nn.Conv2d):
    """Halves the resolution; zeros are padded below and to the right only."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the resolution by repeating every place, then smooths it."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


def build_middle(width: int, config: VQGANConfig) -> nn.Sequential:
    attention = Attention(width, config.num_groups) if config.middle_attention else nn.Identity()
    return nn.Sequential(
        Block(width, width, config.num_groups), attention, Block(width, width, config.num_groups)
    )


def group_norm(width: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, width, eps=1e-6)
