"""Images in a terminal while they are drawn: as graphics (sixel or Kitty's protocol) where the terminal has
them, otherwise as half blocks in colour."""

import logging
import os
import sys
from collections.abc import Iterable

from PIL import Image

from mmvit.errors import UserError

MOST_COLUMNS = 8  # images side by side
GAP = 4  # pixels between images
LEAST_CELLS = 4  # of the terminal, in width and height
CELLS = 32  # of the terminal for the width of an image


def show_in_terminal(frames: Iterable[list[Image.Image]]) -> list[Image.Image]:
    """Shows every list of images in place of the one before it; returns the last.

    Raises:
        UserError: where the output is no terminal, or one of unknown size.
    """
    check_terminal()
    from rich.console import Console
    from rich.live import Live

    logging.getLogger("textual_image").setLevel(logging.ERROR)  # of terminals that do not answer
    from textual_image.renderable import Image as InTerminal  # asks the terminal for what it can show

    console, images = Console(), []
    with Live(console=console, auto_refresh=False) as live:
        for images in frames:
            width = min(console.width, CELLS * min(MOST_COLUMNS, len(images)))
            live.update(InTerminal(side_by_side(images), width=width, height="auto"), refresh=True)
    return images


def check_terminal() -> None:
    """Raises UserError where images cannot be shown while they are drawn."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("--watch shows images in a terminal; input or output is not one: leave it out")
    if min(os.get_terminal_size(sys.stdout.fileno())) < LEAST_CELLS:
        raise UserError("--watch: this terminal is too small, or does not say how large it is: leave it out")


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one size in rows of at most `MOST_COLUMNS`, as one image on white."""
    columns = min(MOST_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    width, height = (side + GAP for side in images[0].size)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
