"""DALL·E's discrete VAE: pixels ↔ one of 8192 codes for every 8×8 patch (2102.12092, section 2.1 and appendix
A).

The encoder gives a categorical distribution over the codes at every place. Training draws a relaxed sample of
it (Gumbel-softmax, 1611.01144) and maximises the evidence lower bound, with pixels under a logit-Laplace
likelihood. Architecture as in openai/DALL-E, which its weights fit (mmvit.interop.openai_dvae).
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from mmvit.config import IN_STEPS, Config
from mmvit.core.hidden import HiddenLayers
from mmvit.errors import UserError
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.quantizers import perplexity

NUM_GROUPS = 4  # of residual blocks; between them the resolution halves three times
SHARPNESS = 20.0  # of codes initialised from data: logits are minus half of it times squared distances
EPSILON = 0.1  # keeps pixel values away from the ends of (0, 1), where the logit is infinite


class DiscreteVAEConfig(Config):
    """Shape of a `DiscreteVAE`, and its schedules, counted in training passes. The defaults are DALL·E's."""

    kind: Literal["dvae"] = "dvae"
    codebook_size: int = Field(8192, ge=2)
    width: int = Field(
        256, ge=4, multiple_of=4, description="of the first group; the others are 2, 4 and 8 times as wide"
    )
    blocks_per_group: int = Field(2, ge=1)
    code_width: int = Field(128, ge=1, description="dimensions of the decoder's code embeddings")
    kl_weight: float = Field(6.6, ge=0, description="final weight of the KL divergence, β")
    kl_warmup: int = Field(
        5000, ge=0, description="passes over which β rises from 0", json_schema_extra=IN_STEPS
    )
    final_temperature: float = Field(1 / 16, gt=0, description="of the relaxation; it starts at 1")
    temperature_steps: int = Field(
        150_000, ge=0, description="passes over which the temperature falls", json_schema_extra=IN_STEPS
    )
    start_images: int = Field(
        0,
        ge=0,
        validation_alias=AliasChoices("start_images", "start_pictures"),  # the latter in older config.json
        description="training images among whose patches codes are spread before training; 0 for none",
    )


