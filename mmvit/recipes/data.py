"""Sections of recipes that say what to train on."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.streams.cache import DEFAULT_SIZE, checked_size
from mmvit.streams.shards import ShardPatterns


class CacheConfig(Config):
    """Where pieces of remote shards are kept, in every process of a machine."""

    cache: str | None = Field(
        None, description="folder for pieces of remote shards (default: ~/.cache/mmvit/remote)"
    )
    cache_size: Annotated[str, BeforeValidator(checked_size)] | None = Field(
        None, description=f"most bytes of it, such as {DEFAULT_SIZE}, which is the default"
    )


class ImagesConfig(CacheConfig):
    """Shards with `png|jpg|webp`, for some tasks with `cls`, and how training images are augmented."""

    train: ShardPatterns
    held_out: ShardPatterns
    shuffle_buffer: int = Field(10_000, ge=0, description="samples among which the order is mixed")
    augment: AugmentConfig = AugmentConfig()


class CaptionsConfig(CacheConfig):
    """Shards with captions (`txt` or `json`), and how they become tokens."""

    train: ShardPatterns
    held_out: ShardPatterns
    text_tokenizer: str = "tokenizers/emoji-text"
    languages: tuple[str, ...] = Field(
        ("en",),
        description="a caption's language is drawn from these for every sample; a language listed twice is "
        "drawn twice as often",
    )
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    shuffle_buffer: int = Field(4000, ge=0, description="samples among which the order is mixed")


class CaptionCodesConfig(CaptionsConfig):
    """Shards with captions and image codes, made by `mmvit encode`, and the tokenizer that made the codes."""

    image_tokenizer: str = "tokenizers/emoji-image"
    augmented: float = Field(
        0.0, ge=0, le=1, description="probability that a training image is one of its augmented copies"
    )
