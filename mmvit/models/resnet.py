"""Residual networks with GroupNorm and weight standardisation: BiT's ResNetV2 as a classifier (1912.11370),
and ResNetV1's order of layers as the stem of ViT's hybrids (2010.11929, section 3.1).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import FROM_DATA, OF_TRAINING, Config
from mmvit.core.hidden import HiddenLayers
from mmvit.hub import Pretrained
from mmvit.models.classification import classification_loss

GROUPS = 32  # of every GroupNorm
Epsilons = Literal["official", "timm"]  # whose epsilons a hybrid's stem has


class ResNetConfig(Config):
    """A convolutional classifier for images of any size. The defaults are BiT's R50x1."""

    kind: Literal["resnet"] = "resnet"
    image_size: int | tuple[int, int] = Field(224, json_schema_extra=OF_TRAINING)
    channels: int = Field(3, gt=0, json_schema_extra=OF_TRAINING)
    num_classes: int = Field(1000, gt=1, json_schema_extra=FROM_DATA)
    width: int = Field(64, gt=0, description="of the first stage's bottlenecks, a quarter of its output")
    depths: tuple[int, ...] = Field((3, 4, 6, 3), min_length=1, description="blocks of each stage")
    root: Literal["imagenet", "small"] = Field(
        "imagenet",
        description="first layer: 7x7 and pooling, down to a quarter of the size; or 3x3 at full size",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)

    @model_validator(mode="after")
    def _sizes_are_possible(self):
        if min(self.height_width) < 1:
            raise ValueError(f"image_size {self.image_size} has no pixels")
        if self.width % GROUPS:
            raise ValueError(
                f"width must be a multiple of the {GROUPS} groups of its norms, got {self.width}"
            )
        return self

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class ResNet(Pretrained, nn.Module):
    """pixels → logits, by convolutions alone (ResNetV2, 1603.05027, in BiT's form)."""

    config_class, kind = ResNetConfig, "resnet"

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        kernel, stride = (7, 2) if config.root == "imagenet" else (3, 1)
        self.root = StandardizedConv(config.channels, config.width, kernel, stride)
        self.stages, width = build_stages(config.width, config.width, config.depths, PreActivation)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.head = nn.Linear(width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) in [-1, 1] → (batch, 4 · last stage's width)."""
        if pixels.shape[1] != self.config.channels:
            raise ValueError(f"expected pixels with {self.config.channels} channels, got {pixels.shape[1]}")
        x = self.root(pixels)
        if self.config.root == "imagenet":
            x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        return F.relu(self.norm(self.stages(x))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) in [-1, 1] → logits (batch, num_classes)."""
        return self.head(self.features(pixels))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`classification_loss` of `batch["pixels"]` and `batch["labels"]`."""
        return classification_loss(self(batch["pixels"]), batch["labels"], self.config.label_smoothing)


class ResNetStem(nn.Module):
    """The hybrids' stem: ResNet-50 with the last stage's blocks moved to the third. Each place of its output,
    or each square of `patch` x `patch` places, becomes a token.

    Args:
        epsilons: the official code adds 1e-5 to a kernel's standard deviation and its norms have 1e-6; timm's
            port adds 1e-8 to the variance and its norms have 1e-5. Weights of one give wrong features in the
            other.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        root_width: int,
        depths: tuple[int, ...],
        patch: int = 1,
        epsilons: Epsilons = "official",
    ):
        super().__init__()
        block = partial(PostActivation, epsilons=epsilons)
        self.root, self.norm = conv_and_norm(channels, root_width, 7, 2, epsilons)
        self.stages, last = build_stages(root_width, root_width, depths, block)
        self.patch = patch
        self.proj = nn.Linear(last * patch**2, width)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) → (batch, rows · columns, width), in raster order."""
        x = F.relu(self.norm(self.root(pixels)))
        x = F.max_pool2d(pad_as_tensorflow(x, 3, 2, value=-torch.inf), 3, stride=2)
        x = F.unfold(self.stages(x), self.patch, stride=self.patch)
        return self.proj(x.transpose(1, 2))


def stem_places(patch_size: int, width: int, depths: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, rows and columns of the places from which a `ResNetStem` makes a token."""
    side = patch_size // stem_stride(depths)
    return 4 * width * 2 ** (len(depths) - 1), side, side


def stem_stride(depths: tuple[int, ...]) -> int:
    """Pixels along each side of one place in the output of a `ResNetStem` with these stages."""
    return 4 * 2 ** (len(depths) - 1)


class StandardizedConv(nn.Conv2d):
    """A convolution without bias whose kernels have mean 0 and variance 1 (weight standardisation,
    1903.10520).

    `same` pads as TensorFlow does, which is asymmetric at stride 2; `added` is an epsilon added to the
    standard deviation instead of one added to the variance.
    """

    def __init__(
        self, before: int, after: int, kernel: int, stride: int = 1, same: bool = False, added: float = 0.0
    ):
        padding = 0 if same else kernel // 2
        super().__init__(before, after, kernel, stride=stride, padding=padding, bias=False)
        self.same, self.added = same, added
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_as_tensorflow(x, self.kernel_size[0], self.stride[0])
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        scale = 1 / (variance.sqrt() + self.added) if self.added else torch.rsqrt(variance + 1e-8)
        weight = (self.weight - mean) * scale
        return F.conv2d(x, weight.to(x.dtype), None, self.stride, self.padding)


def pad_as_tensorflow(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads x for ⌈size / stride⌉ places; an odd row or column of padding goes below or to the right."""
    rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(x, padding, value=value)


class PreActivation(HiddenLayers):
    """A bottleneck with norm and ReLU before each convolution, and none after the sum (BiT)."""

    def __init__(self, before: int, inner: int, stride: int):
        super().__init__()
        after = 4 * inner
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, before), StandardizedConv(before, inner, 1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, inner), StandardizedConv(inner, inner, 3, stride)
        self.norm3, self.conv3 = nn.GroupNorm(GROUPS, inner), StandardizedConv(inner, after, 1)
        changes = stride > 1 or before != after
        self.shortcut = StandardizedConv(before, after, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(inner)
        inner = self.conv2(F.relu(self.norm2(self.conv1(inner))))
        return shortcut + self.conv3(F.relu(self.norm3(inner)))


class PostActivation(HiddenLayers):
    """A bottleneck with norms after its convolutions, as in the first residual networks (1512.03385)."""

    def __init__(self, before: int, inner: int, stride: int, epsilons: Epsilons = "official"):
        super().__init__()
        after = 4 * inner
        self.conv1, self.norm1 = conv_and_norm(before, inner, 1, 1, epsilons)
        self.conv2, self.norm2 = conv_and_norm(inner, inner, 3, stride, epsilons)
        self.conv3, self.norm3 = conv_and_norm(inner, after, 1, 1, epsilons)
        self.shortcut = None
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(*conv_and_norm(before, after, 1, stride, epsilons))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        inner = F.relu(self.norm1(self.conv1(x)))
        inner = F.relu(self.norm2(self.conv2(inner)))
        return F.relu(shortcut + self.norm3(self.conv3(inner)))


def conv_and_norm(
    before: int, after: int, kernel: int, stride: int, epsilons: Epsilons
) -> tuple[StandardizedConv, nn.GroupNorm]:
    """A convolution of a hybrid's stem and its norm."""
    is_official = epsilons == "official"
    convolution = StandardizedConv(before, after, kernel, stride, same=True, added=1e-5 * is_official)
    return convolution, nn.GroupNorm(GROUPS, after, eps=1e-6 if is_official else 1e-5)


def build_stages(
    before: int, width: int, depths: tuple[int, ...], block: Callable[..., nn.Module]
) -> tuple[nn.Sequential, int]:
    """Stages of `depths` blocks, each after the first at half the resolution and twice the width of the one
    before, and the width of their output."""
    stages = []
    for number, depth in enumerate(depths):
        inner = width * 2**number
        blocks = []
        for place in range(depth):
            blocks.append(block(before, inner, stride=2 if number and not place else 1))
            before = 4 * inner
        stages.append(nn.Sequential(*blocks))
    return nn.Sequential(*stages), before
