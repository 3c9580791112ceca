"""Quantisers: vectors of few dimensions → one of `codebook_size` codes, and back.

All three have the same interface. `quantizer(encoded)` returns the vectors of the chosen codes, through which
the gradient passes straight to the encoder, a loss to add, and metrics. `encode(encoded)` returns the codes,
`vectors()` the vector of every code; `scale` brings the entries of a vector to about 1. `encoded` is the
encoder's output, (batch, rows, columns, width).
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import Config

REVIVED_USE = 0.1  # use of a revived code, where 1 is the average: how long it has to be chosen

Quantized = tuple[Tensor, Tensor, dict[str, Tensor]]


class QuantizerConfig(Config):
    """The kind of quantiser, its number of codes, and how they learn.

    `vq` moves codes to the vectors that choose them and revives dead codes. `simvq` learns one matrix over a
    frozen random codebook, so that all codes move together. `fsq` has no codebook; it rounds each dimension
    to one of a few levels.
    """

    quantizer: Literal["vq", "simvq", "fsq"] = "vq"
    codebook_size: int = Field(1024, ge=2)
    code_width: int = Field(
        16, ge=2, description="dimensions of a code; few keep all codes in use; not for fsq"
    )
    levels: tuple[int, ...] = Field((8, 8, 4, 4), min_length=1, description="of each dimension of fsq")
    commitment_weight: float = Field(0.25, ge=0, description="not for fsq")
    codebook_update: Literal["ema", "gradient"] = Field(
        "ema",
        description="how vq learns codes: as moving averages of the vectors that chose them, or by gradient",
    )
    codebook_decay: float = Field(
        0.95, ge=0, lt=1, description="of the moving averages of a code's vectors and use"
    )
    kmeans_steps: int = Field(0, ge=0, description="steps of k-means on the first batch that initialise vq")
    revive_below: float = Field(
        0.01, ge=0, lt=REVIVED_USE, description="share of the average code's use below which a code is dead"
    )

    @model_validator(mode="after")
    def _levels_make_the_codes(self):
        if self.quantizer == "fsq" and math.prod(self.levels) != self.codebook_size:
            raise ValueError(
                f"levels {self.levels} make {math.prod(self.levels)} codes, codebook_size is "
                f"{self.codebook_size}"
            )
        if min(self.levels) < 2:
            raise ValueError(f"levels must be at least 2 in each dimension, got {self.levels}")
        return self

    @property
    def quantized_width(self) -> int:
        """Dimensions of the encoder's output and the decoder's input."""
        return len(self.levels) if self.quantizer == "fsq" else self.code_width


class Codebook(nn.Module):
    """Unit vectors in few dimensions, compared by cosine (ViT-VQGAN, 2110.04627, section 3.2).

    A code is the direction of the moving average of the encoder's vectors that chose it (1711.00937, appendix
    A.1, on the sphere), or of a parameter that the loss pulls towards them (equation 3). A code that hardly
    any vector chooses is dead. It is revived at a vector of the current batch, drawn in proportion to the
    distance from its code, as k-means++ draws centres. Most codes are dead at first, so revival also
    initialises them, unless `kmeans_steps` does.
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.scale = math.sqrt(config.code_width)  # unit vectors have entries of 1 / scale
        sums = torch.randn(config.codebook_size, config.code_width)  # averages of codes' vectors
        self.learns = config.codebook_update == "gradient"
        if self.learns:
            self.sums = nn.Parameter(F.normalize(sums, dim=-1))
        else:
            self.register_buffer("sums", sums)
        self.register_buffer("use", torch.zeros(config.codebook_size))  # 1 is the average code's

    def forward(self, encoded: Tensor) -> Quantized:
        vectors = F.normalize(encoded.float(), dim=-1)
        if self.training and self.config.kmeans_steps and not self.use.any():
            self.start(vectors.detach().flatten(0, -2))
        codes = self.nearest(vectors.detach())
        quantized = self.vectors()[codes]
        commitment = (vectors - quantized.detach()).square().sum(-1).mean()
        loss = self.config.commitment_weight * commitment
        if self.learns:
            loss = loss + (vectors.detach() - quantized).square().sum(-1).mean()
        metrics = {"commitment": commitment.detach()}
        if self.training:
            metrics |= self.update(vectors.detach().flatten(0, -2), codes.flatten())
        return straight_through(vectors, quantized.detach()), loss, metrics

    def encode(self, encoded: Tensor) -> Tensor:
        return self.nearest(F.normalize(encoded.float(), dim=-1))

    def vectors(self) -> Tensor:
        """The codes, (codebook_size, code_width), each of length 1."""
        return F.normalize(self.sums.clone() if self.learns else self.sums, dim=-1)  # revival writes in place

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors (..., code_width) of length 1 → each one's nearest code, (...), compared in float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() @ self.vectors().float().T).argmax(-1)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Initialises the codes by k-means on the sphere over `vectors` (number, code_width). Under
        torch.distributed, all processes take the result of rank 0."""
        drawn = torch.randint(len(vectors), (len(self.use),), device=vectors.device)
        if len(vectors) >= len(self.use):
            drawn = torch.randperm(len(vectors), device=vectors.device)[: len(self.use)]
        self.sums.copy_(vectors[drawn])
        for _ in range(self.config.kmeans_steps):
            sums = torch.zeros_like(self.sums).index_add_(0, self.nearest(vectors), vectors)
            chosen = sums.any(-1, keepdim=True)
            self.sums.copy_(torch.where(chosen, F.normalize(sums, dim=-1), self.sums))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.sums, src=0)
        self.use.fill_(1)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Moves `codes` (number,) to the `vectors` (number, code_width) that chose them, unless the optimizer
        does, and revives dead codes.

        Under torch.distributed, the vectors of all processes count, and their codebooks stay equal.

        Returns:
            Metrics: the share of `dead_codes`, and the `perplexity` of the codes' moving average of use.
        """
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.to(self.sums.dtype))
        distances = 1 - (vectors * self.vectors()[codes]).sum(-1)
        chances = distances.nan_to_num(1e-6).clamp_min(1e-6)  # an encoder with NaNs fails in the loss
        drawn = vectors[torch.multinomial(chances, len(self.use), replacement=True)]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.broadcast(drawn, src=0)
        scale = move_use(self.use, codes, self.config.codebook_decay)
        if not self.learns:
            self.sums.lerp_(sums * scale, 1 - self.config.codebook_decay)
        dead = self.use < self.config.revive_below
        self.use.copy_(torch.where(dead, REVIVED_USE, self.use))
        length = 1.0 if self.learns else REVIVED_USE
        self.sums.data.copy_(torch.where(dead[:, None], length * drawn, self.sums))  # hidden from autograd
        return {"dead_codes": dead.float().mean(), "perplexity": perplexity(self.use)}


