"""How often a CLIP finds each image's caption among all captions, and each caption's image among all."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmvit.data.samples import CaptionSample, PixelsSample
from mmvit.errors import UserError
from mmvit.evaluation.retrieval import caption_ranks, recalls
from mmvit.evaluation.splits import batches_of, listed
from mmvit.files import write_json
from mmvit.models.clip import CLIP
from mmvit.sampling.candidates import CaptionScorer
from mmvit.streams.reader import Batch, Decode
from mmvit.streams.shards import Sample

MOST_PAIRS = 10_000  # by default: their scores alone take 400 MB


def evaluate_clip(
    model: Path,
    data: Path,
    split: str,
    out: Path | None = None,
    *,
    language: str | Sequence[str] = (),
    limit: int = MOST_PAIRS,
) -> dict[str, Any]:
    """`retrieval` among the images and captions of a split, and how many there are.

    Args:
        out: writes the figures to OUT.json.
        limit: of a larger split, so many pairs, evenly spread, are compared with each other.
        language: of the captions, English by default; each further one is measured, too, as "en,de" or a
            list.
    """
    scorer = CaptionScorer.from_pretrained(model)
    config = scorer.clip.config
    pixels = PixelsSample(config.image.height_width)
    found: dict[str, dict[str, Any]] = {}
    for code in listed(language) or ["en"]:
        captions = CaptionSample([code], falls_back=not language)

        def decode(sample: Sample, rng: random.Random, captions: Decode = captions) -> dict[str, Any]:
            return {**pixels(sample, rng), **captions(sample, rng)}

        batches = batches_of(data, split, decode, f"embedding images and {code} captions:", most=limit)
        found[code] = measure(scorer, batches)
    first = next(iter(found))
    figures = {"split": split, "language": first, **found[first]}
    if len(found) > 1:
        figures["languages"] = found
    if out is not None:
        write_json(figures, out.with_suffix(".json"))
    return figures


def measure(scorer: CaptionScorer, batches: Iterable[Batch]) -> dict[str, Any]:
    """The number of `pairs` in batches with `pixels` and `captions`, and `retrieval` among them."""
    pairs = 0

    def with_ids() -> Iterator[Batch]:
        nonlocal pairs
        for batch in batches:
            pairs += len(batch["captions"])
            ids, _ = scorer.text_tokenizer.encode(batch["captions"], scorer.clip.config.text_length)
            yield {**batch, "caption_ids": ids}

    figures = retrieval(scorer.clip, with_ids())
    return {"pairs": pairs, **figures}


@torch.no_grad()
def retrieval(model: CLIP, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Recall at 1 and at 5: `caption_at_1`, `caption_at_5`, `image_at_1` and `image_at_5`.

    Captions with the same ids belong to all of their images.

    Args:
        model: in evaluation mode.
        batches: the whole split, with `pixels` and `caption_ids`; each pair is compared with all others.

    Raises:
        UserError: if there are no samples.
    """
    device = next(model.parameters()).device
    image_parts, caption_parts, id_parts = [], [], []
    for batch in batches:
        caption_ids = batch["caption_ids"].to(device)
        image_parts.append(model.embed_images(batch["pixels"].to(device)))
        caption_parts.append(model.embed_captions(caption_ids))
        id_parts.append(caption_ids)
    if not id_parts:
        raise UserError("no samples to evaluate on")
    with torch.autocast(device.type, enabled=False):  # in bfloat16 close scores would tie
        cosines = torch.cat(image_parts) @ torch.cat(caption_parts).T  # (images, captions)
    _, caption = torch.cat(id_parts).unique(dim=0, return_inverse=True)
    belongs = caption[:, None] == caption
    return {
        **recalls("caption_at_", caption_ranks(cosines, belongs)),
        **recalls("image_at_", caption_ranks(cosines.T, belongs.T)),
    }
