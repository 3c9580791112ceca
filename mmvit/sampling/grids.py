"""Images side by side with their captions, as one image; and the files that they are saved in."""

import importlib.util
import re
import textwrap
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmvit.errors import UserError

GAP, TEXT_SIZE, CELL, LABEL_WIDTH = 4, 12, 96, 200  # pixels
MAX_SIDE = {".png": 2**20, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # pixels, by file format
MAX_PIXELS = 400_000_000  # of a grid: 1.2 GB in memory

# DejaVu Sans comes with matplotlib, which is found here without being imported: that takes half a second
DEJAVU = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"


@lru_cache
def font(text: str = "", size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans (Latin, Greek, Cyrillic, Arabic), or if it lacks a letter of `text`, the system's first
    font that has them all."""
    path = DEJAVU
    if missing_letters(text, DEJAVU):
        path = next((other for other in system_fonts() if not missing_letters(text, other)), DEJAVU)
    return ImageFont.truetype(path, size)


@lru_cache
def system_fonts() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    return [Path(found) for found in sorted(findSystemFonts()) if found.endswith((".ttf", ".otf", ".ttc"))]


def missing_letters(text: str, path: Path) -> set[str]:
    """The letters of `text` that a font has no glyph for."""
    if text.isascii() and text.isprintable():  # every font has these, and the import takes half a second
        return set()
    from matplotlib.ft2font import FT2Font

    try:
        font_file = FT2Font(str(path))
    except RuntimeError:  # a font format that matplotlib does not read
        return {*text}
    return {letter for letter in text if not letter.isspace() and not font_file.get_char_index(ord(letter))}


def readable(text: str) -> str:
    """`text` with code points, such as U+8D64, for letters that no font here can show, and a warning."""
    missing = missing_letters(text, Path(font(text).path))
    if not missing:
        return text
    warnings.warn(
        f"no font can show {''.join(letter for letter in dict.fromkeys(text) if letter in missing)}; labels "
        "show code points instead. To see the letters, install a font: apt-get install fonts-noto-cjk",
        stacklevel=3,
    )
    replaced = "".join(f" U+{ord(letter):04X} " if letter in missing else letter for letter in text)
    return " ".join(replaced.split())


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    headings: Sequence[str] = (),
    cell: int = CELL,
    label_width: int = LABEL_WIDTH,
) -> Image.Image:
    """One row per label: the label on the left, its images to the right, each scaled to fit `cell` pixels.

    Args:
        rows: images; rows may differ in length.
        labels: one per row, wrapped to `label_width` pixels and cut after as many lines as fit.
        headings: text above the columns, the first above the labels.
    """
    top = TEXT_SIZE + 3 * GAP if headings else GAP
    sheet = Image.new(
        "RGB", sheet_size(len(rows), max(len(row) for row in rows), top, cell, label_width), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = GAP if column == 0 else label_width + (column - 1) * (cell + GAP)
        pen.text((x, GAP), heading, fill="#555555", font=font())
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + i * (cell + GAP)
        label = readable(label or "(no caption)")
        lines = wrapped(label, label_width - 2 * GAP)
        pen.multiline_text(
            (GAP, y + GAP), "\n".join(lines[: cell // (TEXT_SIZE + 4)]), fill="black", font=font(label)
        )
        for j, image in enumerate(row):
            sheet.paste(fit(image, cell), (label_width + j * (cell + GAP), y))
    return sheet


def wrapped(text: str, width: int) -> list[str]:
    """The start of `text`, as much as a label can show, in lines of at most `width` pixels."""
    text, letter_widths = text[: 4 * width], font(text)
    letters = width // 2  # per line; even the narrowest letters fill it
    while max(map(letter_widths.getlength, lines := textwrap.wrap(text, letters))) > width and letters > 1:
        letters -= 1
    return lines


def sheet_size(
    rows: int, columns: int, top: int = GAP, cell: int = CELL, label_width: int = LABEL_WIDTH
) -> tuple[int, int]:
    """Width and height of a grid, in pixels."""
    return label_width + columns * (cell + GAP) + GAP, top + rows * (cell + GAP)


def check_grid_file(out: Path, rows: int = 1, columns: int = 1) -> None:
    """Makes the folder of `out`. Raises UserError unless a grid of so many images can be saved there."""
    if (suffix := out.suffix.lower()) not in MAX_SIDE:
        raise UserError(f"--out {out}: expected a file name that ends in .png, .jpg or .webp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        is_folder = out.is_dir()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    if is_folder:
        raise UserError(f"--out {out}: is a folder; name a file")
    width, height = sheet_size(rows, columns)
    if max(width, height) > MAX_SIDE[suffix] or width * height > MAX_PIXELS:
        raise UserError(
            f"--out {out}: a grid of {rows:,} x {columns:,} images would have {width:,}x{height:,} pixels; a "
            f"{suffix} file holds at most {MAX_SIDE[suffix]:,} a side and {MAX_PIXELS:,} in all: draw fewer"
        )


def folder_of_images(out: Path) -> Path:
    """Makes the folder beside the grid `out` for its single images. Raises UserError if a file is in the
    way."""
    folder = out.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot make the folder {folder} for the single images ({error.strerror}); choose "
            "another name"
        ) from None
    return folder


def file_name(caption: str) -> str:
    """A caption as part of a file name: up to 40 letters and digits of any script; for a caption without any,
    such as an emoji, its code points."""
    points = "-".join(f"{ord(character):x}" for character in caption[:6] if not character.isspace())
    return re.sub(r"\W+", "-", caption)[:40].strip("-") or points or "unconditional"


def save_images(
    images: Iterable[tuple[int, str, Image.Image]],
    out: Path,
    rows: Sequence[list[Image.Image]],
    labels: Sequence[str],
    headings: Sequence[str] = (),
) -> str:
    """Saves each of `images`, (row, name, image), as soon as it is there in the folder beside `out`, then a
    grid of all in `out`.

    Args:
        rows: what the rows of the grid begin with.

    Returns:
        a sentence that says what was saved and where.
    """
    start, folder, names = time.perf_counter(), folder_of_images(out), []
    for row, name, image in images:
        image.save(folder / f"{name}.png")
        rows[row].append(image)
        names.append(name)
    labelled_grid(rows, labels, headings).save(out)
    count = "1 image" if len(names) == 1 else f"{len(names)} images"
    return f"{count} in {time.perf_counter() - start:.1f} s: {out}, and one file each in {folder}/"


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Several sheets as one, left to right."""
    both = Image.new(
        "RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), "white"
    )
    x = 0
    for sheet in sheets:
        both.paste(sheet, (x, 0))
        x += sheet.width
    return both


def two_halves(
    columns: Sequence[Sequence[Image.Image]], labels: Sequence[str], headings: Sequence[str], num_rows: int
) -> Image.Image:
    """Rows of images, passed as columns: the first `num_rows` on the left, the rest on the right."""
    rows = list(zip(*columns, strict=True))
    halves = [part for part in (slice(None, num_rows), slice(num_rows, None)) if rows[part]]
    return side_by_side([labelled_grid(rows[part], labels[part], headings, cell=128) for part in halves])


def fit(image: Image.Image, cell: int) -> Image.Image:
    """The image scaled to fit cell × cell pixels; small ones by whole factors, which keeps them crisp."""
    scale = cell / max(image.size)
    scale = int(scale) if scale >= 1 else scale
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