class DiscreteVAE(ImageTokenizer):
    """pixels ↔ codes at factor 8, for images whose sides are multiples of 8."""

    config_class, kind = DiscreteVAEConfig, "dvae"
    factor = 2 ** (NUM_GROUPS - 1)

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))  # training passes so far

    def code_vectors(self) -> Tensor:
        """The decoder's embedding of each code, (codebook_size, code_width)."""
        return self.decoder.stem.weight[:, :, 0, 0].T

    @torch.no_grad()
    def start_codes(self, pixels: Tensor) -> None:
        """Initialises the codes from patches of `pixels` (images, 3, height, width), which a short run would
        not find by itself: the encoder chooses the code nearest to a patch's features, and the decoder embeds
        similar codes similarly. Patches are drawn as k-means++ draws centres (Arthur and Vassilvitskii 2007).

        Raises:
            UserError: when all patches are alike.
        """
        mapped = map_pixels((pixels + 1) / 2)
        parts = [self.encoder.features(part).flatten(2).transpose(1, 2) for part in mapped.split(64)]
        vectors = torch.cat(parts).flatten(0, 1).float()  # (patches, width)
        middle = vectors.mean(0)
        spread = (vectors - middle).square().sum(1).mean().sqrt()
        if not spread > 0:
            raise UserError(f"all {len(vectors)} patches are alike: raise model.start_images")
        centres = kmeans_plus_plus((vectors - middle) / spread, self.config.codebook_size)
        head, stem = self.encoder.head, self.decoder.stem
        head.weight.copy_((SHARPNESS / spread * centres)[:, :, None, None])
        head.bias.copy_(-SHARPNESS * (centres @ middle / spread + centres.square().sum(1) / 2))
        mixing = torch.randn(centres.shape[1], self.config.code_width, device=centres.device)
        stem.weight.copy_((centres @ mixing).T[:, :, None, None])

    def codes_of(self, pixels: Tensor) -> Tensor:
        """The most likely codes."""
        return self.encoder(map_pixels((pixels + 1) / 2)).argmax(1)

    def pixels_of(self, codes: Tensor) -> Tensor:
        """φ⁻¹(sigmoid μ)."""
        x = F.embedding(codes, self.code_vectors()) + self.decoder.stem.bias
        location, _ = self.decoder.after_stem(x.permute(0, 3, 1, 2)).float().chunk(2, dim=1)
        return unmap_pixels(location.sigmoid()) * 2 - 1

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative evidence lower bound of `batch["pixels"]`, in nats per pixel and channel, with a weighted
        divergence.

        In training mode each pass advances the schedules of β and the temperature; in evaluation mode they
        stay, and the codes are the most likely ones.

        Returns:
            loss, and metrics: `nll`, the negative log-likelihood per pixel and channel; `kl`, nats per code;
            `perplexity` of the codes, averaged over the batch; `kl_weight`; `temperature`.

        Raises:
            UserError: as `grid` does.
        """
        config, pixels = self.config, batch["pixels"]
        self.grid(*pixels.shape[-2:])
        mapped = map_pixels((pixels + 1) / 2)
        logits = self.encoder(mapped).float()
        passes = int(self.passes)
        kl_weight = cosine(passes, config.kl_warmup, 0.0, config.kl_weight)
        temperature = cosine(passes, config.temperature_steps, 1.0, config.final_temperature)
        if self.training:
            relaxed = F.gumbel_softmax(logits, tau=temperature, dim=1)
            self.passes += 1
        else:
            relaxed = F.one_hot(logits.argmax(1), config.codebook_size).permute(0, 3, 1, 2).to(logits.dtype)
        location, log_scale = self.decoder(relaxed).float().chunk(2, dim=1)
        nll = -logit_laplace(mapped, location, log_scale).mean()
        divergence = kl_to_uniform(logits)  # (batch, rows, columns)
        loss = nll + kl_weight * divergence.sum() / pixels.numel()
        use = logits.softmax(1).mean((0, 2, 3))
        metrics = {
            "nll": nll.detach(),
            "kl": divergence.mean().detach(),
            "perplexity": perplexity(use).detach(),
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
        }
        return loss, metrics


def map_pixels(pixels: Tensor) -> Tensor:
    """φ: [0, 1] → [ε, 1 − ε]."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """φ⁻¹, clamped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace(values: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """The log density of `values` in (0, 1) whose logit is Laplace(location, exp(log_scale)) (appendix A.3):
    exp(−|logit x − μ| / b) / (2 b x (1 − x))."""
    distance = (values.logit() - location).abs()
    return -distance * torch.exp(-log_scale) - log_scale - math.log(2) - (values * (1 - values)).log()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence of softmax(logits), over dimension 1, from the uniform distribution, in nats."""
    log_shares = logits.log_softmax(1)
    return (log_shares.exp() * log_shares).sum(1) + math.log(logits.shape[1])


def cosine(step: int, num_steps: int, start: float, end: float) -> float:
    """A half cosine from `start` at step 0 to `end` at `num_steps`, then `end`."""
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def kmeans_plus_plus(vectors: Tensor, number: int) -> Tensor:
    """`number` of the `vectors` (patches, width), each drawn in proportion to its squared distance from the
    nearest one drawn before; with repetitions once all have been drawn."""
    distances = torch.full((len(vectors),), torch.inf, device=vectors.device)
    drawn = torch.randint(len(vectors), (1,), device=vectors.device)
    chosen = []
    for _ in range(number):
        chosen.append(vectors[drawn[0]])
        distances = torch.minimum(distances, (vectors - chosen[-1]).square().sum(1))
        drawn = torch.multinomial(distances if distances.any() else torch.ones_like(distances), 1)
    return torch.stack(chosen)


class Encoder(nn.Module):
    """Values (batch, 3, height, width) → logits (batch, codebook_size, rows, columns)."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        widths = [config.width * 2**group for group in range(NUM_GROUPS)]
        self.stem = convolution(3, config.width, 7)
        self.groups = build_groups([config.width, *widths], config.blocks_per_group, kernels=(3, 3, 3, 1))
        self.head = convolution(widths[-1], config.codebook_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The input of the layer that gives the logits, (batch, width, rows, columns)."""
        x = self.groups[0](self.stem(x))
        for group in self.groups[1:]:
            x = group(F.max_pool2d(x, 2))
        return F.relu(x)


class Decoder(nn.Module):
    """(Relaxed) one-hot codes (batch, codebook_size, rows, columns) → location and log scale of every pixel's
    channels, (batch, 6, height, width)."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        widths = [config.width * 2**group for group in reversed(range(NUM_GROUPS))]
        self.stem = convolution(config.codebook_size, config.code_width, 1)
        self.groups = build_groups(
            [config.code_width, *widths], config.blocks_per_group, kernels=(1, 3, 3, 3)
        )
        self.head = convolution(widths[-1], 6, 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.after_stem(self.stem(codes))

    def after_stem(self, x: Tensor) -> Tensor:
        x = self.groups[0](x)
        for group in self.groups[1:]:
            x = group(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.head(F.relu(x))


class Block(HiddenLayers):
    """identity + residual / (number of blocks)²: a ReLU before each of four convolutions, with a bottleneck
    of a quarter of the width and no normalisation."""

    def __init__(self, in_width: int, out_width: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        self.gain = gain
        inner = out_width // 4
        widths = (in_width, inner, inner, inner, out_width)
        self.skip = convolution(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.convolutions = nn.ModuleList(
            convolution(widths[place], widths[place + 1], kernel) for place, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.convolutions:
            residual = layer(F.relu(residual))
        return self.skip(x) + self.gain * residual


def build_groups(widths: list[int], blocks_per_group: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """One group for each width after the first, which is that of the input."""
    gain = 1 / (NUM_GROUPS * blocks_per_group) ** 2
    groups = nn.ModuleList()
    for before, after in pairwise(widths):
        sizes = [before] + [after] * blocks_per_group
        groups.append(
            nn.Sequential(
                *(Block(sizes[place], sizes[place + 1], kernels, gain) for place in range(blocks_per_group))
            )
        )
    return groups


def convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size, with weights from N(0, 1 / (in_channels · kernel²)) and zero
    biases."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(in_channels * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer
