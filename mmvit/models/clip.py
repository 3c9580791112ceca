"""CLIP: an image encoder and a text encoder that map images and their captions close together
(2103.00020)."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from mmvit.config import FROM_DATA, OF_TRAINING, Config
from mmvit.core.positions import Positions
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.hub import Pretrained
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import PAD

MAX_SCALE = 100.0  # logits per cosine, as in the paper


class CLIPConfig(Config):
    """A classifier's configuration for `image`, whose head is not used, and a core for `text`."""

    kind: Literal["clip"] = "clip"
    image: ClassifierConfig = ClassifierConfig()
    text: TransformerConfig = TransformerConfig()
    vocab_size: int = Field(4096, gt=1, json_schema_extra=FROM_DATA)
    text_length: int = Field(32, gt=0, json_schema_extra=OF_TRAINING)
    embedding_width: int = Field(256, gt=0, description="of the space that images and captions share")
    temperature: float = Field(0.07, gt=0, description="initial value; it is learnt")

    @model_validator(mode="after")
    def _no_tanh_layer(self):
        if self.image.representation_width:
            raise ValueError("image.representation_width belongs to a classifier's head: remove it")
        return self


class CLIP(Pretrained, nn.Module):
    """pixels, caption ids → unit vectors, whose products say how well they match."""

    config_class, kind = CLIPConfig, "clip"

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        width = config.text.width
        self.image = Classifier(config.image)
        self.image.head = nn.Identity()
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        self.positions = Positions(
            "learned_1d", width, config.text.head_dim, 1 + config.text_length, grid=(0, 0)
        )
        self.text = Transformer(config.text)
        self.image_projection = projection(config.image.core.width, config.embedding_width)
        self.text_projection = projection(width, config.embedding_width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    @property
    def scale(self) -> Tensor:
        """Logits per cosine, 1 / temperature."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """pixels (batch, channels, height, width) in [-1, 1] → unit vectors (batch, embedding_width)."""
        return F.normalize(self.image_projection(self.image.features(pixels)).float(), dim=1)

    def embed_captions(self, caption_ids: Tensor) -> Tensor:
        """caption_ids (batch, text_length), padded → unit vectors (batch, embedding_width); padding has no
        effect.

        Raises:
            ValueError: for captions of another length.
        """
        if caption_ids.shape[1] != self.config.text_length:
            raise ValueError(
                f"expected captions of {self.config.text_length} tokens, got {caption_ids.shape[1]}"
            )
        tokens = self.text_embedding(caption_ids)
        x = self.positions.add(torch.cat([self.start.expand(len(tokens), -1, -1), tokens], dim=1))
        is_token = F.pad(caption_ids != PAD, (1, 0), value=True)
        x = self.text(x, mask=is_token[:, None, None, :])
        return F.normalize(self.text_projection(x[:, 0]).float(), dim=1)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of finding each image's caption, and each caption's image, in the batches of
        all processes. Images with the same caption all match it (UniCL, 2204.03610); when captions differ,
        this is CLIP's own loss.

        Returns:
            loss, and metrics: loss, `accuracy` of finding an image's caption, `temperature`.
        """
        ids = batch["caption_ids"]
        images, captions = self.embed_images(batch["pixels"]), self.embed_captions(ids)
        all_images, all_captions, all_ids = gather(images), gather(captions), gather(ids)
        matches = (ids[:, None] == all_ids[None]).all(-1).float()
        targets = matches / matches.sum(1, keepdim=True)
        with torch.autocast(images.device.type, enabled=False):
            image_logits = self.scale * images @ all_captions.T
            caption_logits = self.scale * captions @ all_images.T
        loss = (F.cross_entropy(image_logits, targets) + F.cross_entropy(caption_logits, targets)) / 2
        accuracy = matches.gather(1, image_logits.argmax(1, keepdim=True)).mean()
        metrics = {"loss": loss.detach(), "accuracy": accuracy, "temperature": 1 / self.scale.detach()}
        return loss, metrics


def projection(before: int, after: int) -> nn.Linear:
    layer = nn.Linear(before, after, bias=False)
    nn.init.normal_(layer.weight, std=before**-0.5)
    return layer


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes in rank order, with gradients to each process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    if rows.is_floating_point():
        return torch.cat(all_gather(rows.contiguous()))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
