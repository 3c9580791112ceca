"""Draws a part of a picture again with a trained generator, or variations of the whole.

    python pipelines/edit_images.py judge.png "man astronaut light skin tone" --keep top --num 4
    python pipelines/edit_images.py apple.png "green apple" --keep 0.3
    python pipelines/edit_images.py --model runs/emoji apple.png "green apple" --keep mask.png

--keep says what stays: a half (top, bottom, left, right), a random share of the codes, another for each
picture, or a picture of the same size whose white parts are drawn again and whose black ones stay. A code
(8x8 pixels of the shipped generator's) is drawn again as a whole where the mask is more white than black.
Codes are drawn from what is above and left of them; what is kept below guides the choice among --candidates
alone. What is kept often outweighs the caption (the lower half of a red apple stays red), less so at a higher
--guidance-scale. Writes edited.png, with the given picture on the left as the image tokenizer has it, and
each drawn one alone in the folder edited/, numbered and named by the caption.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmvit import CaptionScorer, Generator
from mmvit.data.images import read_image
from mmvit.data.writing import with_progress
from mmvit.errors import UserError, refuse_source, run_script
from mmvit.hub import SHIPPED
from mmvit.sampling.candidates import parts_of_seeds
from mmvit.sampling.editing import complete, variations
from mmvit.sampling.grids import check_grid_file, file_name, folder_of_images, labelled_grid
from mmvit.sampling.settings import add_options, given

MOST_COLOUR = 32  # levels of 255 between the channels of a mask
HALVES = ("top", "bottom", "left", "right")


def main() -> None:
    options = parse_arguments()
    if options.num < 1:
        raise UserError(f"--num {options.num}: at least 1 picture is drawn")
    check_grid_file(options.out, columns=1 + options.num)
    refuse_source(options.out, options.picture, Path(options.keep))
    picture = read_image(options.picture)
    generator = Generator.from_pretrained(options.model)
    draw = drawer(generator, picture, options)
    row = generator.images(generator.encode([picture]))
    folder = folder_of_images(options.out)
    parts = parts_of_seeds(options.num, options.seed, options.candidates)
    pictures = (picture for number, seed in parts for picture in draw(number, seed))
    for drawn in with_progress(pictures, options.num, "drawing"):
        drawn.save(folder / f"{len(row) - 1:03d}-{file_name(options.caption)}.png")
        row.append(drawn)
    labelled_grid([row], [options.caption], ["caption", "given"]).save(options.out)
    print(f"{len(row) - 1} drawn, the given one on the left: {options.out}, and each alone in {folder}/")


def drawer(
    generator: Generator, picture: Image.Image, options: argparse.Namespace
) -> Callable[[int, int], list[Image.Image]]:
    """What draws so many pictures from a seed on."""
    settings = given(options, "candidates", "negative")
    if options.scorer:
        settings["scorer"] = CaptionScorer.from_pretrained(options.scorer)
    share = as_number(options.keep)
    if share is None:
        kept = kept_codes(options.keep, generator.transformer.config.grid, picture.size)
        if kept.all():
            raise UserError(
                f"--keep {options.keep}: no code's part is mostly white, so nothing would be drawn again"
            )
        return lambda number, seed: complete(
            generator, [picture], kept, options.caption, number, seed=seed, **settings
        )
    if share == 1:
        raise UserError("--keep 1: all codes would stay and nothing be drawn again; 0.5 is a half of them")
    return lambda number, seed: variations(
        generator, picture, options.caption, number, share, seed, **settings
    )


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=SHIPPED,
        help="a run folder, a generator's folder or a Hub repository (the shipped)",
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("caption", nargs="?", default="", help="of the new picture; any picture without one")
    parser.add_argument(
        "--keep", default="top", help="what stays: a half, a share as 0.5, or a mask's file (%(default)s)"
    )
    parser.add_argument("--num", type=int, default=4, help="pictures (%(default)s)")
    parser.add_argument("--negative", default="", help="a caption that guidance leads away from")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("edited.png"), help="(%(default)s)")
    return parser.parse_args()


def kept_codes(keep: str, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boolean (rows, columns) of a half, or of a mask's picture of this `size` (width, height). Raises
    UserError for anything else."""
    rows, columns = grid
    row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    upper, left = (row < rows // 2).expand(grid), (column < columns // 2).expand(grid)
    if keep in HALVES:
        return dict(zip(HALVES, (upper, ~upper, left, ~left), strict=True))[keep]
    if not Path(keep).is_file():
        raise UserError(f"--keep {keep}: it is {', '.join(HALVES)}, a share such as 0.5, or a picture's file")
    mask = read_image(Path(keep))
    if mask.size != size:
        raise UserError(
            f"--keep {keep}: the mask is {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}; "
            "they have to be of one size"
        )
    levels = np.asarray(mask.convert("RGB"), dtype=int)
    if np.ptp(levels, axis=2).max() > MOST_COLOUR:
        raise UserError(
            f"--keep {keep} is a picture in colour; a mask is black where the picture stays and white where "
            "it is drawn again"
        )
    mask = ImageOps.fit(mask.convert("L"), (columns, rows), Image.Resampling.BOX)
    return torch.tensor(list(mask.tobytes())).view(grid) < 128


if __name__ == "__main__":
    run_script(main)
