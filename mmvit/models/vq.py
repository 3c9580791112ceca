"""Image tokenizer: pixels to a small grid of discrete codes and back (VQ-VAE, van den Oord et al. 2017).

The encoder looks at one patch (and, by choice, a margin around it) at a time, so that equal patches get equal codes wherever
they occur and whatever surrounds them: a generator then learns "the same picture with another skin tone" from a few codes.
The decoder looks far, since it has to resolve what the codes leave open.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.hub import Pretrained


class VQConfig(Config):
    """Shape of a `VQModel` and the weights of its losses."""

    kind_note: str = Field(default="", exclude=True)
    factor: int = Field(default=8, description="pixels per code, along each side")
    margin: int = Field(default=0, ge=0, description="pixels around its patch that a code's encoder sees")
    codebook_size: int = Field(default=1024, ge=2)
    code_width: int = Field(default=16, ge=2, description="dimensions of a code; few, so that none is left unused")
    encoder_width: int = 512
    encoder_depth: int = 2
    decoder_widths: tuple[int, ...] = (384, 256)
    decoder_depths: tuple[int, ...] = (3, 1)
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    revive_below: float = 0.01

    @model_validator(mode="after")
    def check_shape(self):
        if len(self.decoder_widths) != len(self.decoder_depths):
            raise ValueError(
                f"decoder_widths has {len(self.decoder_widths)} stages and decoder_depths {len(self.decoder_depths)}; "
                "give one depth for each width"
            )
        if self.factor % 2 ** (len(self.decoder_widths) - 1):
            raise ValueError(f"factor {self.factor} cannot be doubled {len(self.decoder_widths) - 1} times by the decoder")
        return self


class Codebook(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.register_buffer("sums", F.normalize(torch.randn(config.codebook_size, config.code_width), dim=-1))
        self.register_buffer("use", torch.zeros(config.codebook_size))

    def vectors(self) -> Tensor:
        return F.normalize(self.sums, dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.vectors())

    def nearest(self, vectors: Tensor) -> Tensor:
        return (vectors @ self.vectors().T).argmax(-1)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> Tensor:
        size = self.config.codebook_size
        counts = torch.bincount(codes, minlength=size).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        num = torch.tensor(float(len(codes)), device=vectors.device)
        if dist.is_initialized():
            for t in (counts, sums, num):
                dist.all_reduce(t)
        scale = size / num
        rate = 1 - self.config.codebook_decay
        self.use.lerp_(counts * scale, rate)
        self.sums.lerp_(sums * scale, rate)
        dead = self.use < self.config.revive_below
        error = 1 - (vectors * self.lookup(codes)).sum(-1)
        chosen = vectors[torch.multinomial(error.clamp_min(1e-6), size, replacement=True)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        self.sums.copy_(torch.where(dead[:, None], chosen * 0.1, self.sums))
        self.use.copy_(torch.where(dead, 0.1, self.use))
        return dead.float().mean()


class MLPBlock(nn.Module):
    def __init__(self, width: int, expansion: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.silu(self.expand(self.norm(x))))


class ConvBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, rows, columns, width)
        y = self.spread(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mix(F.silu(y))


def conv(inputs, outputs, x):
    pass


class Conv3x3(nn.Conv2d):
    """3x3 on channels-last."""

    def __init__(self, i, o):
        super().__init__(i, o, 3, padding=1)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fold(x: Tensor, r: int) -> Tensor:
    B, H, W, C = x.shape
    c = C // (r * r)
    return x.reshape(B, H, W, r, r, c).permute(0, 1, 3, 2, 4, 5).reshape(B, H * r, W * r, c)


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        window = config.factor + 2 * config.margin
        self.patch = nn.Linear(3 * window**2, config.encoder_width)
        self.blocks = nn.Sequential(*[MLPBlock(config.encoder_width) for _ in range(config.encoder_depth)])
        self.norm = nn.LayerNorm(config.encoder_width)
        self.head = nn.Linear(config.encoder_width, config.code_width)

    def forward(self, pixels: Tensor) -> Tensor:
        f, m = self.config.factor, self.config.margin
        if m:
            pixels = F.pad(pixels, (m, m, m, m), mode="replicate")
        x = pixels.unfold(2, f + 2 * m, f).unfold(3, f + 2 * m, f)  # B C h w k k
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3)
        x = self.patch(x)
        x = self.head(self.norm(self.blocks(x)))
        return F.normalize(x.float(), dim=-1)


class Decoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        layers = [Conv3x3(config.code_width, config.decoder_widths[0])]
        self.stages = nn.ModuleList()
        self.ups = nn.ModuleList()
        w = config.decoder_widths
        self.first = layers[0]
        for i, (width, depth) in enumerate(zip(w, config.decoder_depths)):
            self.stages.append(nn.Sequential(*[ConvBlock(width) for _ in range(depth)]))
            if i + 1 < len(w):
                self.ups.append(nn.Linear(width, 4 * w[i + 1]))
        self.rest = config.factor // 2 ** (len(w) - 1)
        self.norm = nn.LayerNorm(w[-1])
        self.head = Conv3x3(w[-1], 3 * self.rest**2)
        self.scale = math.sqrt(config.code_width)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.first(vectors * self.scale)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < len(self.ups):
                x = fold(self.ups[i](x), 2)
        x = fold(self.head(self.norm(x)), self.rest)
        return x.permute(0, 3, 1, 2)


class VQModel(Pretrained, nn.Module):
    config_class = VQConfig
    kind = "vq"

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
        factor = self.config.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise UserError(
                f"an image of {height}x{width} pixels has no grid of codes: the image tokenizer needs each side to be a "
                f"multiple of {factor}; resize it, or choose an image tokenizer with a smaller factor"
            )
        return height // factor, width // factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.grid(*pixels.shape[-2:])
        with torch.autocast(pixels.device.type, enabled=False):
            return self.codebook.nearest(self.encoder(pixels.float()))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.codebook_size):
            raise UserError(
                f"image codes run from {codes.min()} to {codes.max()}, but this image tokenizer has codes 0 to "
                f"{self.config.codebook_size - 1}; the codes were made by another tokenizer"
            )
        return self.decoder(self.codebook.lookup(codes)).float().clamp(-1, 1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        self.grid(*pixels.shape[-2:])
        z = self.encoder(pixels)
        codes = self.codebook.nearest(z.detach())
        e = self.codebook.lookup(codes)
        recon = self.decoder(z + (e - z).detach()).float()
        commit = (z - e).square().sum(-1).mean()
        error = recon - pixels
        l1, l2 = error.abs().mean(), error.square().mean()
        loss = l1 + l2 + self.config.commitment_weight * commit
        metrics = {"l1": l1.detach(), "l2": l2.detach(), "commitment": commit.detach()}
        if self.training:
            metrics["revived"] = self.codebook.update(z.detach().flatten(0, -2), codes.flatten())
        return loss, metrics
