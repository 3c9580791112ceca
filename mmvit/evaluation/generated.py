"""Generated images compared with each other and with training images: diversity and copies. Distances are
root mean squares over pixels in [0, 1]."""

import torch
from torch import Tensor

from mmvit.progress import with_progress

AT_ONCE = 4096  # references
COPY = 0.02  # a generated image closer than this to a training image counts as its copy: 34 dB


def nearest(images: Tensor, references: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """The distance of each image to the nearest of `references`, and its place there, both (images,).

    Args:
        images, references: (number, ...) pixels in [-1, 1], of the same shape.
    """
    if images.shape[1:] != references.shape[1:]:
        raise ValueError(f"images are {tuple(images.shape[1:])}, references {tuple(references.shape[1:])}")
    least = torch.full((len(images),), float("inf"), dtype=torch.float64)
    places = torch.zeros(len(images), dtype=torch.long)
    parts = references.flatten(1).split(AT_ONCE)
    shown = with_progress(parts, len(references), "comparing with training images", len)
    for number, candidates in enumerate(map(Tensor.double, shown)):  # which take twice the memory
        found = [torch.cdist(part.double(), candidates).min(1) for part in images.flatten(1).split(chunk)]
        distances = torch.cat([each.values for each in found])
        is_nearer = distances < least
        least = torch.where(is_nearer, distances, least)
        own = number * AT_ONCE + torch.cat([each.indices for each in found])
        places = torch.where(is_nearer, own, places)
    return least / (2 * images[0].numel() ** 0.5), places


def all_alike(images: Tensor, chunk: int = 128) -> Tensor:
    """Which of at least three images resemble more than half of the others as closely as a copy would: a
    blank image, whatever its caption, is near to blank training images, but copies none. → (images,) bool"""
    flat = images.flatten(1).double() / (2 * images[0].numel() ** 0.5)
    near = torch.cat([(torch.cdist(part, flat) < COPY).sum(1) - 1 for part in flat.split(chunk)])
    return (near > (len(images) - 1) / 2) & (len(images) > 2)


def diversity(images: Tensor) -> tuple[float, float]:
    """The mean distance of two images of one caption, and of two images of different captions.

    Args:
        images: (captions, seeds, ...) pixels in [-1, 1], at least two captions and two seeds.
    """
    captions, seeds = images.shape[:2]
    if captions < 2 or seeds < 2:
        raise ValueError(f"{captions} captions and {seeds} seeds have no pairs")
    flat = images.flatten(2).flatten(0, 1).double() / 2
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    caption = torch.arange(captions).repeat_interleave(seeds)
    same = caption[:, None] == caption[None]
    pairs = torch.ones_like(same).triu(1)
    return distances[same & pairs].mean().item(), distances[~same & pairs].mean().item()
