"""Names what pictures show, by a trained classifier.

    python pipelines/classify_images.py runs/fashion-mnist photo.png another.jpg --top 3
    python pipelines/classify_images.py runs/fashion-mnist photos/

A line for each picture: its likeliest classes and their probabilities. Of a folder those files are read that
end as pictures do (jpg, png, webp, gif, bmp, tif), and the others counted. Pictures that cannot be read are
named at the end, after the lines of the others.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from mmvit.data.images import read_image
from mmvit.data.samples import IMAGE_EXTENSIONS
from mmvit.errors import UserError, run_script
from mmvit.evaluation.image_classifier import ImageClassifier

AT_ONCE = 64  # pictures in memory
ENDINGS = (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder, an exported classifier or a Hub repository")
    parser.add_argument("pictures", nargs="+", type=Path, help="files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes of each (%(default)s)")
    options = parser.parse_args()
    paths = [path for named in options.pictures for path in pictures_in(named)]
    classifier = ImageClassifier.from_pretrained(options.model)
    bad: list[str] = []
    for first in range(0, len(paths), AT_ONCE):
        pictures = read_pictures(paths[first : first + AT_ONCE], bad)
        if not pictures:
            continue
        found = classifier.classify(list(pictures.values()), options.top)
        for path, classes in zip(pictures, found, strict=True):
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in classes)}", flush=True)
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} pictures could not be read: {'; '.join(bad)}")


def pictures_in(path: Path) -> list[Path]:
    """A file itself, of a folder the pictures in it, sorted. Raises UserError where there is none."""
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.iterdir() if each.is_file())
    found = [each for each in files if each.suffix.lower().lstrip(".") in ENDINGS]
    if not found:
        raise UserError(f"{path} holds no pictures ({', '.join(ENDINGS)})")
    if others := len(files) - len(found):
        print(f"{path}: {others} other files are left out", file=sys.stderr)
    return found


def read_pictures(paths: list[Path], bad: list[str]) -> dict[Path, Image.Image]:
    """The pictures that can be read; what is wrong with the others is added to `bad`."""
    pictures = {}
    for path in paths:
        try:
            pictures[path] = read_image(path)
        except UserError as error:
            bad.append(str(error))
    return pictures


if __name__ == "__main__":
    run_script(main)
