"""How well an image tokenizer reconstructs images."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmvit.models.image_tokenizer import ImageTokenizer


@torch.no_grad()
def reconstruction_metrics(model: ImageTokenizer, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Peak signal-to-noise ratio in decibels, structural similarity and L1 error, of pixels in [0, 1].

    Args:
        model: in evaluation mode.
        batches: this process's part of one epoch, with `pixels`. In a process group every process calls this
            and gets the figures of the whole.

    Returns:
        `psnr`, the mean over images; `psnr_of_mean_error`, of the mean squared error over all images, which
        the worst ones dominate; `ssim`, structural similarity (Wang et al. 2004); `l1`.

    Raises:
        ValueError: if there are no samples.
    """
    device = next(model.parameters()).device
    psnr, squared, similar, absolute, samples = sums = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        pixels = batch["pixels"].to(device)
        reconstructed = model.decode(model.encode(pixels))
        psnr += image_psnr(reconstructed, pixels).sum()
        squared += image_squared_error(reconstructed, pixels).sum()
        similar += image_ssim(reconstructed, pixels).sum()
        absolute += ((reconstructed - pixels) / 2).abs().flatten(1).mean(1).sum()
        samples += len(pixels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not samples:
        raise ValueError("no samples to evaluate on")
    return {
        "psnr": (psnr / samples).item(),
        "psnr_of_mean_error": decibels(squared / samples).item(),
        "ssim": (similar / samples).item(),
        "l1": (absolute / samples).item(),
    }


def image_squared_error(one: Tensor, two: Tensor) -> Tensor:
    """Each image's mean squared error on the scale of [0, 1], (images,), for pixels (images, 3, height,
    width) in [-1, 1]."""
    return ((one - two) / 2).square().flatten(1).mean(1)


def image_psnr(one: Tensor, two: Tensor) -> Tensor:
    """Each image's peak signal-to-noise ratio in decibels, (images,); 100 if there is no error."""
    return decibels(image_squared_error(one, two).clamp_min(1e-10))


def image_ssim(one: Tensor, two: Tensor) -> Tensor:
    """Each image's structural similarity, (images,), with the usual Gaussian window of 11 pixels."""
    from kornia.metrics import ssim  # takes a second

    unit = [((pixels + 1) / 2).float() for pixels in (one, two)]
    with torch.autocast(one.device.type, enabled=False):  # bfloat16 loses the variance of flat regions
        return ssim(*unit, window_size=11).flatten(1).mean(1)


def decibels(squared_error: Tensor) -> Tensor:
    return -10 * torch.log10(squared_error)
