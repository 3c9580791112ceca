"""Classify images with a trained classifier.

    mmvit classify runs/fashion-mnist photo.png another.jpg --top 3
    mmvit classify runs/pets photos/ --fit pad      # if the data were made by mmvit shards --fit pad

Prints a line per image: its likeliest classes and their probabilities. Of a folder, files that end as images
do (jpg, png, webp, gif, bmp, tif) are read, and the others counted. Images that cannot be read are listed at
the end.
"""

import sys
from pathlib import Path
from typing import Annotated

from PIL import Image
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import Fit, read_image
from mmvit.data.samples import IMAGE_EXTENSIONS
from mmvit.errors import UserError
from mmvit.evaluation.image_classifier import ImageClassifier

AT_ONCE = 64  # images in memory
ENDINGS = (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")


def main(
    model: Annotated[str, Argument(help="a run, an exported classifier or a Hub repository")],
    images: Annotated[list[Path], Argument(help="image files, or folders of them")],
    top: Annotated[int, Option(min=1, help="classes per image")] = 3,
    fit: Annotated[
        Fit,
        Option(
            help="crop images of another shape than the model's around the centre, or pad them with white"
        ),
    ] = "crop",
) -> None:
    paths = [path for named in images for path in images_in(named)]
    classifier = ImageClassifier.from_pretrained(model)
    bad: list[str] = []
    for first in range(0, len(paths), AT_ONCE):
        readable = read_images(paths[first : first + AT_ONCE], bad)
        if not readable:
            continue
        found = classifier.classify(list(readable.values()), top, fit=fit)
        for path, classes in zip(readable, found, strict=True):
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in classes)}", flush=True)
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} images could not be read: {'; '.join(bad)}")


def images_in(path: Path) -> list[Path]:
    """A file itself, or the images in a folder, sorted. Raises UserError if there are none."""
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.iterdir() if each.is_file())
    found = [each for each in files if each.suffix.lower().lstrip(".") in ENDINGS]
    if not found:
        raise UserError(f"{path} holds no images ({', '.join(ENDINGS)})")
    if others := len(files) - len(found):
        print(f"{path}: skipped {others} other files", file=sys.stderr)
    return found


def read_images(paths: list[Path], bad: list[str]) -> dict[Path, Image.Image]:
    """The images that can be read; what is wrong with the others is added to `bad`."""
    images = {}
    for path in paths:
        try:
            images[path] = read_image(path)
        except UserError as error:
            bad.append(str(error))
    return images


if __name__ == "__main__":
    run_script(main)
