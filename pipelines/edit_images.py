"""Draws a part of a picture again with a trained generator, or variations of the whole.

    python pipelines/edit_images.py apple.png "green apple" --keep top --num 4 --out edited.png
    python pipelines/edit_images.py apple.png "red apple" --keep 0.5
    python pipelines/edit_images.py --model runs/emoji apple.png "red apple" --keep mask.png

--keep says what stays: a half (top, bottom, left, right), a random share of the codes, another for each
picture, or a picture of the same size whose white parts are drawn again and whose black ones stay. Codes are
drawn from what is above and left of them; what is kept below guides the choice among --candidates alone.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmvit import CaptionScorer, Generator
from mmvit.errors import UserError, run_script
from mmvit.hub import SHIPPED
from mmvit.sampling.editing import complete, variations
from mmvit.sampling.grids import check_picture_name, labelled_grid
from mmvit.sampling.pictures import read_picture
from mmvit.sampling.settings import add_options, given

HALVES = ("top", "bottom", "left", "right")


def main() -> None:
    options = parse_arguments()
    check_picture_name(options.out)
    if options.num < 1:
        raise UserError(f"--num {options.num}: at least 1 picture is drawn")
    picture = read_picture(options.picture)
    generator = Generator.from_pretrained(options.model)
    settings = given(options, "candidates", "seed", "negative")
    if options.scorer:
        settings["scorer"] = CaptionScorer.from_pretrained(options.scorer)
    try:
        share = float(options.keep)
    except ValueError:
        kept = kept_codes(options.keep, generator.transformer.config.grid, picture.size)
        drawn = complete(generator, [picture], kept, options.caption, options.num, **settings)
    else:
        drawn = variations(generator, picture, options.caption, options.num, share, **settings)
    own = generator.pictures(generator.encode([picture]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid([[*own, *drawn]], [options.caption], ["caption", "given"]).save(options.out)
    print(f"{len(drawn)} drawn, the given one on the left: {options.out}")


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
    parser.add_argument("--keep", default="top", help="(%(default)s)")
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
    mask = read_picture(Path(keep))
    if mask.size != size:
        raise UserError(
            f"--keep {keep}: the mask is {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}; "
            "they have to be of one size"
        )
    mask = ImageOps.fit(mask.convert("L"), (columns, rows), Image.Resampling.BOX)
    return torch.tensor(list(mask.tobytes())).view(grid) < 128


if __name__ == "__main__":
    run_script(main)
