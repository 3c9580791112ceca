"""Retrieval: the rank of a generated image's true one by pixels, and of true matches by any score."""

import torch
from torch import Tensor

from mmvit.errors import UserError
from mmvit.progress import with_progress

AT_ONCE = 4096  # images
TIE = 1e-6  # relative: images that are equal pixel for pixel must not outrank each other by rounding


def pixel_ranks(generated: Tensor, references: Tensor, own: Tensor, chunk: int = 128) -> Tensor:
    """The rank of each generated image's true one by Euclidean distance in pixels, 0 for the nearest.

    Args:
        generated: (images, ...) pixels.
        references: (candidates, ...) pixels of the same shape, the true images among them.
        own: (images,) where each one's true image is in `references`.

    Returns:
        How many candidates are strictly nearer than the true image, int64 (images,).
    """
    if generated.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"generated images are {tuple(generated.shape[1:])}, references {tuple(references.shape[1:])}"
        )
    generated, references = generated.flatten(1), references.flatten(1)
    if not generated.isfinite().all():
        raise UserError("generated images contain NaN or infinity: the model's weights are damaged")
    true = [
        (images.double() - references[places].double()).square().sum(1, keepdim=True)
        for images, places in zip(generated.split(chunk), own.split(chunk), strict=True)
    ]
    parts = references.split(AT_ONCE)
    tie = TIE * sum(part.square().sum(dtype=torch.float64).item() for part in parts) / len(references)
    ranks = torch.zeros(len(own), dtype=torch.long)
    for part in with_progress(parts, len(references), "comparing with real images", len):
        candidates = part.double()  # a part at a time, as this takes twice the memory
        sizes = candidates.square().sum(1)
        nearer = []
        for images, distances in zip(map(Tensor.double, generated.split(chunk)), true, strict=True):
            squares = images.square().sum(1, keepdim=True) + sizes - 2 * images @ candidates.T
            nearer.append((squares < distances - tie).sum(1))
        ranks += torch.cat(nearer)
    return ranks


def caption_ranks(scores: Tensor, belongs: Tensor) -> Tensor:
    """How many other candidates score higher than the best of a row's own, int64 (rows,).

    Half of those with exactly the same score count, too, rounded up: a model that scores everything alike
    finds nothing.

    Args:
        scores: (rows, candidates).
        belongs: boolean (rows, candidates), true for a row's own candidates, of which it has at least one.
    """
    if not scores.isfinite().all():
        raise UserError("scores contain NaN or infinity: the model's weights are damaged")
    best = scores.masked_fill(~belongs, float("-inf")).amax(1, keepdim=True)
    others = ~belongs
    higher, same = ((scores > best) & others).sum(1), ((scores == best) & others).sum(1)
    return higher + (same + 1) // 2


def recalls(name: str, ranks: Tensor) -> dict[str, float]:
    """Recall at 1 and at 5, under `name` followed by 1 and 5."""
    return {f"{name}{k}": recall(ranks, k) for k in (1, 5)}


def recall(ranks: Tensor, k: int) -> float:
    """The share of rows whose true match is among the first `k`."""
    return (ranks < k).double().mean().item()
