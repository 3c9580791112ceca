"""How likely a generator finds codes after a caption: to choose among pictures of a caption, and among
captions of a picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.models.generator import PAD, GeneratorTransformer


@torch.inference_mode()
def log_likelihood(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(codes | caption) in nats, (batch,).

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length).
        codes: (batch, rows · columns).
    """
    parts = []
    for ids, own in zip(caption_ids.split(batch_size), codes.split(batch_size), strict=True):
        logits = model(ids, own)[1].float()
        parts.append(-F.cross_entropy(logits.transpose(1, 2), own, reduction="none").sum(1))
    return torch.cat(parts)


def caption_evidence(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(codes | caption) − log p(codes), (batch,): what the codes say for the caption. By Bayes' rule it
    is log p(caption | codes) − log p(caption), so it orders pictures of one caption by how likely the caption
    is of each. The model has to know pictures without captions, by caption dropout."""
    empty = torch.full_like(caption_ids, PAD)
    return log_likelihood(model, caption_ids, codes, batch_size) - log_likelihood(
        model, empty, codes, batch_size
    )
