"""Draws pictures from captions with a trained generator.

    python pipelines/sample_images.py runs/emoji-demo "thumbs up dark skin tone" --num 4 \\
        --guidance-scale 2 --temperature 0.3 --top-k 100 --top-p 0.95 --seed 0 --out samples.png

writes samples.png, a labelled grid, and each picture alone in the folder samples/, named by its seed, with
which it can be drawn again. A 64-code picture of the
demo's generator takes about 0.1 s on one core.
"""

import argparse
import re
import time
from pathlib import Path

from mmvit import CaptionScorer, Generator
from mmvit.data.captions import read_caption_file
from mmvit.errors import UserError, run_script
from mmvit.sampling.grids import check_picture_name, labelled_grid


def main() -> None:
    options = parse_arguments()
    captions = options.captions + (read_caption_file(options.captions_file) if options.captions_file else [])
    check_picture_name(options.out)
    if options.num < 1:
        raise UserError(f"--num {options.num}: at least 1 picture is drawn")
    generator = Generator.from_pretrained(options.model)
    start = time.perf_counter()
    drawn = generator.draw(
        captions,
        num_images=options.num,
        negative=options.negative,
        candidates=options.candidates,
        scorer=CaptionScorer.from_pretrained(options.scorer) if options.scorer else None,
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    pictures = generator.pictures(drawn.codes)
    seconds = time.perf_counter() - start
    rows = [pictures[i : i + options.num] for i in range(0, len(pictures), options.num)]
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for i, (caption, row) in enumerate(zip(captions, rows, strict=True)):
        for j, picture in enumerate(row):
            seed = drawn.seeds[i * options.num + j]
            picture.save(folder / f"{i:03d}-{file_name(caption)}-seed{seed}.png")
    labelled_grid(rows, captions).save(options.out)
    number = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    print(f"{number} in {seconds:.1f} s: {options.out}, and each alone in {folder}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a generator's folder or a Hub repository")
    parser.add_argument("captions", nargs="*", help="what to draw; '' draws unconditionally")
    parser.add_argument("--captions-file", type=Path, help="a UTF-8 text file with a caption on each line")
    parser.add_argument("--num", type=int, default=1, help="pictures of each caption (%(default)s)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="above 1 follows the caption more closely (%(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest code (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest codes (all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest codes of this total probability (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="picture j of a caption has seed + j (%(default)s)"
    )
    parser.add_argument("--negative", default="", help="a caption that guidance leads away from")
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        help="pictures drawn for each that is kept, the best by the model's own likelihood of the caption "
        "or by --scorer (%(default)s)",
    )
    parser.add_argument("--scorer", help="a CLIP's folder or Hub repository (pipelines/train_clip.py)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid (%(default)s)")
    return parser.parse_args()


def file_name(caption: str) -> str:
    """A caption as part of a file name: letters and digits of any script, at most 40 characters."""
    return re.sub(r"\W+", "-", caption)[:40].strip("-") or "unconditional"


if __name__ == "__main__":
    run_script(main)
