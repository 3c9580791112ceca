"""The ViT classifier: a stem turns an image into tokens, the shared core reads them, and a linear head
predicts the class (2010.11929)."""

from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import FROM_DATA, OF_TRAINING, Config
from mmvit.core.dropout import Dropout
from mmvit.core.positions import (
    NO_POSITIONS,
    LayerPositions,
    PositionKind,
    Positions,
    RelativePositions,
    check_widths,
    take,
)
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.hub import Pretrained
from mmvit.models.classification import classification_loss
from mmvit.models.resnet import GROUPS, Epsilons, stem_stride
from mmvit.models.stems import SMALLEST_PATCH, StemKind, build_stem


class ClassifierConfig(Config):
    """A classifier of `image_size` (pixels, or (height, width)) images into `num_classes`."""

    kind: Literal["vit"] = "vit"
    image_size: int | tuple[int, int] = Field(224, json_schema_extra=OF_TRAINING)
    patch_size: int = Field(16, gt=0)
    channels: int = Field(3, gt=0, json_schema_extra=OF_TRAINING)
    num_classes: int = Field(1000, gt=1, json_schema_extra=FROM_DATA)
    stem: StemKind = "patch"
    stem_width: int = Field(64, gt=0, description="of the first stage of a residual or resnet stem")
    stem_blocks: tuple[int, ...] = Field(
        (2, 1),
        description="blocks of each stage of that stem: residual has one stage per halving of the image, "
        "resnet begins at a quarter of the resolution",
    )
    stem_epsilons: Epsilons = Field(
        "official", description="whose epsilons a resnet stem has (mmvit.models.resnet)"
    )
    pooling: Literal["cls", "mean", "mean_beside_cls"] = Field(
        "cls",
        description="what the head reads: [CLS], or the mean of the patches, without or beside a [CLS]",
    )
    registers: int = Field(
        0, ge=0, description="learnt tokens that only the core uses, as scratch space (2309.16588)"
    )
    norm_after_pooling: bool = Field(
        False, description="whether the last norm follows the pooling of a mean, as in timm, or precedes it"
    )
    representation_width: int | None = Field(
        None, gt=0, description="width of a tanh layer before the head, as in the paper's pre-training"
    )
    positions: Literal[*get_args(PositionKind), "relative_1d"] = "learned_1d"
    positions_at: Literal["stem", "every_layer", "shared"] = Field(
        "stem",
        description="where positions are added: before the first block, or before every block, with vectors "
        "of its own or shared (Table 8); rotary and relative positions act in every layer anyway",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    patch_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of patches left out in training",
        json_schema_extra=OF_TRAINING,
    )
    core: TransformerConfig = TransformerConfig()

    @model_validator(mode="after")
    def _patches_tile_the_image(self):
        if min(self.height_width) < 1:
            raise ValueError(f"image_size {self.image_size} has no pixels")
        if any(side % self.patch_size for side in self.height_width):
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        self._check_positions()
        if self.stem == "resnet":
            self._check_resnet()
            return self
        smallest, is_power_of_two = SMALLEST_PATCH[self.stem], self.patch_size.bit_count() == 1
        if self.stem != "patch" and not (is_power_of_two and self.patch_size >= smallest):
            raise ValueError(
                f"stem {self.stem!r} needs a patch_size that is a power of two, {smallest} or more; got "
                f"{self.patch_size}"
            )
        if self.stem == "residual" and 2 ** len(self.stem_blocks) != self.patch_size:
            raise ValueError(
                f"stem_blocks must have {self.patch_size.bit_length() - 1} numbers, one per halving down to "
                f"patches of {self.patch_size}, got {self.stem_blocks}"
            )
        return self

    def _check_positions(self) -> None:
        if self.positions in ("none", "rotary_2d", "relative_1d") and self.positions_at != "stem":
            raise ValueError(f"positions {self.positions!r} are not added to tokens: remove positions_at")
        check_widths(self.positions, self.core.width, self.core.head_dim)
        if self.positions == "relative_1d" and self.patch_dropout:
            raise ValueError("relative_1d positions do not work with patch_dropout, which leaves gaps")

    def _check_resnet(self) -> None:
        stride = stem_stride(self.stem_blocks)
        if not self.stem_blocks or self.patch_size % stride:
            raise ValueError(
                f"patch_size must be a multiple of {stride}, to which a resnet stem of stem_blocks "
                f"{self.stem_blocks} reduces the image, got {self.patch_size}"
            )
        if self.stem_width % GROUPS:
            raise ValueError(
                f"stem_width of a resnet stem must be a multiple of the {GROUPS} groups of its norms, got "
                f"{self.stem_width}"
            )

    @property
    def has_class_token(self) -> bool:
        return self.pooling in ("cls", "mean_beside_cls")

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.height_width[0] // self.patch_size, self.height_width[1] // self.patch_size


