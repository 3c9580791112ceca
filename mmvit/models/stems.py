"""Stems, which turn pixels into tokens: flat patches as in ViT, a few convolutions, a small residual network,
or ResNet-50 as in ViT's hybrids (mmvit.models.resnet)."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmvit.core.hidden import HiddenLayers
from mmvit.models.resnet import Epsilons, ResNetStem, stem_stride

StemKind = Literal["patch", "conv", "residual", "resnet"]
SMALLEST_PATCH = {
    "patch": 1,
    "conv": 2,
    "residual": 4,
}  # of each kind; stems of convolutions need a power of two


class PatchStem(nn.Module):
    """Cuts pixels into patches and projects each with one matrix (2010.11929, §3.1)."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) → (batch, rows · columns, width), in raster order."""
        patches = rearrange(
            pixels,
            "batch channels (rows p) (columns q) -> batch (rows columns) (channels p q)",
            p=self.patch_size,
            q=self.patch_size,
        )
        return self.proj(patches)


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2 down to one vector per patch, then a 1×1 (Xiao et al., 2106.14881).

    Widths double from layer to layer up to `width`. A LayerNorm at each position replaces batch
    normalisation, so that a token does not depend on the other images of the batch.
    """

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [channels] + [width // 2 ** (halvings - 1 - i) for i in range(halvings)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(after, eps=1e-6) for after in widths[1:])
        self.activation = nn.GELU()
        self.proj = nn.Linear(widths[-1], width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) → (batch, rows · columns, width), in raster order."""
        x = pixels
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x).movedim(1, -1)).movedim(-1, 1)
            x = self.activation(x)
        return self.proj(rearrange(x, "batch width rows columns -> batch (rows columns) width"))


class ResidualStem(nn.Module):
    """A small residual network before the core, as in the paper's hybrids (2010.11929, section 3.1).

    Each stage is a 3×3 convolution of stride 2 followed by `blocks[stage]` residual blocks; the last stage
    has one vector per patch. Widths start at `stem_width` and double up to `width`. Because of batch
    normalisation, in training a token depends on the other images in this process's part of the batch.
    """

    def __init__(self, patch_size: int, channels: int, width: int, stem_width: int, blocks: tuple[int, ...]):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [stem_width, *(width // 2**i for i in reversed(range(halvings - 1)))]
        self.first = convolution(channels, stem_width, stride=2)
        layers: list[nn.Module] = [ResidualBlock(stem_width) for _ in range(blocks[0])]
        for (before, after), depth in zip(pairwise(widths), blocks[1:], strict=True):
            layers += [Reduction(before, after), *(ResidualBlock(after) for _ in range(depth))]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.proj = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) → (batch, rows · columns, width), in raster order."""
        x = self.first(pixels.contiguous(memory_format=torch.channels_last))
        x = self.norm(self.layers(x))
        return self.proj(rearrange(x, "batch width rows columns -> batch (rows columns) width"))


class Reduction(HiddenLayers):
    """Norm, ReLU, and a convolution that halves the resolution."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm2d(before), convolution(before, after, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.relu(self.norm(x)))


class ResidualBlock(HiddenLayers):
    """x + two 3×3 convolutions, each after norm and ReLU (1603.05027)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.convolution1, self.convolution2 = convolution(width, width), convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.convolution1(F.relu(self.norm1(x)))
        return x + self.convolution2(F.relu(self.norm2(inner)))


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def build_stem(
    kind: StemKind,
    patch_size: int,
    channels: int,
    width: int,
    stem_width: int = 64,
    stem_blocks: tuple[int, ...] = (2, 1),
    epsilons: Epsilons = "official",
) -> nn.Module:
    if kind == "resnet":
        squares = patch_size // stem_stride(stem_blocks)
        return ResNetStem(channels, width, stem_width, stem_blocks, squares, epsilons)
    if kind == "residual":
        return ResidualStem(patch_size, channels, width, stem_width, stem_blocks)
    return (PatchStem if kind == "patch" else ConvStem)(patch_size, channels, width)
