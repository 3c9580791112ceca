"""From pixels to tokens: flat patches as in ViT, or a short stack of convolutions."""

from itertools import pairwise
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

StemKind = Literal["patch", "conv"]


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
    """3×3 convolutions of stride 2 down to one vector a patch, then a 1×1 (Xiao et al., 2106.14881).

    Widths double from layer to layer and end at `width`; batch normalisation is replaced by a
    per-position LayerNorm, so a token does not depend on the other images of the batch.
    """

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size < 2 or 2**halvings != patch_size:
            raise ValueError(
                f"a convolutional stem needs a patch size that is a power of two, got {patch_size}"
            )
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


def build_stem(kind: StemKind, patch_size: int, channels: int, width: int) -> nn.Module:
    return (PatchStem if kind == "patch" else ConvStem)(patch_size, channels, width)
