"""Between pixels and pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmvit.data.images import open_image, to_rgb, to_unit_range
from mmvit.data.shards import BadSample
from mmvit.errors import UserError


def pictures_from_pixels(pixels: Tensor) -> list[Image.Image]:
    """Pixels (pictures, 3, height, width) in [-1, 1] as RGB pictures."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in levels]


def read_picture(path: Path) -> Image.Image:
    """A picture's file. Raises UserError where there is none."""
    try:
        return open_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except BadSample as bad:
        raise UserError(f"{path} is no picture that can be read ({bad.reason})") from None


def check_pictures(pictures: Sequence[Image.Image]) -> None:
    """Raises UserError for one picture without a list, and for a list of something else."""
    if isinstance(pictures, Image.Image):
        raise UserError("a list of pictures is wanted, not a picture alone: write [picture]")
    for number, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise UserError(
                f"picture {number} is a {type(picture).__name__}, not one of Pillow's: open files by "
                "PIL.Image.open"
            )


def pixels_from_pictures(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Pictures as pixels (pictures, 3, height, width) in [-1, 1]: turned upright, over white, resized and
    centre-cropped as those of shards are. Raises UserError for anything but pictures of whole numbers."""
    check_pictures(pictures)
    rows = []
    for number, picture in enumerate(pictures):
        try:
            upright = to_rgb(ImageOps.exif_transpose(picture))
        except ValueError as error:
            raise UserError(f"picture {number}: its {error}") from None
        fitting = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(to_unit_range(np.asarray(fitting))))
    return torch.stack(rows)
