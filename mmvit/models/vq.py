"""VQ image tokenizer: pixels to a small grid of discrete codes and back (VQ-VAE, 1711.00937).

The encoder sees one patch at a time, with a margin of a few pixels around it, so that equal patches get equal
codes wherever they are and whatever surrounds them: what two pictures have in common, a generator has to
learn once. The decoder sees far, because it has to settle what single codes leave open.
"""

import math
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.hub import Pretrained

REVIVED_USE = 0.1  # of a code when it is revived, where 1 is the average: its time to be chosen


class VQConfig(Config):
    """Shape of a `VQModel`, and how its codebook learns."""

    factor: int = Field(8, ge=1, description="pixels per code, along each side")
    margin: int = Field(2, ge=0, description="pixels around its patch that a code depends on, too")
    codebook_size: int = Field(1024, ge=2)
    code_width: int = Field(16, ge=2, description="dimensions of a code; few keep all in use")
    encoder_width: int = Field(256, ge=1)
    encoder_depth: int = Field(2, ge=0)
    decoder_widths: tuple[int, ...] = Field(
        (256, 128), min_length=1, description="of its stages; each has twice the resolution of the one before"
    )
    decoder_depths: tuple[int, ...] = Field((2, 3), description="residual blocks of each stage")
    commitment_weight: float = Field(0.25, ge=0)
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="of the averages that codes are made of")
    revive_below: float = Field(
        0.01, ge=0, lt=REVIVED_USE, description="a code is dead below this share of the average code's use"
    )

    @model_validator(mode="after")
    def _stages_fit(self):
        stages, depths = len(self.decoder_widths), len(self.decoder_depths)
        if stages != depths:
            raise ValueError(
                f"decoder_widths has {stages} stages, decoder_depths {depths}; give each stage a depth"
            )
        if self.factor % 2 ** (stages - 1):
            raise ValueError(
                f"factor {self.factor} is no multiple of {2 ** (stages - 1)}, as {stages} decoder stages need"
            )
        return self


