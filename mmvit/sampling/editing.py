"""Editing: redraw an image except for the part to keep."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from mmvit.data.images import check_images, images_from_pixels, pixels_from_images, read_image, to_rgb
from mmvit.errors import UserError
from mmvit.sampling.decoding import uniforms
from mmvit.sampling.prompts import Prompt
from mmvit.sampling.settings import check_counts

if TYPE_CHECKING:
    from mmvit.sampling.generator import Generator, Images

HALVES = ("top", "bottom", "left", "right")
MAX_COLOUR = 32  # levels of 255 by which the channels of a mask may differ

Keep = str | float | Path | Image.Image | Tensor  # a half, a share, a mask's file, a mask, codes


def edit(
    generator: "Generator",
    image: Image.Image,
    caption: Prompt = "",
    keep: Keep = "top",
    num_images: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draws `num_images` versions of an image that keep a part of it.

    A generator of any order sees all that stays, and its versions have the image's own pixels there (resized
    to the generator's size), unless a share of the codes stays. In raster order they are as the image
    tokenizer shows them.

    Args:
        keep: what stays: a half ("top", "bottom", "left", "right"); a share of the codes from 0 to 1, drawn
            at random for each version; a mask (Pillow image or its file) of the image's size, black where it
            stays and white where it is drawn again; or a boolean mask of codes (rows, columns), True where
            one stays.
        settings: as for `Generator.generate`; `stream` not where a share stays.

    Raises:
        UserError: for a `keep` that is none of these, or keeps everything.
    """
    check_images([image])
    image = ImageOps.exif_transpose(image)
    if (share := as_share(keep)) is not None:
        if share == 1:
            raise UserError("keep 1 keeps every code, so nothing would change: 0.5 keeps half of them")
        if settings.get("stream"):
            raise UserError("stream works with a mask or a half to keep, not with a share")
        return variations(generator, image, caption, num_images, share, seed, **settings)
    if isinstance(keep, np.ndarray):
        raise UserError("keep: expected a boolean torch tensor (rows, columns), got a NumPy array")
    kept = keep
    if not isinstance(keep, Tensor):
        kept = kept_codes(keep, generator.transformer.config.grid, image.size)
    if kept.all():
        raise UserError("keep: the mask is mostly black for every code, so nothing would change")
    kept = kept[0] if kept.ndim == 3 and len(kept) == 1 else kept
    versions = complete(generator, [image], kept, caption, num_images, seed=seed, **settings)
    if generator.transformer.config.order == "raster":
        return versions
    if settings.get("stream"):
        return ([with_pixels_of(image, version, kept) for version in shown] for shown in versions)
    return [with_pixels_of(image, version, kept) for version in versions]


