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
    distances, places = [], []
    for part in with_progress(images.split(chunk), len(images), "comparing with training images", len):
        own = part.flatten(1).double()
        # in double precision a part of the references at a time
        found = [torch.cdist(own, some.double()).min(1) for some in references.flatten(1).split(AT_ONCE)]
        least = torch.stack([each.values for each in found]).min(0)
        within = torch.stack([each.indices for each in found]).gather(0, least.indices[None])[0]
        distances.append(least.values)
        places.append(least.indices * AT_ONCE + within)
    return torch.cat(distances) / (2 * images[0].numel() ** 0.5), torch.cat(places)


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
