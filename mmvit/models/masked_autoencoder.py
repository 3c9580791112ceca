"""MAE, "Masked autoencoders are scalable vision learners" (2111.06377): the core reads a quarter of the
patches, and a small decoder reconstructs the others."""

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
from mmvit.models.masked_patches import patchify


class MaskedAutoencoderConfig(Config):
    """Settings of MAE. The defaults are the paper's, for ViT-L; smaller cores need smaller decoders."""

    masked: float = Field(0.75, gt=0, lt=1, description="share of patches that are hidden")
    decoder_width: int = Field(512, gt=0)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)
    normalized: bool = Field(
        True, description="whether the target is each patch's pixels with mean 0 and variance 1"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width must be a multiple of 4 and of decoder_heads {self.decoder_heads}, got "
                f"{self.decoder_width}"
            )
        return self


class MaskedAutoencoder(nn.Module):
    """Trains a classifier's stem, positions and core with a decoder that is thrown away afterwards; the
    classifier's head is unused."""

    def __init__(self, classifier: Classifier, config: MaskedAutoencoderConfig):
        super().__init__()
        shape = classifier.config
        if shape.patch_dropout:
            raise UserError("MAE leaves out patches itself (mae.masked): set model.patch_dropout to 0")
        if shape.stem != "patch":
            raise UserError(
                f"model.stem is {shape.stem!r}, in which patches see their neighbours' pixels, so MAE could "
                'not hide them: use "patch"'
            )
        if shape.positions == "relative_1d":
            raise UserError("MAE leaves out patches, so relative_1d positions do not work: use another kind")
        self.config, self.classifier = config, classifier
        classifier.freeze_head()
        width = config.decoder_width
        patches = shape.grid[0] * shape.grid[1]
        self.kept = max(1, round(patches * (1 - config.masked)))
        if self.kept == patches:
            raise UserError(f"mae.masked {config.masked} hides none of {patches} patches: raise it")
        self.embed = nn.Linear(shape.core.width, width)
        self.mask = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask, std=0.02)
        core = TransformerConfig(width=width, depth=config.decoder_depth, num_heads=config.decoder_heads)
        self.positions = Positions("sincos_2d", width, core.head_dim, classifier.num_prefix, shape.grid)
        self.decoder = Transformer(core)
        self.predict = nn.Linear(width, shape.channels * shape.patch_size**2)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per value over the hidden patches of `batch["pixels"]` (batch, channels, height,
        width) in [-1, 1]. With normalised targets, predicting zeros gives 1 minus the share of patches of a
        single colour."""
        pixels, classifier = batch["pixels"], self.classifier
        x = classifier.embed(classifier.stem(pixels))
        chosen = classifier.choose_patches(len(x), self.kept, x.device)
        hidden = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, chosen, False)
        decoded = self.decode(classifier.read(x, chosen), chosen)
        predicted = self.predict(decoded[hidden]).float()
        patches = patchify(pixels, classifier.config.patch_size).flatten(2).float()
        if self.config.normalized:
            patches = normalize(patches)
        loss = F.mse_loss(predicted, patches[hidden[:, classifier.num_prefix :]])
        return loss, {"loss": loss.detach()}

    def decode(self, encoded: Tensor, chosen: Tensor) -> Tensor:
        """The decoder's output for all tokens (batch, tokens, decoder_width), from the core's output (batch,
        kept, width) for those at the `chosen` places (batch, kept)."""
        encoded = self.embed(encoded)
        tokens = self.mask.to(encoded.dtype).expand(len(encoded), self.positions.length, -1)
        tokens = tokens.scatter(1, chosen.unsqueeze(-1).expand_as(encoded), encoded)
        return self.decoder(self.positions.add(tokens))


def normalize(patches: Tensor) -> Tensor:
    """patches (..., values), each with mean 0 and variance 1."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + 1e-6)
