"""Masked patch prediction, the ViT paper's self-supervision (2010.11929, appendix B.1.2): half of the patch
embeddings are corrupted, and the model predicts what was there."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier

BITS = 3  # per channel of a colour
CELLS = 4  # along each side of a patch, in the finer target

Target = Literal["mean_colour", "colour_grid", "pixels"]


class MaskedPatchesConfig(Config):
    """What is corrupted and what is predicted. The defaults are the paper's."""

    corrupted: float = Field(0.5, gt=0, le=1, description="share of patches that are corrupted")
    masked: float = Field(0.8, ge=0, le=1, description="share of these replaced by one learnt embedding")
    swapped: float = Field(0.1, ge=0, le=1, description="share replaced by another patch's; the rest stay")
    target: Target = Field(
        "mean_colour",
        description="a patch's mean colour in 3 bits per channel, that of each of 4x4 cells, or its pixels",
    )


class MaskedPatches(nn.Module):
    """Trains a classifier's stem, positions and core with a head of its own; the classifier's head is
    unused."""

    def __init__(self, classifier: Classifier, config: MaskedPatchesConfig):
        super().__init__()
        if config.masked + config.swapped > 1:
            raise UserError(
                f"masked and swapped must be at most 1 together, got {config.masked} and {config.swapped}"
            )
        shape = classifier.config
        if shape.stem != "patch":
            raise UserError(
                f"model.stem is {shape.stem!r}, in which patches see their neighbours' pixels, so masking "
                'would not hide them: use "patch"'
            )
        if shape.patch_dropout:
            raise UserError("model.patch_dropout leaves out patches that have to be predicted: set it to 0")
        if config.target == "colour_grid" and shape.patch_size % CELLS:
            raise UserError(
                f"patches of {shape.patch_size} pixels cannot be cut into {CELLS}x{CELLS} cells: set target "
                "to mean_colour"
            )
        self.config, self.classifier = config, classifier
        classifier.freeze_head()
        width, colours = shape.core.width, 2 ** (BITS * shape.channels)
        self.mask = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.mask, std=0.02)
        outputs = {
            "mean_colour": colours,
            "colour_grid": CELLS**2 * colours,
            "pixels": shape.channels * shape.patch_size**2,
        }
        self.predict = nn.Linear(width, outputs[config.target])

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per colour, or mean squared error per value, over the corrupted patches of
        `batch["pixels"]` (batch, channels, height, width) in [-1, 1].

        Returns:
            loss, and metrics: loss, and `accuracy` for colours.
        """
        pixels, classifier = batch["pixels"], self.classifier
        embedded, corrupted = self.corrupt(classifier.stem(pixels))
        tokens = classifier.tokens(embedded)[:, classifier.num_prefix :]
        predicted = self.predict(tokens[corrupted]).float()
        patches = patchify(pixels, classifier.config.patch_size)[
            corrupted
        ]  # (corrupted, channels, side, side)
        if self.config.target == "pixels":
            loss = F.mse_loss(predicted, patches.flatten(1))
            return loss, {"loss": loss.detach()}
        cells = 1 if self.config.target == "mean_colour" else CELLS
        targets = mean_colours(patches, cells)  # (corrupted, cells²)
        predicted = predicted.unflatten(1, (cells**2, -1))
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten())
        return loss, {"loss": loss.detach(), "accuracy": (predicted.argmax(-1) == targets).float().mean()}

    def corrupt(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """embedded (batch, patches, width) → the same with the same number of random patches corrupted in
        each image, and which they are, boolean (batch, patches)."""
        batch, patches, _ = embedded.shape
        number = max(1, round(patches * self.config.corrupted))
        rank = torch.rand(batch, patches, device=embedded.device).argsort(1).argsort(1)
        corrupted = rank < number
        fate = torch.rand(batch, patches, device=embedded.device)
        masked = corrupted & (fate < self.config.masked)
        swapped = corrupted & ~masked & (fate < self.config.masked + self.config.swapped)
        shift = torch.randint(1, max(2, patches), (batch, patches), device=embedded.device)
        other = (torch.arange(patches, device=embedded.device) + shift) % patches  # of the same image
        others = embedded.gather(1, other.unsqueeze(-1).expand_as(embedded))
        result = torch.where(masked.unsqueeze(-1), self.mask.to(embedded.dtype), embedded)
        return torch.where(swapped.unsqueeze(-1), others, result), corrupted


def patchify(pixels: Tensor, size: int) -> Tensor:
    """pixels (batch, channels, height, width) → patches (batch, rows · columns, channels, size, size)."""
    return rearrange(pixels, "b c (rows p) (cols q) -> b (rows cols) c p q", p=size, q=size)


def mean_colours(patches: Tensor, cells: int) -> Tensor:
    """patches (number, channels, side, side) in [-1, 1] → the mean colour of each of cells x cells parts, 3
    bits per channel as one number: (number, cells²), the first channel's bits highest."""
    mean = F.adaptive_avg_pool2d(patches.float(), cells).flatten(2)  # (number, channels, cells²)
    levels = ((mean + 1) / 2 * 2**BITS).long().clamp(0, 2**BITS - 1)
    places = 2 ** (BITS * torch.arange(patches.shape[1] - 1, -1, -1, device=patches.device))
    return (levels * places[:, None]).sum(1)
