"""MAE, "Masked autoencoders are scalable vision learners" (2111.06377): the core reads a quarter of the
patches, and a small decoder paints the others."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.core.positions import Positions
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier
from mmvit.models.masked_patches import cut


class MaskedAutoencoderConfig(Config):
    """The defaults are the paper's, for ViT-L; smaller decoders suit smaller cores."""

    masked: float = Field(0.75, gt=0, lt=1, description="share of the patches")
    decoder_width: int = Field(512, gt=0)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)
    normalized: bool = Field(True, description="each patch's pixels to mean 0 and variance 1, as the target")

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width {self.decoder_width} has to be a multiple of 4 and of decoder_heads "
                f"{self.decoder_heads}"
            )
        return self


class MaskedAutoencoder(nn.Module):
    """A classifier's stem, positions and core, which learn, and a decoder that is thrown away afterwards. The
    classifier's head has no part in it."""

    def __init__(self, classifier: Classifier, config: MaskedAutoencoderConfig):
        super().__init__()
        shape = classifier.config
        if shape.patch_dropout:
            raise UserError("model.patch_dropout is MAE's own matter (mae.masked): set it to 0")
        if shape.stem != "patch":
            raise UserError(
                f"the convolutions of model.stem {shape.stem!r} would tell MAE of the patches that it hides: "
                "use patch"
            )
        if shape.positions == "relative_1d":
            raise UserError("MAE leaves gaps between places, which relative_1d positions lack: use others")
        self.config, self.classifier = config, classifier
        classifier.freeze_head()
        width = config.decoder_width
        patches = shape.grid[0] * shape.grid[1]
        self.kept = max(1, round(patches * (1 - config.masked)))
        if self.kept == patches:
            raise UserError(f"mae.masked {config.masked} of {patches} patches is none: raise it")
        self.embed = nn.Linear(shape.core.width, width)
        self.mask = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask, std=0.02)
        core = TransformerConfig(width=width, depth=config.decoder_depth, num_heads=config.decoder_heads)
        self.positions = Positions("sincos_2d", width, core.head_dim, classifier.num_prefix, shape.grid)
        self.decoder = Transformer(core)
        self.predict = nn.Linear(width, shape.channels * shape.patch_size**2)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per value over the masked patches of `batch["pixels"]` (batch, channels, height,
        width) in [-1, 1]; where targets are normalized, a prediction of zeros has 1 less the share of
        patches of one colour."""
        pixels, classifier = batch["pixels"], self.classifier
        x = classifier.embed(classifier.stem(pixels))
        chosen = classifier.choose_patches(len(x), self.kept, x.device)
        hidden = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, chosen, False)
        painted = self.paint(classifier.read(x, chosen), chosen)
        predicted = self.predict(painted[hidden]).float()
        patches = cut(pixels, classifier.config.patch_size).flatten(2).float()
        if self.config.normalized:
            patches = normalize(patches)
        loss = F.mse_loss(predicted, patches[hidden[:, classifier.num_prefix :]])
        return loss, {"loss": loss.detach()}

    def paint(self, seen: Tensor, chosen: Tensor) -> Tensor:
        """What the decoder makes, (batch, all tokens, decoder width), of what the core says, (batch, kept,
        width), at the `chosen` places (batch, kept)."""
        seen = self.embed(seen)
        every = self.mask.to(seen.dtype).expand(len(seen), self.positions.length, -1)
        every = every.scatter(1, chosen.unsqueeze(-1).expand_as(seen), seen)
        return self.decoder(self.positions.add(every))


def normalize(patches: Tensor) -> Tensor:
    """patches (..., values), each to mean 0 and variance 1."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + 1e-6)
