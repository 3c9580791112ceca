"""How often a CLIP finds each image's caption among all captions, and each caption's image among all."""

from collections.abc import Iterable
from typing import Any

import torch

from mmvit.errors import UserError
from mmvit.evaluation.retrieval import caption_ranks, recalls
from mmvit.models.clip import CLIP


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
    ids = torch.cat(id_parts)
    belongs = (ids[:, None] == ids[None]).all(-1)
    return {
        **recalls("caption_at_", caption_ranks(cosines, belongs)),
        **recalls("image_at_", caption_ranks(cosines.T, belongs.T)),
    }
