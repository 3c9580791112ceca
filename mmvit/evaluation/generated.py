"""What generated pictures are beside real ones: how much those of one caption differ, and which are copies of
training pictures. Distances are root mean squares over pixels in [0, 1]."""

import torch
from torch import Tensor

COPY = 0.02  # a picture that differs by less from a training picture is called its copy: 34 dB


def nearest(pictures: Tensor, references: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """The distance of each of `pictures` to the nearest of `references`, and its place, both (pictures,).

    Args:
        pictures, references: (number, ...) pixels in [-1, 1], of the same shape.
    """
    if pictures.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"pictures are {tuple(pictures.shape[1:])}, references {tuple(references.shape[1:])}"
        )
    candidates = references.flatten(1).double()
    found = []
    for part in pictures.split(chunk):
        found.append(torch.cdist(part.flatten(1).double(), candidates).min(1))
    scale = 2 * candidates.shape[1] ** 0.5
    return torch.cat([one.values for one in found]) / scale, torch.cat([one.indices for one in found])


def diversity(pictures: Tensor) -> tuple[float, float]:
    """The mean distance of two pictures of one caption, and of two pictures of different captions.

    Args:
        pictures: (captions, seeds, ...) pixels in [-1, 1], two captions and seeds or more.
    """
    captions, seeds = pictures.shape[:2]
    if captions < 2 or seeds < 2:
        raise ValueError(f"{captions} captions and {seeds} seeds have no pairs")
    flat = pictures.flatten(2).flatten(0, 1).double() / 2
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    caption = torch.arange(captions).repeat_interleave(seeds)
    same = caption[:, None] == caption[None]
    pairs = torch.ones_like(same).triu(1)
    return distances[same & pairs].mean().item(), distances[~same & pairs].mean().item()
