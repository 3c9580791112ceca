"""Draw part of an image again, or variations of the whole.

    mmvit edit judge.png "man astronaut light skin tone" --keep top --num 4
    mmvit edit apple.png "green apple" --keep 0.3 --guidance-scale 3

--keep says what stays: a half (top, bottom, left, right); a share of the codes, chosen at random for each
image; or a mask, an image file of the same size whose black parts stay and whose white parts are drawn again.
A code (8x8 pixels with the shipped generator) is drawn again as a whole if its part of the mask is more white
than black.

A generator of any order sees all that is kept. One of raster order draws codes from those above them and to
their left; what is kept below only guides the choice among --candidates. What is kept often outweighs the
caption (the lower half of a red apple stays red); a higher --guidance-scale helps.

--extend draws a larger image around the whole one, with a generator whose positions go on beyond its grid
(rotary_2d, sincos_2d).

Writes edited.png, with the original as the image tokenizer shows it on the left, and one file per image in
the folder edited/.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import read_image
from mmvit.errors import refuse_source
from mmvit.progress import with_progress
from mmvit.sampling.candidates import CaptionScorer, seeds_in_parts
from mmvit.sampling.editing import parse_sides
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import check_grid_file, file_name, save_images
from mmvit.sampling.settings import DrawingOptions


def main(
    image: Annotated[Path, Argument(help="the image to edit")],
    caption: Annotated[str, Argument(help="of the new image", show_default=False)] = "",
    keep: Annotated[str, Option(help="what stays: top, bottom, left, right, a share, a mask file")] = "top",
    extend: Annotated[
        str, Option(help="draw around the whole image instead: codes to add, such as left=2,right=2")
    ] = "",
    num: Annotated[int, Option(min=1, help="images")] = 4,
    out: Annotated[Path, Option(help="the grid, a .png, .jpg or .webp file")] = Path("edited.png"),
    *,
    drawing: DrawingOptions,
) -> None:
    check_grid_file(out, columns=1 + num)
    refuse_source(out, image, Path(keep))
    original = read_image(image)
    generator = Generator.from_pretrained(drawing.model)
    settings = drawing.sampling | {"negative": drawing.negative, "candidates": drawing.candidates}
    settings["scorer"] = CaptionScorer.from_pretrained(drawing.scorer) if drawing.scorer else None
    if extend:
        draw = partial(generator.extend, original, caption, **parse_sides(extend))
    else:
        draw = partial(generator.edit, original, caption, keep)
    edited = (
        each
        for number, first_seed in seeds_in_parts(num, drawing.seed, drawing.candidates)
        for each in draw(num_images=number, seed=first_seed, **settings)
    )
    images = ((0, f"{i:03d}-{file_name(caption)}", each) for i, each in enumerate(edited))
    rows = [generator.images(generator.encode([original]))]
    images = with_progress(images, num, "drawing")
    print(save_images(images, out, rows, [caption], ["caption", "original"]))


if __name__ == "__main__":
    run_script(main)
