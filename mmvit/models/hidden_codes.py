"""Which codes a generator of any order does not see, in training and in evaluation, and the loss of them
(MaskGIT, 2202.04200)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EVALUATION_SEED = 0


def hide_for_training(batch: int, places: int, device: torch.device) -> Tensor:
    """Boolean (batch, places), True for hidden codes: of every image at least one, of an image in drawing's
    share, cos(π u / 2) of all places rounded up, for a uniform u.

    The u of a batch are evenly spread with one common random offset, so that batches differ less.
    """
    u = (torch.rand(1, device=device) + torch.arange(batch, device=device) / batch) % 1
    counts = (places * torch.cos(u * math.pi / 2)).ceil().clamp(1, places)
    return ranks(torch.rand(batch, places, device=device)) < counts.unsqueeze(1)


def hide_by_codes(codes: Tensor) -> Tensor:
    """Boolean (batch, places), True for hidden codes, of 1 to all places, uniformly; every image's own codes
    (batch, places) are the seed, so that evaluations repeat in batches of any size."""
    batch, places = codes.shape
    hidden = torch.empty(batch, places, dtype=torch.bool)
    for row, own in enumerate(codes.cpu()):
        weights = torch.arange(1, places + 1)  # the same codes at other places are another image
        generator = torch.Generator().manual_seed(EVALUATION_SEED + int((own * weights).sum()))
        count = torch.randint(1, places + 1, (1,), generator=generator)
        hidden[row] = ranks(torch.rand(1, places, generator=generator))[0] < count
    return hidden.to(codes.device)


def ranks(numbers: Tensor) -> Tensor:
    """The rank of every number among those of its row, from 0."""
    return numbers.argsort(1).argsort(1)


def hidden_loss(
    logits: Tensor, codes: Tensor, hidden: Tensor, label_smoothing: float = 0.0, per_image: bool = False
) -> Tensor:
    """Mean cross-entropy of hidden codes in nats.

    Args:
        logits: (batch, places, codebook_size).
        codes, hidden: (batch, places).
        per_image: every image counts alike, however many of its codes are hidden. With `hide_by_codes` this
            estimates without bias the nats per code of drawing one at a time in a random order: the mean over
            the number of codes that are hidden of the loss of one of them (2110.02037).
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), codes.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(codes)
    if per_image:
        return ((losses * hidden).sum(1) / hidden.sum(1)).mean()
    return (losses * hidden).sum() / hidden.sum()
