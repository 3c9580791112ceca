"""Between pixels and pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmvit.data.images import open_image
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


def pixels_from_pictures(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Pictures, resized and centre-cropped as those of shards are, and over white, as pixels (pictures, 3,
    height, width) in [-1, 1]."""
    rows = []
    for picture in pictures:
        with_alpha = ImageOps.fit(picture.convert("RGBA"), (width, height), Image.Resampling.BICUBIC)
        white = Image.new("RGBA", with_alpha.size, "white")
        levels = np.array(Image.alpha_composite(white, with_alpha).convert("RGB"))
        rows.append(torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(rows)
