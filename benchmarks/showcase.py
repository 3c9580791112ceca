"""The picture that the README opens with: emoji drawn from captions in several languages, marked where a
caption's combination was held out of training.

    python benchmarks/showcase.py generators/emoji data/emoji assets/emoji.png

Every row is four pictures of one caption, by seeds 0 to 3 and the generator's own settings; the first
column is the real emoji. Nothing is chosen but the captions.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from PIL import Image

from mmvit import Generator
from mmvit.data.captions import read_caption
from mmvit.data.images import decode_image
from mmvit.data.samples import Sample
from mmvit.errors import UserError, run_script
from mmvit.evaluation.splits import read_split
from mmvit.sampling.grids import check_picture_name, labelled_grid, side_by_side

SHOWN = (  # English caption, language that it is drawn from
    ("red apple", "en"), ("red apple", "ja"), ("red apple", "de"),
    ("woman astronaut dark skin tone", "en"), ("astronaut dark skin tone", "en"),
    ("astronaut dark skin tone", "fr"),
    ("man judge light skin tone", "en"), ("waving hand medium skin tone", "en"),
    ("waving hand medium skin tone", "zh"), ("woman fairy dark skin tone", "en"),
    ("man fairy dark skin tone", "en"), ("police officer medium skin tone", "ru"),
)  # fmt: skip
LANGUAGES = {
    "en": "English", "de": "German", "es": "Spanish", "fr": "French", "ja": "Japanese", "ru": "Russian",
    "zh": "Chinese",
}  # fmt: skip
NUM_IMAGES, SIDE = 4, 64
UNSEEN = "combinations"


class Captioned:
    """→ {"captions": {language: caption}, "pictures": Pillow image}."""

    needs = (("png",), ("json",))

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        captions = {language: read_caption(sample, [language], rng) for language in LANGUAGES}
        pixels = decode_image(sample.files["png"], (SIDE, SIDE))
        return {"captions": captions, "pictures": Image.fromarray(pixels)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generator")
    parser.add_argument("data", type=Path, help="a folder of pipelines/prepare_emoji.py")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    check_picture_name(options.out)
    generator = Generator.from_pretrained(options.generator)
    found = {}
    for split in ("train", UNSEEN):
        whole = read_split(options.data, split, Captioned())
        for captions, picture in zip(whole["captions"], whole["pictures"], strict=True):
            found[captions["en"]] = (captions, picture, split == UNSEEN)
    rows, labels = [], []
    for english, language in SHOWN:
        if english not in found:
            raise UserError(f"{options.data} has no {english!r}")
        captions, picture, is_unseen = found[english]
        rows.append([picture, *generator.generate([captions[language]], NUM_IMAGES)])
        foreign = "" if language == "en" else f", in {LANGUAGES[language]}"
        labels.append(f"{english}{foreign}" + (" · NEVER SEEN" if is_unseen else ""))
    half = (len(rows) + 1) // 2
    headings = ["caption", "real", "drawn"]
    sheets = [labelled_grid(rows[part], labels[part], headings) for part in (slice(half), slice(half, None))]
    side_by_side(sheets).save(options.out)


if __name__ == "__main__":
    run_script(main)
