"""Does a generated picture find the one that its caption names? Nearest neighbours in pixels among all real
pictures; and ranks of what belongs together by any score."""

import torch
from torch import Tensor

from mmvit.errors import UserError

TIE = 1e-6  # relative; pictures that are equal pixel for pixel must not outrank each other by rounding


def pixel_ranks(generated: Tensor, references: Tensor, own: Tensor, chunk: int = 128) -> Tensor:
    """The rank of each generated picture's true one, 0 for the nearest, by Euclidean distance in pixels.

    Args:
        generated: (pictures, ...) pixels.
        references: (candidates, ...) pixels of the same shape; the true pictures are among them.
        own: (pictures,) the place of each one's true picture in `references`.

    Returns:
        For each picture, how many candidates are strictly nearer than the true one, int64 (pictures,).
    """
    if generated.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"generated pictures are {tuple(generated.shape[1:])}, references {tuple(references.shape[1:])}"
        )
    candidates = references.flatten(1).double()
    sizes = candidates.square().sum(1)
    ranks = []
    for part, places in zip(generated.split(chunk), own.split(chunk), strict=True):
        pictures = part.flatten(1).double()
        squares = (
            pictures.square().sum(1, keepdim=True) + sizes - 2 * pictures @ candidates.T
        )  # (pictures, candidates)
        if not squares.isfinite().all():
            raise UserError("drawn pictures have values that are not finite: the model's weights are damaged")
        true = squares.gather(1, places.unsqueeze(1))
        ranks.append((squares < true - TIE * sizes.mean()).sum(1))
    return torch.cat(ranks)


def caption_ranks(scores: Tensor, belongs: Tensor) -> Tensor:
    """How many candidates that are not its own score higher than the best of its own, for each row, int64
    (rows,). Half of those that score exactly as high count, too, rounded up: equal scores for all are no hit.

    Args:
        scores: (rows, candidates).
        belongs: boolean, of the same shape: which candidates are a row's own; each has one at least.
    """
    if not scores.isfinite().all():
        raise UserError("scores are not finite: the model's weights are damaged")
    best = scores.masked_fill(~belongs, float("-inf")).amax(1, keepdim=True)
    others = ~belongs
    higher, same = ((scores > best) & others).sum(1), ((scores == best) & others).sum(1)
    return higher + (same + 1) // 2


def recall(ranks: Tensor, k: int) -> float:
    """The share of pictures whose true one is among the `k` nearest."""
    return (ranks < k).double().mean().item()
