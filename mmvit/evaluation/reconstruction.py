"""How well an image tokenizer reconstructs held-out images, and how much of its codebook a data set uses."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from mmvit.models.vq import VQModel


@torch.no_grad()
def reconstruction_metrics(model: VQModel, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Peak signal-to-noise ratio in decibels, and the mean absolute error, of pixels in [0, 1].

    Args:
        model: in evaluation mode.
        batches: this process's part of one epoch, with `pixels`. Where a process group exists, every process
            calls this and gets the figures of the whole.

    Returns:
        `psnr`, the mean of the images' own; `psnr_of_mean_error`, from the mean squared error of all, which
        the worst images decide; `l1`.

    Raises:
        ValueError: where there is no sample at all.
    """
    device = next(model.parameters()).device
    psnr, squared, absolute, samples = sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        pixels = batch["pixels"].to(device)
        error = (model.decode(model.encode(pixels)) - pixels) / 2
        image_squared = error.square().flatten(1).mean(1)  # (batch,)
        psnr += decibels(image_squared.clamp_min(1e-10)).sum()  # 100 dB where nothing is left of the error
        squared += image_squared.sum()
        absolute += error.abs().flatten(1).mean(1).sum()
        samples += len(pixels)
    if dist.is_initialized():
        dist.all_reduce(sums)
    if not samples:
        raise ValueError("no samples to evaluate on")
    return {
        "psnr": (psnr / samples).item(),
        "psnr_of_mean_error": decibels(squared / samples).item(),
        "l1": (absolute / samples).item(),
    }


@torch.no_grad()
def codebook_metrics(model: VQModel, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How much of the codebook `batches` (as for `reconstruction_metrics`) use.

    Returns:
        `codes_in_use`, the share that occurs at all; `perplexity` of the distribution of the codes.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(model.codebook_size, dtype=torch.float64, device=device)
    for batch in batches:
        codes = model.encode(batch["pixels"].to(device))
        counts += torch.bincount(codes.flatten(), minlength=model.codebook_size)
    if dist.is_initialized():
        dist.all_reduce(counts)
    share = counts / counts.sum()
    return {
        "codes_in_use": (counts > 0).double().mean().item(),
        "perplexity": torch.special.entr(share).sum().exp().item(),
    }


def decibels(squared_error: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10(squared_error)
