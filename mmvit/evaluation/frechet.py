"""Fréchet distance between two sets of feature vectors, as if each were Gaussian (1706.08500)."""

import torch
from torch import Tensor


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), in float64.

    The value depends on the feature space and on the number of samples (few samples raise it): name both
    beside it, and compare like with like.

    Args:
        one, two: (samples, dimensions), two samples or more.

    Raises:
        ValueError: for sets of other shapes.
    """
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or min(len(one), len(two)) < 2:
        raise ValueError(f"features of shapes {tuple(one.shape)} and {tuple(two.shape)} cannot be compared")
    one, two = one.double(), two.double()
    first, second = torch.atleast_2d(one.T.cov(), two.T.cov())
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # Σ₁ Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed
    return max(distance.item(), 0.0)


def coarse_pixels(pixels: Tensor, cells: int = 8) -> Tensor:
    """The feature space `pixels-8x8`: mean colours of a grid of cells, (images, 3 · cells²), for pixels
    (images, 3, height, width)."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, cells).flatten(1)
