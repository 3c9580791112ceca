"""An image tokenizer on pictures that it has not seen: its figures, how often it uses each code, and a sheet
from the worst picture to the best."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.evaluation.code_use import use_metrics
from mmvit.evaluation.frechet import FeatureSpace
from mmvit.evaluation.reconstruction import image_psnr, image_ssim
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.sampling.grids import two_halves


@dataclass(frozen=True)
class TokenizerReport:
    """Figures; how often each code occurs, (codebook_size,); and every picture beside its reconstruction."""

    figures: dict[str, float | int]
    counts: Tensor
    pixels: Tensor
    reconstructed: Tensor
    psnr: Tensor


def report_tokenizer(tokenizer: ImageTokenizer, pixels: Tensor, space: FeatureSpace) -> TokenizerReport:
    """pixels (pictures, 3, height, width) in [-1, 1], two pictures or more."""
    codes = tokenizer.encode_many(pixels)
    reconstructed = tokenizer.decode_many(codes).cpu()
    psnr = image_psnr(reconstructed, pixels)
    parts = zip(reconstructed.split(64), pixels.split(64), strict=True)
    counts = torch.bincount(codes.flatten().cpu(), minlength=tokenizer.codebook_size).double()
    figures: dict[str, Any] = {
        "pictures": len(pixels),
        "psnr": psnr.mean().item(),
        "ssim": torch.cat([image_ssim(*each) for each in parts]).mean().item(),
        "l1": ((reconstructed - pixels) / 2).abs().mean().item(),
        **use_metrics(counts),
        f"frechet_distance_{space.name}": space.distance(pixels, reconstructed),
    }
    return TokenizerReport(figures, counts, pixels, reconstructed, psnr)


def draw_tokens_worst_to_best(report: TokenizerReport, keys: list[str], num_rows: int) -> Image.Image:
    """Real and reconstruction in two halves of `num_rows`: evenly from the worst of the split to its best."""
    order = report.psnr.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(2 * num_rows, len(order))).round().long()].tolist()
    columns = [images_from_pixels(of[chosen]) for of in (report.pixels, report.reconstructed)]
    labels = [f"{keys[i]} {report.psnr[i]:.1f} dB" for i in chosen]
    return two_halves(columns, labels, ["worst to best", "real", "tokenizer"], num_rows)
