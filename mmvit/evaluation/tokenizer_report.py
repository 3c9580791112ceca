"""An image tokenizer on held-out images: how well it reconstructs them, and how often it uses each code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.data.samples import PixelsSample
from mmvit.errors import UserError
from mmvit.evaluation.code_use import draw_code_use, use_metrics
from mmvit.evaluation.frechet import FeatureSpace, feature_space
from mmvit.evaluation.held_out import evenly_spread
from mmvit.evaluation.reconstruction import image_psnr, image_ssim
from mmvit.evaluation.splits import check_memory, num_samples, read_split
from mmvit.files import whole_file, write_json
from mmvit.hub import trained_size
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.progress import with_progress
from mmvit.sampling.grids import two_halves

IN_MEMORY = 3  # copies of each image: real, reconstructed, one in between


def evaluate_image_tokenizer(
    model: Path,
    data: Path,
    split: str,
    out: Path | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    rows: int = 8,
    limit: int | None = None,
    features: str | Path | None = None,
) -> dict[str, Any]:
    """PSNR, SSIM, L1, use of the codes and Fréchet distance of the reconstructions of a split.

    Args:
        out: draws the images there from worst to best, `rows` on either side, and the use of the codes into
            OUT-codes.png, and writes the figures to OUT.json.
        size: of the images, a side or (height, width), multiples of the tokenizer's factor; by default what
            its run was trained on, else 64.
        limit: measures so many images, evenly spread over the split.
        features: as in `feature_space`.

    Raises:
        UserError: for another size, and for fewer than two images.
    """
    for name, number in (("rows", rows), ("limit", limit)):
        if number is not None and number < 1:
            raise UserError(f"--{name} must be at least 1, got {number}")
    tokenizer = load_image_tokenizer(model, "cuda" if torch.cuda.is_available() else "cpu")
    size = (size, size) if isinstance(size, int) else size or trained_size(model)
    height, width = size
    if height % tokenizer.factor or width % tokenizer.factor:
        raise UserError(
            f"--size {height}x{width}: both sides must be multiples of {tokenizer.factor}, the factor of "
            f"{model}"
        )
    there = num_samples(data, split)
    check_memory(IN_MEMORY * min(there, limit or there), size)
    space = feature_space(features)
    held_out = read_split(data, split, PixelsSample(size), most=limit)
    if len(held_out["pixels"]) < 2:
        raise UserError(f"the split {split} has one image; the Fréchet distance needs at least two")
    report = report_tokenizer(tokenizer, held_out["pixels"], space)
    figures = {"split": split, "image_size": list(size), **report.figures}
    if out is not None:
        write_json(figures, out.with_suffix(".json"))
        draw_code_use(report.counts, out.with_name(f"{out.stem}-codes.png"))
        with whole_file(out) as partial:
            draw_tokens_worst_to_best(report, held_out["keys"], rows).save(partial)
    return figures


@dataclass(frozen=True)
class TokenizerReport:
    """Figures, how often each code occurs (codebook_size,), and every image with its reconstruction and
    PSNR."""

    figures: dict[str, float | int]
    counts: Tensor
    pixels: Tensor
    reconstructed: Tensor
    psnr: Tensor


def report_tokenizer(tokenizer: ImageTokenizer, pixels: Tensor, space: FeatureSpace) -> TokenizerReport:
    """Measures reconstructions of pixels (images, 3, height, width) in [-1, 1], at least two images."""
    codes, reconstructed = reconstruct(tokenizer, pixels, "reconstructing images")
    psnr = image_psnr(reconstructed, pixels)
    pairs = list(zip(reconstructed.split(64), pixels.split(64), strict=True))
    pairs = with_progress(pairs, len(pixels), "measuring SSIM", lambda pair: len(pair[0]))
    counts = torch.bincount(codes.flatten().cpu(), minlength=tokenizer.codebook_size).double()
    figures: dict[str, Any] = {
        "images": len(pixels),
        "psnr": psnr.mean().item(),
        "ssim": torch.cat([image_ssim(*pair) for pair in pairs]).mean().item(),
        "l1": ((reconstructed - pixels) / 2).abs().mean().item(),
        **use_metrics(counts),
        f"frechet_distance_{space.name}": space.distance(pixels, reconstructed),
    }
    return TokenizerReport(figures, counts, pixels, reconstructed, psnr)


def reconstruct(tokenizer: ImageTokenizer, pixels: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The codes of images and, on the CPU, the pixels that these decode to; with progress."""
    codes, decoded = [], []
    for part in with_progress(pixels.split(64), len(pixels), what, len):
        codes.append(tokenizer.encode_many(part))
        decoded.append(tokenizer.decode_many(codes[-1]).cpu())
    return torch.cat(codes), torch.cat(decoded)


def draw_tokens_worst_to_best(report: TokenizerReport, keys: list[str], num_rows: int) -> Image.Image:
    """Real image and reconstruction in two halves of `num_rows`, evenly from the worst to the best."""
    order = report.psnr.argsort()
    chosen = order[evenly_spread(len(order), 2 * num_rows)].tolist()
    columns = [images_from_pixels(of[chosen]) for of in (report.pixels, report.reconstructed)]
    labels = [f"{keys[i]} {report.psnr[i]:.1f} dB" for i in chosen]
    return two_halves(columns, labels, ["worst to best", "real", "tokenizer"], num_rows)
