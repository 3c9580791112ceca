"""The picture that the README opens with: emoji drawn from captions, marked where a caption's combination was
held out of training.

    python benchmarks/showcase.py generators/emoji data/emoji assets/emoji.png

Every row is four pictures of one caption, by seeds 0 to 3 and the generator's own settings; the first
column is the real emoji. Nothing is chosen but the captions. Japanese letters need a font of the system that
has them (matplotlib-fontja brings one).
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
UNSEEN = "combinations"


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
    for split in ("train", UNSEEN):
        pictures = read_split(options.data, split, PixelsSample(generator.size))["pixels"]
        for language in LANGUAGES:
            captions = read_split(options.data, split, CaptionSample([language]))["captions"]
            for caption, pixels in zip(captions, pictures, strict=True):
                found[caption] = (pixels, split == UNSEEN)
    rows, labels = [], []
    for caption in SHOWN:
        if caption not in found:
            raise UserError(f"{options.data} has no {caption!r}")
        pixels, is_unseen = found[caption]
        rows.append([*images_from_pixels(pixels.unsqueeze(0)), *generator.generate([caption], NUM_IMAGES)])
        labels.append(caption + (" · NEVER SEEN" if is_unseen else ""))
    half = (len(rows) + 1) // 2
    headings = ["caption", "real", "drawn"]
    sheets = [labelled_grid(rows[part], labels[part], headings) for part in (slice(half), slice(half, None))]
    side_by_side(sheets).save(options.out)


if __name__ == "__main__":
    run_script(main)
