"""Trains CLIP on shards of pictures with captions: which picture belongs to which caption.

    python pipelines/train_clip.py configs/emoji_clip.toml
    torchrun --nproc_per_node 2 pipelines/train_clip.py configs/emoji_clip.toml

The same command with --resume continues. The run folder then holds the model with its text tokenizer (best/,
by the share of held-out pictures whose own caption is nearest among all held-out ones, and last/), for
`mmvit.CaptionScorer` and for choosing among a generator's pictures.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.augment import AugmentConfig
from mmvit.data.captions import TextTokenizer
from mmvit.data.samples import CaptionIdsPixelsSample
from mmvit.data.shards import ShardPatterns
from mmvit.errors import UserError, run_script
from mmvit.evaluation.retrieval import caption_ranks, recall
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.sampling.candidates import CaptionScorer
from mmvit.training import Recipe, one_epoch, open_session, train, training_stream


class DataConfig(Config):
    """Shards with `png|jpg|webp` and `txt` or `json`, and what is done to the training pictures."""

    train: ShardPatterns
    held_out: ShardPatterns
    text_tokenizer: str = "tokenizers/emoji-text"
    languages: tuple[str, ...] = Field(
        ("en",), description="a caption's language is drawn among these, sample by sample"
    )
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    shuffle_buffer: int = Field(4000, ge=0)
    augment: AugmentConfig = AugmentConfig()


class CLIPRecipe(Recipe):
    """CONFIG.toml of this script."""

    data: DataConfig
    model: CLIPConfig = CLIPConfig()


def main() -> None:
    with open_session(CLIPRecipe, __doc__) as session:
        recipe, data = session.recipe, session.recipe.data
        text_tokenizer = TextTokenizer.from_file(data.text_tokenizer)
        config = recipe.model
        default = CLIPConfig.model_fields["vocab_size"].default
        if config.vocab_size not in (text_tokenizer.vocab_size, default):
            raise UserError(
                f"model.vocab_size is {config.vocab_size}, but the tokenizer has "
                f"{text_tokenizer.vocab_size}; leave it out"
            )
        config = config.model_copy(update={"vocab_size": text_tokenizer.vocab_size})

        shape = (text_tokenizer, config.text_length, config.image.height_width)
        decode = CaptionIdsPixelsSample(*shape, data.languages, data.bpe_dropout, data.augment)
        stream = training_stream(session, data.train, decode, data.shuffle_buffer)
        decode = CaptionIdsPixelsSample(*shape, data.languages[:1])
        held_out = one_epoch(session, data.held_out, decode, whole=True)  # every pair is compared with all
        train(
            session,
            CLIP(config),
            stream,
            evaluate=lambda model: retrieval(model, held_out),
            select="caption_at_1",
            mode="max",
            export=lambda model, folder: CaptionScorer(model, text_tokenizer).save_pretrained(folder),
        )


def retrieval(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How often a picture's own caption is the nearest, or among the nearest five, of all; and a caption's
    picture."""
    device = next(model.parameters()).device
    pictures, captions, ids = [], [], []
    for batch in batches:
        pictures.append(model.embed_images(batch["pixels"].to(device)))
        captions.append(model.embed_captions(batch["caption_ids"].to(device)))
        ids.append(batch["caption_ids"].to(device))
    if not pictures:
        raise UserError("there is no held-out sample to evaluate on")
    with torch.autocast(device.type, enabled=False):  # in bfloat16 near ones would tie
        cosines = torch.cat(pictures) @ torch.cat(captions).T
    ids = torch.cat(ids)
    belongs = (ids[:, None] == ids[None]).all(-1)
    figures = {}
    for name, scores, own in (("caption", cosines, belongs), ("picture", cosines.T, belongs.T)):
        ranks = caption_ranks(scores, own)
        figures |= {f"{name}_at_1": recall(ranks, 1), f"{name}_at_5": recall(ranks, 5)}
    return figures


if __name__ == "__main__":
    run_script(main)
