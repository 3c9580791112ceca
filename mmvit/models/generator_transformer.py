"""A generator of image codes from captions, both in one sequence: in raster order, each code predicted from
those before it (DALL·E, 2102.12092), or in any order, hidden codes predicted from all others (MaskGIT,
2202.04200)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmvit.config import FROM_DATA, OF_TRAINING, Config
from mmvit.core.attention import KeyValueCache
from mmvit.core.dropout import Dropout
from mmvit.core.masks import Sparse, causal, prefix, sparse_causal
from mmvit.core.positions import PositionKind, Positions
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.hub import Pretrained
from mmvit.models.hidden_codes import hidden_loss, hide_by_codes, hide_for_training

PAD = 0  # the text tokenizer's padding id; a caption of padding alone is the unconditional one


class GeneratorConfig(Config):
    """A generator of `grid` = (rows, columns) image codes from captions of up to `text_length` tokens.

    `order` is how codes are predicted:

    - `raster`: each from the caption and the codes before it.
    - `any`: any set of codes from the caption and any set of others, so that an image takes a few forwards
      instead of one per code. Training hides random codes behind a mask token.

    `attention` has four kinds:

    - `prefix`: caption tokens see each other in both directions. They cannot be predicted then, so
      `text_loss_weight` must be 0. Codes see the caption and, in raster order, the codes before them; in any
      order all codes. Captions do not see codes, so that they are read once per image.
    - `full`, for any order: every token sees every other, as in a classifier.
    - `causal` over the whole sequence, for raster order.
    - `dalle`, for raster order: codes see the caption, and each other as in DALL·E's layers: by row, by
      column, and by convolution in the last layer.

    The defaults, with SwiGLU and some dropout, were chosen by benchmarks/modern_generator.py. DALL·E weights
    the losses of caption and codes 1 : 7.
    """

    vocab_size: int = Field(4096, gt=1, json_schema_extra=FROM_DATA)
    text_length: int = Field(32, gt=0, json_schema_extra=OF_TRAINING)
    codebook_size: int = Field(1024, gt=1, json_schema_extra=FROM_DATA)
    grid: tuple[int, int] = Field((8, 8), json_schema_extra=FROM_DATA)
    order: Literal["raster", "any"] = "raster"
    attention: Literal["causal", "prefix", "dalle", "full"] = "prefix"
    convolution: int = Field(
        11, gt=0, description="side of the square of codes seen in the last layer of `dalle`"
    )
    positions: PositionKind = "learned_2d"
    text_loss_weight: float = Field(0.0, ge=0)
    image_loss_weight: float = Field(7.0, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    code_noise: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    label_smoothing: float = Field(0.0, ge=0, lt=1, json_schema_extra=OF_TRAINING)
    core: TransformerConfig = TransformerConfig()

    def weigh(self, text_loss: Any, image_loss: Any) -> Any:
        """The weighted mean of both losses."""
        total = self.text_loss_weight + self.image_loss_weight
        return (self.text_loss_weight * text_loss + self.image_loss_weight * image_loss) / total

    @model_validator(mode="after")
    def _attention_fits_the_order(self):
        fitting = ("full", "prefix") if self.order == "any" else ("prefix", "causal", "dalle")
        if self.attention not in fitting:
            choices = " or ".join(repr(kind) for kind in fitting)
            raise ValueError(
                f"order = {self.order!r} needs attention = {choices}, got attention = {self.attention!r}"
            )
        return self

    @model_validator(mode="after")
    def _prefix_captions_are_not_predicted(self):
        if self.attention in ("prefix", "full") and self.text_loss_weight > 0:
            advice = ", or attention = 'causal'" if self.order == "raster" else ""
            raise ValueError(
                f"with attention = {self.attention!r} the caption sees itself and cannot be predicted: set "
                f"text_loss_weight = 0{advice}"
            )
        return self

    @model_validator(mode="after")
    def _convolution_fits(self):
        if self.attention == "dalle" and self.convolution % 2 == 0:
            raise ValueError(f"convolution must be odd, a square around each code, got {self.convolution}")
        is_set = "grid" in self.model_fields_set  # otherwise the data determine it later
        if self.attention == "dalle" and is_set and self.convolution > self.grid[1]:
            raise ValueError(
                f"convolution must be at most the grid's {self.grid[1]} columns, got {self.convolution}"
            )
        return self

    @property
    def num_codes(self) -> int:
        """The number of codes in one image."""
        return self.grid[0] * self.grid[1]


class GeneratorTransformer(Pretrained, nn.Module):
    """Caption ids and image codes → logits of the next ones. `mmvit.Generator` adds the tokenizers and draws
    images.

    The sequence is a start vector, `text_length` caption tokens, then the image codes. As in DALL·E, padding
    has a different embedding at every place, so captions need no mask. In raster order the logits of the
    first image code come from the caption's last place; in any order those of a code come from its own.
    """

    config_class, kind = GeneratorConfig, "generator"

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        width = config.core.width
        self.prefix_length = 1 + config.text_length
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.padding = nn.Parameter(torch.empty(config.text_length, width))
        self.code_embedding = nn.Embedding(config.codebook_size, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if config.order == "any" else None
        self.positions = Positions(
            config.positions, width, config.core.head_dim, self.prefix_length, config.grid
        )
        self.dropout = Dropout(config.core.dropout)
        self.core = Transformer(config.core)
        self.layer_kinds = dalle_layers(config.core.depth) if config.attention == "dalle" else []
        for kind in {*self.layer_kinds}:
            mask = sparse_causal(kind, self.prefix_length, config.grid, config.convolution)
            self.register_buffer(f"{kind}_mask", mask, persistent=False)
        self.image_head = nn.Linear(width, config.codebook_size)
        self.text_head = nn.Linear(width, config.vocab_size) if config.text_loss_weight else None
        for table in (self.start, self.padding, self.text_embedding.weight, self.code_embedding.weight):
            nn.init.normal_(table, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for head in (self.image_head, self.text_head):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    @torch.no_grad()
    def start_from_codebook(self, vectors: Tensor) -> None:
        """Initialises the code embeddings and the image head from the image tokenizer's codebook.

        Codes for similar patches then start with similar embeddings and logits, so that training on few
        images need not learn each code by itself.

        Args:
            vectors: the codebook, (codebook_size, code_width).
        """
        normalized = (vectors - vectors.mean(0)) / vectors.std()
        projection = torch.randn(vectors.shape[1], self.config.core.width) / vectors.shape[1] ** 0.5
        for table in (self.code_embedding.weight, self.image_head.weight):
            table.copy_(0.02 * normalized.to(table.device) @ projection.to(table.device))

    @torch.no_grad()
    def start_from_translations(self, tokens: Tensor, meanings: Tensor, shares: Tensor) -> int:
        """Initialises words that the model has not learnt as mixtures of words that it has, as WECHSEL does
        for whole languages (Minixhofer et al., 2112.06598).

        Args:
            tokens, meanings, shares: `mmvit.data.translation.Translations`. The embedding of each of `tokens`
                becomes the sum of the embeddings of its `meanings`, weighted by `shares`; others stay.

        Returns:
            The number of embeddings set.
        """
        initialised, counts = torch.unique_consecutive(tokens, return_counts=True)
        table = self.text_embedding.weight
        first = counts.cumsum(0) - counts
        known = table.detach().to("cpu", torch.float32)
        mixtures = F.embedding_bag(meanings, known, first, mode="sum", per_sample_weights=shares)
        table[initialised.to(table.device)] = mixtures.to(table)
        return len(initialised)

    def embed_captions(self, caption_ids: Tensor) -> Tensor:
        """caption_ids (batch, text_length) → (batch, 1 + text_length, width), without positions.

        Raises:
            ValueError: for captions of another length.
        """
        if caption_ids.shape[1] != self.config.text_length:
            raise ValueError(
                f"expected captions of {self.config.text_length} tokens, got {caption_ids.shape[1]}"
            )
        is_padding = (caption_ids == PAD).unsqueeze(-1)
        tokens = torch.where(is_padding, self.padding, self.text_embedding(caption_ids))
        return torch.cat([self.start.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def embed_codes(self, codes: Tensor, hidden: Tensor) -> Tensor:
        """codes (batch, places) → (batch, places, width), with the mask token where they are `hidden`."""
        return torch.where(hidden.unsqueeze(-1), self.mask_token, self.code_embedding(codes))

    def run_core(self, x: Tensor, start: int = 0, cache: KeyValueCache | None = None) -> Tensor:
        """The core's output for embedded tokens x (batch, tokens, width) at places `start`... of the
        sequence."""
        config, end = self.config, start + x.shape[1]
        x = self.dropout(self.positions.add(x, start))
        mask, is_causal = None, False  # one token after the first pass sees all that is in the cache
        if self.layer_kinds:
            masks = {kind: getattr(self, f"{kind}_mask")[start:end, :end] for kind in {*self.layer_kinds}}
            mask = [masks[kind] for kind in self.layer_kinds]
        elif not start and config.attention == "causal":
            is_causal = True
        elif config.attention == "prefix" and (not start or (config.order == "raster" and x.shape[1] > 1)):
            mask = prefix(end, self.prefix_length, x.device, is_causal=config.order == "raster")[start:]
        elif config.attention == "causal" and x.shape[1] > 1:
            mask = causal(end, x.device)[start:]
        positions = self.positions.in_layers(start, x.shape[1])
        return self.core(x, mask, is_causal, positions, cache)

    def forward(
        self, caption_ids: Tensor, codes: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Logits of every token given those before it, or in any order of every code given those not hidden.

        Args:
            caption_ids: (batch, text_length).
            codes: (batch, rows · columns) in raster order; in that order of prediction the last is ignored.
            hidden: for any order, boolean (batch, rows · columns), True where the model does not see a code.

        Returns:
            Text logits (batch, text_length, vocab_size), or None without a text loss; image logits (batch,
            codes, codebook_size).
        """
        captions = self.embed_captions(caption_ids)
        if self.config.order == "any":
            x = self.run_core(torch.cat([captions, self.embed_codes(codes, hidden)], dim=1))
            return None, self.image_head(x[:, self.prefix_length :])
        x = self.run_core(torch.cat([captions, self.code_embedding(codes[:, :-1])], dim=1))
        text, image = x[:, : self.prefix_length - 1], x[:, self.prefix_length - 1 :]
        return (self.text_head(text) if self.text_head is not None else None), self.image_head(image)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy, in nats per token, of `caption_ids` (batch, text_length) and `codes`
        (batch, rows · columns).

        A caption counts up to its first padding, which ends it. In training mode, captions are dropped with
        probability `caption_dropout`, so that the model learns guidance; dropped captions are not predicted.
        With probability `code_noise`, a code that the model reads is replaced by a random one; the code that
        it predicts stays. In any order, only codes that are hidden count: see `mmvit.models.hidden_codes`.
        """
        config = self.config
        caption_ids, codes = batch["caption_ids"], batch["codes"]
        input_captions, input_codes = caption_ids, codes
        is_dropped = torch.zeros(len(codes), 1, dtype=torch.bool, device=codes.device)
        if self.training and config.caption_dropout > 0:
            is_dropped = torch.rand(len(codes), 1, device=codes.device) < config.caption_dropout
            input_captions = caption_ids.masked_fill(is_dropped, PAD)
        if self.training and config.code_noise > 0:
            is_noise = torch.rand(codes.shape, device=codes.device) < config.code_noise
            input_codes = torch.where(is_noise, torch.randint_like(codes, config.codebook_size), codes)
        smoothing = config.label_smoothing if self.training else 0.0
        if config.order == "any":
            hidden = hide_for_training(*codes.shape, codes.device) if self.training else hide_by_codes(codes)
            text_logits, image_logits = self(input_captions, input_codes, hidden)
            image_loss = hidden_loss(image_logits, codes, hidden, smoothing, per_image=not self.training)
        else:
            text_logits, image_logits = self(input_captions, input_codes)
            image_loss = F.cross_entropy(
                image_logits.float().flatten(0, 1), codes.flatten(), label_smoothing=smoothing
            )
        metrics = {"image_loss": image_loss.detach()}
        loss = image_loss
        if text_logits is not None:
            text_loss = caption_loss(text_logits, caption_ids, is_dropped)
            metrics["text_loss"] = text_loss.detach()
            loss = config.weigh(text_loss, image_loss)
        return loss, {"loss": loss.detach(), **metrics}

    def prefill(self, caption_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Fills an empty cache with the captions; returns logits (batch, codebook_size) of the first code in
        raster order."""
        x = self.run_core(self.embed_captions(caption_ids), cache=cache)
        return self.image_head(x[:, -1])

    def step(self, codes: Tensor, cache: KeyValueCache) -> Tensor:
        """Appends the next codes (batch, n) of each image to the cache; returns logits (batch, n,
        codebook_size) of those that follow each."""
        return self.image_head(self.run_core(self.code_embedding(codes), cache.length, cache))

    def read_codes(self, codes: Tensor, hidden: Tensor, captions: "Tensor | KeyValueCache") -> Tensor:
        """In any order, the core's output (batch, places, width) at all codes; `image_head` gives their
        logits.

        Args:
            codes, hidden: (batch, rows · columns), as for `forward`.
            captions: `embed_captions`, or with attention `prefix` a cache that `prefill` filled, which stays
                as it was.
        """
        x = self.embed_codes(codes, hidden)
        if isinstance(captions, Tensor):
            return self.run_core(torch.cat([captions, x], dim=1))[:, self.prefix_length :]
        x = self.run_core(x, self.prefix_length, captions)
        captions.length = self.prefix_length
        return x

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` captions with their images, in the weights' precision."""
        unread = self.config.order == "raster"  # the last code
        capacity = self.prefix_length + self.config.num_codes - unread
        return self.core.new_cache(batch, capacity, self.start.dtype, self.start.device)


def dalle_layers(depth: int) -> list[Sparse]:
    """The attention of DALL·E's layers: the second of every four by column, the others by row, the last layer
    by convolution (2102.12092, appendix B.1)."""
    kinds: list[Sparse] = ["column" if layer % 4 == 1 else "row" for layer in range(depth)]
    kinds[-1] = "convolution"
    return kinds


def counted_tokens(caption_ids: Tensor) -> Tensor:
    """A boolean mask of caption_ids (batch, text_length): each caption's tokens and the first padding after
    them."""
    is_padding = caption_ids == PAD
    later_padding = is_padding & is_padding.roll(1, dims=1)
    later_padding[:, 0] = False
    return ~later_padding


def caption_loss(logits: Tensor, caption_ids: Tensor, is_dropped: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of captions and the padding that ends each, without dropped
    captions.

    Args:
        logits: (batch, text_length, vocab_size), place i predicting caption_ids[:, i].
        is_dropped: boolean (batch, 1).
    """
    ignored = ~counted_tokens(caption_ids) | is_dropped
    losses = F.cross_entropy(logits.float().flatten(0, 1), caption_ids.flatten(), reduction="none").view_as(
        caption_ids
    )
    return losses.masked_fill(ignored, 0).sum() / (~ignored).sum().clamp(min=1)
