"""The image at the top of the README: emoji drawn from captions, marked if the combination was held out.

    python benchmarks/showcase.py generators/emoji data/emoji assets/emoji.png

Each row has four images of one caption, with seeds 0 to 3 and the generator's own settings; the first column
is the real emoji. Only the captions are chosen. Japanese letters need a system font that has them
(matplotlib-fontja brings one).
"""

import argparse
from pathlib import Path

from mmvit import Generator
from mmvit.data.images import images_from_pixels
from mmvit.data.samples import CaptionSample, PixelsSample
from mmvit.errors import UserError, run_script
from mmvit.evaluation.splits import read_split
from mmvit.sampling.grids import check_grid_file, labelled_grid, side_by_side

LANGUAGES = ("en", "ja", "de")
SHOWN = (
    "red apple", "赤リンゴ", "thumbs up dark skin tone", "woman astronaut dark skin tone",
    "man judge light skin tone", "ear dark skin tone", "rocket", "roter apfel",
    "police officer medium skin tone", "waving hand medium skin tone", "woman fairy dark skin tone",
    "office worker medium skin tone",
)  # fmt: skip
NUM_IMAGES = 4
HELD_OUT = "combinations"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generator")
    parser.add_argument("data", type=Path, help="a folder of mmvit prepare emoji")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    check_grid_file(options.out)
    generator = Generator.from_pretrained(options.generator)
    found = {}
    for split in ("train", HELD_OUT):
        images = read_split(options.data, split, PixelsSample(generator.size))["pixels"]
        for language in LANGUAGES:
            captions = read_split(options.data, split, CaptionSample([language]))["captions"]
            for caption, pixels in zip(captions, images, strict=True):
                found[caption] = (pixels, split == HELD_OUT)
    rows, labels = [], []
    for caption in SHOWN:
        if caption not in found:
            raise UserError(f"{options.data} has no {caption!r}")
        pixels, is_held_out = found[caption]
        rows.append([*images_from_pixels(pixels.unsqueeze(0)), *generator.generate([caption], NUM_IMAGES)])
        labels.append(caption + (" · NEVER SEEN" if is_held_out else ""))
    half = (len(rows) + 1) // 2
    headings = ["caption", "real", "drawn"]
    sheets = [labelled_grid(rows[part], labels[part], headings) for part in (slice(half), slice(half, None))]
    side_by_side(sheets).save(options.out)


if __name__ == "__main__":
    run_script(main)
