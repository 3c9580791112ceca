"""Pictures side by side with their captions, as one picture."""

import re
import textwrap
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mmvit.errors import UserError

GAP, TEXT_SIZE, CELL, LABEL_WIDTH = 4, 12, 96, 200  # pixels
MOST_PIXELS = {".png": 2**20, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # of a side, by format
MOST_IN_ALL = 400_000_000  # 1.2 GB in memory


DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # which matplotlib brings along


@lru_cache
def font(text: str = "", size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans (Latin, Greek, Cyrillic, Arabic), or the first font of the system that has all letters of
    `text`, if there is one."""
    path = DEJAVU
    if missing(text, DEJAVU):
        path = next((other for other in system_fonts() if not missing(text, other)), DEJAVU)
    return ImageFont.truetype(path, size)


@lru_cache
def system_fonts() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    return [Path(found) for found in sorted(findSystemFonts()) if found.endswith((".ttf", ".otf", ".ttc"))]


def missing(text: str, path: Path) -> set[str]:
    """The characters of `text` that a font has no picture of."""
    from matplotlib.ft2font import FT2Font

    try:
        table = FT2Font(str(path))
    except RuntimeError:  # of a format that it does not read
        return {*text}
    return {letter for letter in text if not letter.isspace() and not table.get_char_index(ord(letter))}


def readable(text: str) -> str:
    """`text`, with the code points of characters that no font here shows, as U+8D64, and a warning."""
    unknown = missing(text, Path(font(text).path))
    if unknown:
        shown = "".join(letter for letter in dict.fromkeys(text) if letter in unknown)
        warnings.warn(
            f"no font here shows {shown}: labels have code points instead; one that does "
            "may be had by apt-get install fonts-noto-cjk",
            stacklevel=3,
        )
    told = "".join(f" U+{ord(letter):04X} " if letter in unknown else letter for letter in text)
    return " ".join(told.split()) if unknown else text


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    headings: Sequence[str] = (),
    cell: int = CELL,
    label_width: int = LABEL_WIDTH,
) -> Image.Image:
    """One row a label: the label on the left, its pictures to the right, each scaled to fit `cell` pixels.

    Args:
        rows: pictures; rows may differ in length.
        labels: one a row, wrapped to `label_width` pixels and cut after as many lines as fit.
        headings: words above the columns, the first above the labels.
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
        for j, picture in enumerate(row):
            sheet.paste(fit(picture, cell), (label_width + j * (cell + GAP), y))
    return sheet


def wrapped(text: str, width: int) -> list[str]:
    """The beginning of `text`, as much as a label shows, in lines of `width` pixels at most."""
    text, shown = text[: 4 * width], font(text)
    letters = width // 2  # in a line; there is none so narrow
    while max(map(shown.getlength, lines := textwrap.wrap(text, letters))) > width and letters > 1:
        letters -= 1
    return lines


def sheet_size(
    rows: int, columns: int, top: int = GAP, cell: int = CELL, label_width: int = LABEL_WIDTH
) -> tuple[int, int]:
    """Width and height of a grid, in pixels."""
    return label_width + columns * (cell + GAP) + GAP, top + rows * (cell + GAP)


def check_picture_name(out: Path, rows: int = 1, columns: int = 1) -> None:
    """Makes the folder of `out`. Raises UserError unless a grid of so many pictures can be saved there."""
    if (suffix := out.suffix.lower()) not in MOST_PIXELS:
        raise UserError(f"--out {out}: name a .png, .jpg or .webp file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        taken = out.is_dir()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written, {error.strerror}") from None
    if taken:
        raise UserError(f"--out {out} is a folder; name a file that may be written")
    width, height = sheet_size(rows, columns)
    if max(width, height) > MOST_PIXELS[suffix] or width * height > MOST_IN_ALL:
        most = f"a {suffix} has sides of {MOST_PIXELS[suffix]:,} at most, and a sheet {MOST_IN_ALL:,} in all"
        raise UserError(
            f"--out {out}: {rows:,} captions of {columns:,} pictures make a sheet of {width:,}x{height:,} "
            f"pixels; {most}: draw fewer at a time"
        )


def folder_of_pictures(out: Path) -> Path:
    """The folder beside the grid `out` for each picture alone, made. Raises UserError if a file is there."""
    folder = out.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: each picture alone would go into the folder {folder}, which cannot be made "
            f"({error.strerror}); name another picture"
        ) from None
    return folder


def file_name(caption: str) -> str:
    """A caption as part of a file name: letters and digits of any script, at most 40 characters; the code
    points of one that has none, as of emoji."""
    points = "-".join(f"{ord(character):x}" for character in caption[:6] if not character.isspace())
    return re.sub(r"\W+", "-", caption)[:40].strip("-") or points or "unconditional"


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Several sheets as one, from left to right."""
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
    """Rows of pictures, given by columns, the first `num_rows` on the left and the rest on the right."""
    rows = list(zip(*columns, strict=True))
    halves = [part for part in (slice(None, num_rows), slice(num_rows, None)) if rows[part]]
    return side_by_side([labelled_grid(rows[part], labels[part], headings, cell=128) for part in halves])


def fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture scaled to lie within cell × cell pixels; small ones grow by whole factors, so codes stay
    crisp."""
    scale = cell / max(picture.size)
    scale = int(scale) if scale >= 1 else scale
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