def extend(
    generator: "Generator",
    image: Image.Image,
    caption: Prompt = "",
    num_images: int = 1,
    *,
    top: int = 0,
    bottom: int = 0,
    left: int = 0,
    right: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draws `num_images` larger images around an image, with so many codes more on each side.

    Args:
        image: resized to the generator's size.
        settings: as for `Generator.draw`.

    Raises:
        UserError: if nothing is added, or the generator's positions do not go on beyond its grid.
    """
    sides = {"top": top, "bottom": bottom, "left": left, "right": right}
    if min(sides.values()) < 0 or not any(sides.values()):
        raise UserError(f"expected 0 or more codes on each side, and at least one in all, got {sides}")
    codes = generator.encode([image])
    larger = generator.with_grid((codes.shape[1] + top + bottom, codes.shape[2] + left + right))
    given = F.pad(codes, (left, right, top, bottom), value=-1)
    versions = larger.generate(caption, num_images, given=given, **settings)
    (own,) = images_from_pixels(pixels_from_images([image], *generator.size))
    factor = generator.image_tokenizer.factor
    if generator.transformer.config.order == "any":
        for version in versions:
            version.paste(own, (left * factor, top * factor))
    return versions


def parse_sides(text: str) -> dict[str, int]:
    """ "right=4,bottom=2" → {"right": 4, "bottom": 2}. Raises UserError for anything else."""
    sides = {}
    for part in text.split(","):
        side, _, number = part.strip().partition("=")
        if side not in HALVES or not number.isdecimal():
            raise UserError(
                f"--extend: expected sides with a number of codes, such as right=4,bottom=2, got {text}"
            )
        sides[side] = int(number)
    return sides


def complete(
    generator: "Generator",
    images: "Images",
    kept: Tensor,
    captions: Prompt | Iterable[Prompt] = "",
    num_images: int = 1,
    **settings: Any,
) -> list[Image.Image]:
    """Draws images again where they are not `kept`.

    A generator of any order sees all kept codes when it draws the others. One of raster order draws each code
    from those before it, so that kept codes that come later do not guide it; with `candidates`, the images
    that those fit best are chosen (`likelihood_of_given`).

    Args:
        images: RGB images, or pixels (images, 3, height, width) in [-1, 1].
        kept: boolean (rows, columns) of codes, or (images, rows, columns); True stays.
        captions: one for all, or one for each image.
        settings: as for `Generator.draw`.

    Returns:
        `num_images` of each image.

    Raises:
        UserError: for a mask that does not fit the grid of codes, or another number of captions.
    """
    codes = generator.encode(images)
    if kept.dtype != torch.bool or kept.shape not in (codes.shape, codes.shape[1:]):
        rows, columns = codes.shape[1:]
        raise UserError(
            f"expected a boolean mask of {rows}x{columns} codes, got {tuple(kept.shape)} of {kept.dtype}"
        )
    given = codes.masked_fill(~kept.to(codes.device), -1)
    return generator.generate(captions, num_images, given=given, **settings)


def with_pixels_of(image: Image.Image, version: Image.Image, kept: Tensor) -> Image.Image:
    """A version of an image with the image's own pixels where codes (rows, columns) are `kept`."""
    (own,) = images_from_pixels(pixels_from_images([image], version.height, version.width))
    mask = Image.fromarray(np.uint8(255) * kept.cpu().numpy().astype(np.uint8))
    return Image.composite(own, version, mask.resize(version.size, Image.Resampling.NEAREST))


def variations(
    generator: "Generator",
    image: Image.Image,
    caption: Prompt = "",
    num_images: int = 4,
    keep: float = 0.5,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draws images that each keep a random share `keep` of the codes of `image`; the j-th is drawn with
    seed + j. Raises UserError for a share outside 0 to 1."""
    check_counts(num_images=num_images)
    generator.defaults.replace({"seed": seed})
    if not 0 <= keep <= 1:
        raise UserError(f"keep: expected a share of the codes from 0 to 1, got {keep}")
    drawn, grid = [], generator.transformer.config.grid
    for own in range(seed, seed + num_images):
        numbers = uniforms([own], 3 * grid[0] * grid[1])[0, -grid[0] * grid[1] :]  # others draw the codes
        drawn += complete(generator, [image], numbers.view(grid) < keep, caption, seed=own, **settings)
    return drawn


def as_share(keep: Keep) -> float | None:
    """A share given as a number or as text, None for anything else."""
    if isinstance(keep, str | int | float):
        try:
            return float(keep)
        except ValueError:
            pass
    return None


def kept_codes(keep: str | Path | Image.Image, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boolean (rows, columns): the codes of a half, or those that a mask for an image of this `size` (width,
    height) keeps. Raises UserError for anything else."""
    rows, columns = grid
    row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    upper, left = (row < rows // 2).expand(grid), (column < columns // 2).expand(grid)
    if keep in HALVES:
        return dict(zip(HALVES, (upper, ~upper, left, ~left), strict=True))[keep]
    mask = keep
    if isinstance(keep, Image.Image):
        mask = to_rgb(ImageOps.exif_transpose(keep))
    else:
        if not isinstance(keep, str | Path) or not Path(keep).is_file():
            choices = ", ".join(HALVES)
            raise UserError(f"keep: expected {choices}, a share such as 0.5, or a mask's file, got {keep}")
        mask = read_image(Path(keep))
    if mask.size != size:
        raise UserError(
            f"keep: expected a mask of the image's size, {size[0]}x{size[1]} pixels, got "
            f"{mask.width}x{mask.height}"
        )
    levels = np.asarray(mask.convert("RGB"), dtype=int)
    if np.ptp(levels, axis=2).max() > MAX_COLOUR:
        raise UserError("keep: expected a mask of black (stays) and white (is drawn again), got colours")
    mask = ImageOps.fit(mask.convert("L"), (columns, rows), Image.Resampling.BOX)
    return torch.tensor(list(mask.tobytes())).view(grid) < 128
