"""Draw images from captions, with the emoji generator that ships with mmvit or with one of yours.

    mmvit sample "red apple" --num 4
    mmvit sample "thumbs up dark skin tone" "rocket" --model runs/emoji-demo --num 4 --guidance-scale 2

--watch shows the images in the terminal as they are drawn: as graphics if it has them (Kitty, iTerm2, sixel),
otherwise as blocks in colour.

Writes samples.png, a labelled grid, and one file per image in the folder samples/, named by its seed, which
draws the same image again. A 64-code image of the shipped generator takes about 0.1 s on one core.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.captions import read_caption_file
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.sampling.candidates import DRAWN_TOGETHER, CaptionScorer, seeds_in_parts
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import check_grid_file, file_name, save_images
from mmvit.sampling.settings import DrawingOptions, explicit_options
from mmvit.sampling.streaming import WATCHED
from mmvit.sampling.terminal import check_terminal, show_in_terminal


def main(
    captions: Annotated[
        list[str] | None, Argument(help="what to draw; '' draws an image of anything", show_default=False)
    ] = None,
    captions_file: Annotated[Path | None, Option(help="a UTF-8 text file with a caption per line")] = None,
    num: Annotated[int, Option(min=1, help="images per caption")] = 1,
    out: Annotated[Path, Option(help="the grid, a .png, .jpg or .webp file")] = Path("samples.png"),
    *,
    drawing: DrawingOptions,
    batch_size: Annotated[
        int | None, Option(help="images drawn at a time; fewer when memory runs out (default: 64)")
    ] = None,
    watch: Annotated[
        bool, Option("--watch", help="show the images in the terminal as they are drawn")
    ] = False,
) -> None:
    if watch:
        check_terminal()
    captions = (captions or []) + (read_caption_file(captions_file) if captions_file else [])
    check_grid_file(out, len(captions), num)
    if not captions:
        raise UserError("no captions to draw: give at least one; '' draws an image of anything")
    generator = Generator.from_pretrained(drawing.model)
    settings = drawing.sampling | explicit_options(batch_size=batch_size)
    how = generator.defaults.replace(settings)
    if "" in captions and 0 < how.temperature < 1:
        print(
            f"note: at temperature {how.temperature:g} an empty caption draws mostly the likeliest image of "
            "all, often a blank one; --temperature 1 draws all kinds"
        )
    settings |= {"negative": drawing.negative, "candidates": drawing.candidates}
    settings["scorer"] = CaptionScorer.from_pretrained(drawing.scorer) if drawing.scorer else None
    images = draw_in_parts(generator, captions, num, drawing.seed, settings, watch)
    if not watch:
        images = with_progress(images, len(captions) * num, "drawing")
    print(save_images(images, out, [[] for _ in captions], captions))


def draw_in_parts(
    generator: Generator,
    captions: list[str],
    num: int,
    seed: int,
    settings: dict[str, Any],
    watch: bool = False,
) -> Iterator[tuple[int, str, Image.Image]]:
    """The place of its caption, the name and the image, of every image. They are drawn in parts, so that each
    part can be saved before the next is drawn."""
    together = max(1, DRAWN_TOGETHER // num)  # captions
    for first in range(0, len(captions), together):
        group = captions[first : first + together]
        for number, first_seed in seeds_in_parts(num, seed, settings["candidates"]):
            if watch:
                seeds = [first_seed + j for j in range(number)] * len(group)
                how = {**settings, "seed": first_seed, "share": WATCHED}
                frames = generator.generate(group, number, stream=True, **how)
                images = show_in_terminal(frames)
            else:
                drawn = generator.draw(group, number, seed=first_seed, **settings)
                seeds, images = drawn.seeds, generator.images(drawn.codes)
            for i, image in enumerate(images):
                place = first + i // number
                yield place, f"{place:03d}-{file_name(captions[place])}-seed{seeds[i]}", image


if __name__ == "__main__":
    run_script(main)
