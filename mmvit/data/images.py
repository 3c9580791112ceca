"""Images: bytes of any common format → RGB pixels of one size, safely; Pillow images ↔ a model's pixels."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmvit.errors import UserError
from mmvit.streams.shards import BadSample

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # nothing that starts another program, as EPS does
MAX_PIXELS = 64_000_000  # at most 12 bytes of memory each
BAND = 2**20  # pixels that are converted at a time
EXIF_ORIENTATION = 0x0112  # 1 (upright) to 8; from 5 on, width and height are exchanged
Fit = Literal["crop", "pad"]


class ImageFacts(NamedTuple):
    """What an image file is before it becomes RGB pixels."""

    size: tuple[int, int]  # (height, width) as shown, that is upright
    mode: str  # Pillow's: RGB, L, RGBA, ...
    is_transparent: bool
    is_turned: bool  # an EXIF tag says how to turn it upright


def parse_size(text: str, name: str = "--size") -> tuple[int, int]:
    """`64` → (64, 64), `64x96` → (64, 96): height and width in pixels. Raises UserError for anything else."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"{name}: expected a side or HEIGHTxWIDTH in pixels, such as 64 or 64x96, got {text}")
    sides = [int(side) for side in sides]
    return sides[0], sides[-1]


def decode_image(
    data: bytes, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes an image to uint8 RGB (height, width, 3).

    It is turned upright by its EXIF tag, transparency is laid over white, and 16 bits are scaled to 8.

    Args:
        size: (height, width) to resize (bicubic, antialiased) and centre-crop to; None keeps the size.
        max_pixels: larger images are refused before they are decompressed; 12 bytes a pixel are needed.

    Raises:
        BadSample: undecodable, truncated or oversize.
    """
    return np.asarray(open_image(data, size, max_pixels))


def open_image(
    data: bytes,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """As `decode_image`, but a Pillow image of mode RGB, and of any of the `formats`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that Pillow mends, and of sizes below our own cap
            image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height > max_pixels:
            raise BadSample("oversize image", f"{width}x{height} pixels, the limit is {max_pixels:,} in all")
        if size is not None:  # a JPEG far larger than needed decodes at 1/2, 1/4 or 1/8
            image.draft(None, (2 * size[1], 2 * size[0]))
        ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
        return image if size is None else fit_image(image, size)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("oversize image", str(error)) from None
    except Exception as error:  # Pillow raises all kinds for damaged files, struct.error and KeyError too
        raise BadSample("undecodable image", f"{error} ({len(data)} bytes)") from None


def formats_of(path: Path) -> Sequence[str]:
    """The formats that a file of your own may have: TIFF too, which nobody else's is read as."""
    return (*FORMATS, "TIFF") if path.suffix.lower() in (".tif", ".tiff") else FORMATS


def fit_image(
    image: Image.Image, size: tuple[int, int], fit: Fit = "crop", pad_colour: str = "white"
) -> Image.Image:
    """Resizes to (height, width); an image of another shape is cropped around its centre, or padded."""
    width_height = size[::-1]
    if image.size == width_height:
        return image
    if fit == "pad":
        return ImageOps.pad(image, width_height, Image.Resampling.BICUBIC, color=pad_colour)
    return ImageOps.fit(image, width_height, Image.Resampling.BICUBIC)


def has_shape(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether height and width are in the proportions of `target`, so that nothing is cropped or padded."""
    return size[0] * target[1] == size[1] * target[0]


def measure_image(data: bytes, formats: Sequence[str] = FORMATS) -> ImageFacts:
    """Reads little more than the header. Expects an image that `open_image` has decoded."""
    image = Image.open(io.BytesIO(data), formats=formats)
    exif = image.getexif() if "exif" in image.info else {}  # for a PNG without, it would decode the pixels
    orientation = exif.get(EXIF_ORIENTATION, 1)
    if orientation not in range(1, 9):  # Pillow ignores it, too
        orientation = 1
    size = image.size if orientation >= 5 else image.size[::-1]
    return ImageFacts(size, image.mode, image.has_transparency_data, orientation != 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode → RGB; a large image in bands, which take less memory than copies of the whole."""
    if image.width * image.height <= BAND or (image.mode == "RGB" and not image.has_transparency_data):
        return whole_to_rgb(image)
    rgb, rows = Image.new("RGB", image.size), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(whole_to_rgb(band), (0, top))
    return rgb


def whole_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale; convert("RGB") would clip it at 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) → float32 (3, height, width) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1.0


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """A Pillow image or uint8 array → PNG bytes."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def read_image(path: Path) -> Image.Image:
    """The RGB image in a file. Raises UserError when it cannot be read."""
    try:
        return open_image(path.read_bytes(), formats=formats_of(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except BadSample as bad:
        raise UserError(f"cannot read {path} as an image ({bad.reason})") from None


def check_images(images: Sequence[Image.Image]) -> None:
    """Raises UserError for a single image, and for a list of anything but Pillow images."""
    if isinstance(images, Image.Image):
        raise UserError("expected a list of images, got a single one: write [image]")
    for number, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise UserError(
                f"image {number}: expected a Pillow image, got {type(image).__name__}: open files with "
                "PIL.Image.open"
            )
        if not min(image.size):
            raise UserError(f"image {number} is empty: {image.width}x{image.height} pixels")


def pixels_from_images(images: Sequence[Image.Image], height: int, width: int, fit: Fit = "crop") -> Tensor:
    """Pixels (images, 3, height, width) in [-1, 1], prepared as those of shards: turned upright, laid over
    white, resized and cropped or padded. Raises UserError for anything but Pillow images of whole numbers."""
    check_images(images)
    rows = []
    for number, image in enumerate(images):
        try:
            upright = to_rgb(ImageOps.exif_transpose(image))
        except ValueError as error:
            raise UserError(f"image {number}: its {error}") from None
        fitted = fit_image(upright, (height, width), fit)
        rows.append(torch.from_numpy(to_unit_range(np.asarray(fitted))))
    return torch.stack(rows)


def images_from_pixels(pixels: Tensor) -> list[Image.Image]:
    """Pixels (images, 3, height, width) in [-1, 1] as RGB images."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]
