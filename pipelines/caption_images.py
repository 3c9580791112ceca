"""Names pictures: of many captions, those that a generator finds likeliest of each.

    python pipelines/caption_images.py apple.png pear.png --captions-file captions.txt --top 5
    python pipelines/caption_images.py --model runs/emoji-clip apple.png --captions-file captions.txt

The number before a caption is, of a generator, log p(picture | caption) - log p(picture), in nats over all
codes of the picture: above 0 the caption makes it likelier, and of two captions that differ by 3 the first is
twenty times as likely. It takes a pass of its own for each caption. A CLIP compares pictures and captions in
its space, at once: the number is a cosine, from -1 to 1.
"""

import argparse
from pathlib import Path

from mmvit import CaptionScorer, Generator
from mmvit.data.captions import read_caption_file
from mmvit.data.images import pixels_from_images, read_image
from mmvit.errors import UserError, run_script
from mmvit.hub import SHIPPED, find_model_folder, read_description
from mmvit.sampling.candidates import rank_captions
from mmvit.training.distributed import choose_precision


def main() -> None:
    options = parse_arguments()
    if options.top < 1:
        raise UserError(f"--top {options.top}: at least 1 caption is shown")
    captions = read_caption_file(options.captions_file)
    pictures = [read_image(path) for path in options.pictures]
    if read_description(find_model_folder(options.model))["kind"] == "clip":
        scorer = CaptionScorer.from_pretrained(options.model)
        pixels = pixels_from_images(pictures, *scorer.clip.config.image.height_width)
        scores = scorer.embed_images(pixels) @ scorer.embed_captions(captions).T
    else:
        generator = Generator.from_pretrained(options.model)
        precision = choose_precision("auto", generator.device)
        scores = rank_captions(generator, pictures, captions, precision)
    best = scores.topk(min(options.top, len(captions)), dim=1)
    found = zip(options.pictures, best.values.tolist(), best.indices.tolist(), strict=True)
    for path, values, places in found:
        print(path)
        for value, place in zip(values, places, strict=True):
            print(f"  {value:8.2f}  {captions[place]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=SHIPPED, help="a generator's run or folder, or a CLIP's (the shipped generator)"
    )
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--captions-file", type=Path, required=True, help="a caption on each line, UTF-8")
    parser.add_argument("--top", type=int, default=5, help="captions shown of each picture (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