class Classifier(Pretrained, nn.Module):
    """pixels → logits. Its `core` can be exchanged with that of a generator of the same
    `TransformerConfig`."""

    config_class, kind = ClassifierConfig, "classifier"

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        width = config.core.width
        self.stem = build_stem(
            config.stem,
            config.patch_size,
            config.channels,
            width,
            config.stem_width,
            config.stem_blocks,
            config.stem_epsilons,
        )
        self.num_prefix = config.has_class_token + config.registers
        if config.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.registers:
            self.registers = nn.Parameter(torch.empty(1, config.registers, width))
            nn.init.normal_(self.registers, std=0.02)
        relative = config.positions == "relative_1d"
        kind = "none" if relative else config.positions
        places = (kind, width, config.core.head_dim, self.num_prefix, config.grid)
        self.positions = Positions(*places)
        others = config.core.depth - 1 if config.positions_at == "every_layer" else 0
        self.layer_positions = nn.ModuleList(Positions(*places) for _ in range(others))
        self.relative = None
        if relative:
            self.relative = RelativePositions(config.core.depth, self.positions.length, config.core.head_dim)
        self.dropout = Dropout(config.core.dropout)
        self.core = Transformer(config.core)
        if config.representation_width:
            self.representation = nn.Linear(width, config.representation_width)
        self.head = nn.Linear(config.representation_width or width, config.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) in [-1, 1] → the head's input, (batch, width) or (batch,
        representation_width).

        Raises:
            ValueError: for pixels of another size than the configuration's.
        """
        expected = (self.config.channels, *self.config.height_width)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"expected pixels of shape {expected}, got {tuple(pixels.shape[1:])}")
        x = self.tokens(self.stem(pixels), normalized=not self.config.norm_after_pooling)
        x = x[:, 0] if self.config.pooling == "cls" else x[:, self.num_prefix :].mean(1)
        if self.config.norm_after_pooling:
            x = self.core.norm(x)
        return self.representation(x).tanh() if self.config.representation_width else x

    def tokens(self, patches: Tensor, normalized: bool = True) -> Tensor:
        """The stem's output (batch, rows · columns, width) → the core's output for [CLS] and registers, if
        any, and the patches, (batch, prefix + patches, width); in training, without the patches that patch
        dropout leaves out."""
        x, chosen = self.embed(patches), None
        if self.training and self.config.patch_dropout:
            kept = max(1, round(patches.shape[1] * (1 - self.config.patch_dropout)))
            chosen = self.choose_patches(len(x), kept, x.device)
        return self.read(x, chosen, normalized)

    def embed(self, patches: Tensor) -> Tensor:
        """The stem's output (batch, rows · columns, width) with [CLS] and registers, if any, in front, and
        with positions added."""
        parts = [patches]
        if self.config.registers:
            parts.insert(0, self.registers.to(patches.dtype).expand(len(patches), -1, -1))
        if self.config.has_class_token:
            parts.insert(0, self.cls_token.to(patches.dtype).expand(len(patches), -1, -1))
        return self.dropout(self.positions.add(torch.cat(parts, dim=1)))

    def choose_patches(self, batch: int, kept: int, device: torch.device) -> Tensor:
        """The places (batch, prefix + kept) of [CLS], registers and a random choice of patches for each image
        (PatchDropout, 2208.07220): less work for the core, and an augmentation."""
        patches = self.config.grid[0] * self.config.grid[1]
        chosen = torch.rand(batch, patches, device=device).argsort(1)[:, :kept] + self.num_prefix
        prefix = torch.arange(self.num_prefix, device=device).expand(batch, -1)
        return torch.cat([prefix, chosen], dim=1)

    def read(self, x: Tensor, chosen: Tensor | None = None, normalized: bool = True) -> Tensor:
        """The core's output for embedded tokens x (batch, tokens, width), or for those at the `chosen` places
        (batch, kept) alone."""
        positions = self.positions_in_layers()
        if chosen is not None:
            x = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            positions = take(positions, chosen)
        return self.core(x, positions=positions, normalized=normalized)

    def positions_in_layers(self) -> LayerPositions | list[LayerPositions]:
        """What each of the core's layers does with the positions of all tokens; `embed` has added them
        once."""
        if self.relative is not None:
            return self.relative.in_layers()
        if self.config.positions_at == "stem":
            return self.positions.in_layers(0, self.positions.length)
        if self.config.positions_at == "shared":
            vectors = [self.positions.vectors()] * (self.config.core.depth - 1)
        else:
            vectors = [positions.vectors() for positions in self.layer_positions]
        return [NO_POSITIONS, *map(LayerPositions, vectors)]

    def freeze_head(self) -> None:
        """Excludes the layers after the core from training, for objectives with a head of their own."""
        for part in ("head", "representation"):
            if hasattr(self, part):
                getattr(self, part).requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) in [-1, 1] → logits (batch, num_classes)."""
        return self.head(self.features(pixels))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`classification_loss` of `batch["pixels"]` and `batch["labels"]`."""
        return classification_loss(self(batch["pixels"]), batch["labels"], self.config.label_smoothing)
