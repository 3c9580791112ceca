"""Draws pictures from captions, with the generator of emoji that is shipped or with one of yours.

    python pipelines/sample_images.py "thumbs up" "man judge light skin tone" --num 4
    python pipelines/sample_images.py --model runs/emoji-demo "thumbs up dark skin tone" --num 4 \\
        --guidance-scale 2 --temperature 0.3 --top-k 100 --top-p 0.95 --seed 0 --out samples.png

writes samples.png, a labelled grid, and each picture alone in the folder samples/, named by its seed, with
which it can be drawn again. A 64-code picture of the demo's generator takes about 0.1 s on one core.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmvit import CaptionScorer, Generator
from mmvit.data.captions import read_caption_file
from mmvit.data.writing import with_progress
from mmvit.errors import UserError, run_script
from mmvit.hub import SHIPPED
from mmvit.sampling.candidates import DRAWN_TOGETHER, parts_of_seeds
from mmvit.sampling.grids import check_grid_file, file_name, folder_of_images, labelled_grid
from mmvit.sampling.settings import add_options, given


def main() -> None:
    options = parse_arguments()
    captions = options.captions + (read_caption_file(options.captions_file) if options.captions_file else [])
    if options.num < 1:
        raise UserError(f"--num {options.num}: at least 1 picture is drawn")
    check_grid_file(options.out, len(captions), options.num)
    if not captions:
        raise UserError("no captions to draw; give at least one, '' for an unconditional picture")
    generator = Generator.from_pretrained(options.model)
    how = generator.defaults.but(given(options))
    if "" in captions and 0 < how.temperature < 1:
        print(
            f"note: a picture without a caption is the likeliest of all at temperature {how.temperature:g}, "
            "often an empty one; --temperature 1 draws as many kinds as there are"
        )
    start = time.perf_counter()
    folder = folder_of_images(options.out)
    rows: list[list[Image.Image]] = [[] for _ in captions]
    total = len(captions) * options.num
    parts = with_progress(draw_in_parts(generator, captions, options), total, "drawing")
    for place, seed, picture in parts:
        picture.save(folder / f"{place:03d}-{file_name(captions[place])}-seed{seed}.png")
        rows[place].append(picture)
    seconds = time.perf_counter() - start
    labelled_grid(rows, captions).save(options.out)
    number = "1 picture" if total == 1 else f"{total} pictures"
    print(f"{number} in {seconds:.1f} s: {options.out}, and each alone in {folder}/")


def draw_in_parts(
    generator: Generator, captions: list[str], options: argparse.Namespace
) -> Iterator[tuple[int, int, Image.Image]]:
    """The place of its caption, the seed and the picture, of all pictures, drawn in parts of which each is
    saved before the next one is begun."""
    settings = given(options, "batch_size")
    scorer = CaptionScorer.from_pretrained(options.scorer) if options.scorer else None
    together = max(1, DRAWN_TOGETHER // options.num)  # captions
    for first in range(0, len(captions), together):
        group = captions[first : first + together]
        for number, seed in parts_of_seeds(options.num, options.seed, options.candidates):
            drawn = generator.draw(
                group, number, negative=options.negative, candidates=options.candidates, scorer=scorer,
                seed=seed, **settings,
            )  # fmt: skip
            for i, picture in enumerate(generator.images(drawn.codes)):
                yield first + i // number, drawn.seeds[i], picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=SHIPPED,
        help="a run folder, a generator's folder or a Hub repository (the shipped generators/emoji)",
    )
    parser.add_argument("captions", nargs="*", help="what to draw; '' draws unconditionally")
    parser.add_argument("--captions-file", type=Path, help="a UTF-8 text file with a caption on each line")
    parser.add_argument("--num", type=int, default=1, help="pictures of each caption (%(default)s)")
    add_options(parser)
    parser.add_argument(
        "--batch-size", type=int, help="pictures drawn at a time, fewer where memory is short (64)"
    )
    parser.add_argument("--negative", default="", help="a caption that guidance leads away from")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
