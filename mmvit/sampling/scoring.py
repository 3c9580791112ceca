"""How likely a generator finds codes after a caption: to choose among pictures of a caption, and among
captions of a picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.memory import in_parts
from mmvit.models.generator_transformer import PAD, GeneratorTransformer


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
    return code_likelihoods(model, caption_ids, codes, batch_size).sum(1)


def code_likelihoods(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(code | codes before it, caption) in nats, (batch, rows · columns)."""

    def of_part(caption_ids: Tensor, codes: Tensor) -> Tensor:
        logits = model(caption_ids, codes)[1].float()
        return -F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")

    return in_parts(of_part, caption_ids, codes, size=batch_size)


@torch.inference_mode()
def likelihood_of_given(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, given: Tensor
) -> Tensor:
    """How well codes that were drawn fit the given ones which follow them, (batch,): the sum of log p(given
    code | codes before it, caption). As each code was drawn from those before it alone, this is by how much
    (the logarithm of the importance weight, at guidance 1 and temperature 1) given codes make what was drawn
    likelier.

    Args:
        codes: (batch, rows · columns), given ones and drawn ones.
        given: (batch, rows · columns), -1 where one was drawn.
    """
    return (code_likelihoods(model, caption_ids, codes) * after_drawn(given)).sum(1)


def after_drawn(given: Tensor) -> Tensor:
    """Boolean: the places of given codes that follow a drawn one, which is -1 in `given` (batch, places)."""
    return (given >= 0) & ((given < 0).cumsum(1) > 0)


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
