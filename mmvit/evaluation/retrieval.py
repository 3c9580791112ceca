"""Does a generated picture find the one that its caption names? Nearest neighbours in pixels among all real
pictures."""

import torch
from torch import Tensor

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
        true = squares.gather(1, places.unsqueeze(1))
        ranks.append((squares < true - TIE * sizes.mean()).sum(1))
    return torch.cat(ranks)


def recall(ranks: Tensor, k: int) -> float:
    """The share of pictures whose true one is among the `k` nearest."""
    return (ranks < k).double().mean().item()