class LinearCodebook(nn.Module):
    """SimVQ (2411.02038): frozen random vectors times one learnt matrix, which every chosen code moves, so
    that no code is left behind; compared by Euclidean distance."""

    scale = 1.0

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        frozen = torch.randn(config.codebook_size, config.code_width) * config.code_width**-0.5
        self.register_buffer("frozen", frozen)
        self.register_buffer("use", torch.ones(config.codebook_size))
        self.mix = nn.Linear(config.code_width, config.code_width, bias=False)
        nn.init.eye_(self.mix.weight)

    def forward(self, encoded: Tensor) -> Quantized:
        with torch.autocast(encoded.device.type, enabled=False):
            encoded = encoded.float()
            codes = self.encode(encoded)
            quantized = self.vectors()[codes]
        commitment = (encoded - quantized.detach()).square().sum(-1).mean()
        pull = (encoded.detach() - quantized).square().sum(-1).mean()
        metrics = {"commitment": commitment.detach()}
        if self.training:
            metrics |= track_use(self.use, codes.flatten(), self.config)
        loss = pull + self.config.commitment_weight * commitment
        return straight_through(encoded, quantized.detach()), loss, metrics

    @torch.no_grad()
    def encode(self, encoded: Tensor) -> Tensor:
        with torch.autocast(encoded.device.type, enabled=False):
            vectors = self.vectors().float()
            # |e − v|² without |e|², which is the same for all codes
            return (vectors.square().sum(-1) - 2 * encoded.float() @ vectors.T).argmin(-1)

    def vectors(self) -> Tensor:
        """The codes, (codebook_size, code_width), in float32."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.mix(self.frozen)


class FiniteScalar(nn.Module):
    """FSQ (2309.15505): each dimension is bounded and rounded to one of its levels, evenly spaced in [-1, 1];
    the levels are the digits of the code. No code can die, and there is no loss to add."""

    scale = 1.0

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        levels = torch.tensor(config.levels)
        place_values = torch.cumprod(torch.tensor([1, *config.levels[:-1]]), 0)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("place_values", place_values, persistent=False)
        self.register_buffer("use", torch.ones(config.codebook_size))

    def forward(self, encoded: Tensor) -> Quantized:
        bounded = self.bound(encoded.float())
        digits = straight_through(bounded, bounded.round())
        metrics = {}
        if self.training:
            metrics = track_use(self.use, self.number(digits.detach()).flatten(), self.config)
        return digits / (self.levels // 2), encoded.new_zeros(()), metrics

    @torch.no_grad()
    def encode(self, encoded: Tensor) -> Tensor:
        return self.number(self.bound(encoded.float()).round())

    def vectors(self) -> Tensor:
        """The codes, (codebook_size, dimensions), in [-1, 1]."""
        numbers = torch.arange(self.config.codebook_size, device=self.levels.device)
        digits = numbers[:, None] // self.place_values % self.levels
        return (digits - self.levels // 2) / (self.levels // 2)

    def bound(self, x: Tensor) -> Tensor:
        """x (..., dimensions) → numbers that round to -(levels // 2), ..., levels - 1 - levels // 2 (appendix
        A.1)."""
        half = (self.levels - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(x + torch.tan(offset / half)) * half - offset

    def number(self, digits: Tensor) -> Tensor:
        """Rounded digits (..., dimensions) → codes (...), int64."""
        return ((digits.round().nan_to_num().long() + self.levels // 2) * self.place_values).sum(-1)


QUANTIZERS = {"vq": Codebook, "simvq": LinearCodebook, "fsq": FiniteScalar}


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, with the gradient going to `value` (1308.3432)."""
    return value + (quantized - value).detach()


def move_use(use: Tensor, codes: Tensor, decay: float) -> Tensor:
    """Moves the average `use` of every code, where 1 is the average code's, towards its share of `codes`
    (number,) in all processes; returns the factor from counts to use."""
    counts = torch.bincount(codes, minlength=len(use)).to(use.dtype)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    scale = len(use) / counts.sum()
    use.lerp_(counts * scale, 1 - decay)
    return scale


@torch.no_grad()
def track_use(use: Tensor, codes: Tensor, config: QuantizerConfig) -> dict[str, Tensor]:
    """`move_use` and the metrics of `Codebook.update`, for quantisers that need no revival."""
    move_use(use, codes, config.codebook_decay)
    dead = use < config.revive_below
    return {"dead_codes": dead.float().mean(), "perplexity": perplexity(use)}


def perplexity(use: Tensor) -> Tensor:
    """exp(entropy) of the distribution proportional to `use`."""
    return torch.special.entr(use / use.sum()).sum().exp()
