"""Names what pictures show, by a trained classifier.

    python pipelines/classify_images.py runs/fashion-mnist photo.png another.jpg --top 3
    python pipelines/classify_images.py runs/fashion-mnist photos/

A line for each picture: its likeliest classes and their probabilities.
"""

import argparse
from pathlib import Path

from mmvit.data.samples import IMAGE_EXTENSIONS
from mmvit.errors import UserError, run_script
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.sampling.pictures import read_picture

AT_ONCE = 64  # pictures in memory


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
    for first in range(0, len(paths), AT_ONCE):
        part = paths[first : first + AT_ONCE]
        found = classifier.classify([read_picture(path) for path in part], options.top)
        for path, classes in zip(part, found, strict=True):
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in classes)}", flush=True)


def pictures_in(path: Path) -> list[Path]:
    """A file itself, of a folder the pictures in it, sorted. Raises UserError where there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not found:
        raise UserError(f"{path} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")
    return found


if __name__ == "__main__":
    run_script(main)