class VQModel(Pretrained, nn.Module):
    """pixels ↔ codes. Any image whose sides are multiples of `factor` will do, whatever the training size."""

    config_class, kind = VQConfig, "vq"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.codebook = Codebook(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the codes of a `height` x `width` image.

        Raises:
            UserError: when a side is no multiple of the factor, or smaller.
        """
        factor = self.config.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise UserError(
                f"an image of {height}x{width} pixels cannot be cut into patches of {factor}x{factor}, one "
                f"for each code: resize it so that both sides are multiples of {factor}, or use an image "
                "tokenizer of another factor"
            )
        return height // factor, width // factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, height, width) in [-1, 1] → codes (batch, rows, columns), int64.

        Always computed in float32, so that the codes do not depend on autocast.

        Raises:
            UserError: as `grid` does.
        """
        self.grid(*pixels.shape[-2:])
        with torch.autocast(pixels.device.type, enabled=False):
            return self.codebook.nearest(self.encoder(pixels.float()))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (batch, rows, columns) → pixels (batch, 3, height, width) in [-1, 1], float32.

        Raises:
            UserError: when a code is not in the codebook.
        """
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.codebook_size):
            raise UserError(
                f"image codes from {codes.min()} to {codes.max()} do not fit this image tokenizer, which has "
                f"codes 0 to {self.config.codebook_size - 1}: decode them with the one that made them"
            )
        return self.decoder(self.codebook.vectors()[codes]).float().clamp(-1, 1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + L2 of the reconstruction of `batch["pixels"]`, plus commitment (1711.00937, equation 3).

        In training mode the codebook takes its step here, too.

        Raises:
            UserError: as `grid` does.
        """
        pixels = batch["pixels"]
        self.grid(*pixels.shape[-2:])
        encoded = self.encoder(pixels)  # (batch, rows, columns, code_width)
        codes = self.codebook.nearest(encoded.detach())
        quantized = self.codebook.vectors()[codes]
        straight_through = encoded + (quantized - encoded).detach()
        error = self.decoder(straight_through).float() - pixels
        l1, l2 = error.abs().mean(), error.square().mean()
        commitment = (encoded - quantized).square().sum(-1).mean()
        loss = l1 + l2 + self.config.commitment_weight * commitment
        metrics = {"l1": l1, "l2": l2, "commitment": commitment}
        if self.training:
            metrics |= self.codebook.update(encoded.detach().flatten(0, 2), codes.flatten())
        return loss, {name: value.detach() for name, value in metrics.items()}


class Codebook(nn.Module):
    """Unit vectors in few dimensions, compared by cosine (ViT-VQGAN, 2110.04627, section 3.2).

    A code is the direction of the moving average of the encoder's vectors that chose it (1711.00937, appendix
    A.1, on the sphere). One that hardly any vector chooses is dead, and is revived at a vector of the current
    batch, drawn in proportion to its distance from its code, as k-means++ draws its centres. At first
    most are dead: that is the start.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.decay, self.revive_below = config.codebook_decay, config.revive_below
        self.register_buffer(
            "sums", torch.randn(config.codebook_size, config.code_width)
        )  # of a code's vectors
        self.register_buffer("use", torch.zeros(config.codebook_size))  # 1 is the average code's

    def vectors(self) -> Tensor:
        """The codes, (codebook_size, code_width), each of length 1."""
        return F.normalize(self.sums, dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors (..., code_width) of length 1 → each one's nearest code, (...), compared in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() @ self.vectors().float().T).argmax(-1)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Moves `codes` (number,) to the `vectors` (number, code_width) that chose them; revives the dead.

        Under torch.distributed the vectors of all processes count, and their codebooks stay alike.

        Returns:
            metrics: the share of `dead_codes`, and the `perplexity` of the codes' moving use.
        """
        counts = torch.bincount(codes, minlength=len(self.use)).to(self.use.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.to(self.sums.dtype))
        distances = 1 - (vectors * self.vectors()[codes]).sum(-1)
        drawn = vectors[torch.multinomial(distances.clamp_min(1e-6), len(self.use), replacement=True)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(drawn, src=0)
        scale = len(self.use) / counts.sum()
        self.use.lerp_(counts * scale, 1 - self.decay)
        self.sums.lerp_(sums * scale, 1 - self.decay)
        dead = self.use < self.revive_below
        self.use.copy_(torch.where(dead, REVIVED_USE, self.use))
        self.sums.copy_(torch.where(dead[:, None], REVIVED_USE * drawn, self.sums))
        share = self.use / self.use.sum()
        return {"dead_codes": dead.float().mean(), "perplexity": torch.special.entr(share).sum().exp()}


class Encoder(nn.Module):
    """An MLP over each patch with its margin: pixels → unit vectors (batch, rows, columns, code_width)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        width = config.encoder_width
        self.factor, self.margin = config.factor, config.margin
        self.patch = nn.Linear(3 * (config.factor + 2 * config.margin) ** 2, width)
        self.blocks = nn.Sequential(*(MLPBlock(width) for _ in range(config.encoder_depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.code_width)

    def forward(self, pixels: Tensor) -> Tensor:
        window = self.factor + 2 * self.margin
        pixels = F.pad(pixels, [self.margin] * 4, mode="replicate")
        patches = pixels.unfold(2, window, self.factor).unfold(3, window, self.factor)
        x = self.patch(rearrange(patches, "b c rows cols y x -> b rows cols (c y x)"))
        x = self.head(self.norm(self.blocks(x)))
        return F.normalize(x.float(), dim=-1)


class Decoder(nn.Module):
    """Residual convolutions at low resolution: vectors (batch, rows, columns, code_width) → pixels."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.decoder_widths
        self.scale = math.sqrt(config.code_width)  # unit vectors have entries of 1 / scale
        self.rest = config.factor // 2 ** (len(widths) - 1)  # what the stages leave of the factor
        self.stem = Convolution(config.code_width, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
            for width, depth in zip(widths, config.decoder_depths, strict=True)
        )
        self.doubles = nn.ModuleList(nn.Linear(width, 4 * following) for width, following in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1])
        self.head = Convolution(widths[-1], 3 * self.rest**2)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.stages[0](self.stem(vectors * self.scale))
        for double, stage in zip(self.doubles, self.stages[1:], strict=True):
            x = stage(pixel_shuffle(double(x), 2))
        return rearrange(pixel_shuffle(self.head(self.norm(x)), self.rest), "b y x c -> b c y x")


class MLPBlock(nn.Module):
    """x + MLP(norm(x)), at every position by itself."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.silu(self.expand(self.norm(x))))


class ConvBlock(nn.Module):
    """x + Linear(SiLU(Conv3x3(norm(x)))); on a CPU with matrix units, faster than a depthwise convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = Convolution(width, width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.spread(self.norm(x))))


class Convolution(nn.Conv2d):
    """3x3 over (batch, rows, columns, channels): channels_last in memory, so that nothing is copied."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(batch, rows, columns, factor² · channels) → (batch, factor · rows, factor · columns, channels)."""
    return rearrange(x, "b r c (y x k) -> b (r y) (c x) k", y=factor, x=factor)
