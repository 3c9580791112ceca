"""Choose the best captions for images, among those in a file.

    mmvit caption apple.png pear.png --captions-file captions.txt --top 5
    mmvit caption apple.png --captions-file captions.txt --model runs/emoji-clip

The model is a generator or a CLIP. A generator's number is log p(image | caption) - log p(image), in nats
over all codes of the image: above 0 the caption makes the image likelier, and if two captions differ by 3 the
first is twenty times as likely. Each caption takes a pass of its own. A CLIP's number is a cosine, from -1 to
1, and much faster.
"""

from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.captions import read_caption_file
from mmvit.data.images import pixels_from_images, read_image
from mmvit.hub import SHIPPED, find_model_folder, read_description
from mmvit.models.clip import CLIP
from mmvit.progress import with_progress
from mmvit.sampling.candidates import CaptionScorer, rank_captions
from mmvit.sampling.generator import Generator
from mmvit.training.distributed import choose_precision


def main(
    images: Annotated[list[Path], Argument(help="image files")],
    captions_file: Annotated[Path, Option(help="a UTF-8 text file with a caption per line")],
    model: Annotated[
        str,
        Option(
            help="a generator or a CLIP: a folder, a run or a Hub repository", show_default="the shipped one"
        ),
    ] = str(SHIPPED),
    top: Annotated[int, Option(min=1, help="captions per image")] = 5,
) -> None:
    captions = read_caption_file(captions_file)
    best = score(model, images, captions).topk(min(top, len(captions)), dim=1)
    for path, values, places in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
        print(path)
        for value, place in zip(values, places, strict=True):
            print(f"  {value:8.2f}  {captions[place]}")


def score(model: str, paths: list[Path], captions: list[str]) -> Tensor:
    """How well each caption fits each image, (images, captions)."""
    images = [read_image(path) for path in paths]
    if read_description(find_model_folder(model))["kind"] == CLIP.kind:
        scorer = CaptionScorer.from_pretrained(model)
        pixels = pixels_from_images(images, *scorer.clip.config.image.height_width)
        return scorer.embed_images(pixels) @ scorer.embed_captions(captions).T
    generator = Generator.from_pretrained(model)
    precision = choose_precision("auto", generator.device)
    shown = with_progress(images, len(images), f"comparing images with {len(captions):,} captions")
    return torch.cat([rank_captions(generator, [image], captions, precision) for image in shown])


if __name__ == "__main__":
    run_script(main)
