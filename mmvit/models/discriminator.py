"""PatchGAN, a discriminator that judges each patch of an image (pix2pix, 1611.07004, section 3.2.2)."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.errors import UserError

KERNEL, PADDING, SLOPE = 4, 1, 0.2


class PatchDiscriminator(nn.Module):
    """pixels → a logit for each patch, above 0 where it looks real.

    `num_layers` convolutions halve the resolution, and two more keep it except for one pixel; widths double
    from `width` up to eight times. A logit depends on its patch (70 pixels with 3 layers) and, through the
    normalisation, on means over the whole image. It differs from taming-transformers' discriminator in two
    ways:

    - Group instead of batch normalisation, so that the judgement of an image does not depend on its batch or
      the number of processes.
    - Convolutions with an equalised learning rate, so that it can learn at a tokenizer's rate. Without it, at
      3e-3, its output is constant after 20 steps, and its gradient drowns the tokenizer's in clipping.

    Args:
        width: a multiple of 4.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        super().__init__()
        self.num_layers = num_layers
        widths = [width * min(2**layer, 8) for layer in range(num_layers + 1)]
        self.stem = Convolution(3, width, stride=2)
        strides = [2] * (num_layers - 1) + [1]
        self.layers = nn.ModuleList(
            Convolution(*pair, stride) for pair, stride in zip(pairwise(widths), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(32, after // 4), after) for after in widths[1:])
        self.head = Convolution(widths[-1], 1, stride=1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the logits of a `height` x `width` image.

        Raises:
            UserError: when the image is too small for any.
        """
        rows, columns = ((side >> self.num_layers) - 2 for side in (height, width))
        if min(rows, columns) < 1:
            raise UserError(
                f"an image of {height}x{width} pixels is too small for a discriminator of {self.num_layers} "
                f"layers, which needs {3 << self.num_layers} on each side: use larger images or fewer layers"
            )
        return rows, columns

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, height, width) → logits (batch, 1, rows, columns), float32.

        Raises:
            UserError: as `grid` does.
        """
        self.grid(*pixels.shape[-2:])
        x = F.leaky_relu(self.stem(pixels), SLOPE)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), SLOPE)
        return self.head(x).float()


class Convolution(nn.Conv2d):
    """A 4x4 convolution with an equalised learning rate: weights start from N(0, 1) and are scaled by 1 /
    √inputs in use, so that a step of Adam changes the output equally for any number of inputs (1710.10196,
    section 4.1)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, KERNEL, stride, PADDING)
        self.scale = (in_channels * KERNEL**2) ** -0.5
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)
