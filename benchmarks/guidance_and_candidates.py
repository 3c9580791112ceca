"""What guidance and candidates buy: retrieval of held-out captions by generated images.

    python benchmarks/guidance_and_candidates.py generators/emoji data/emoji
    python benchmarks/guidance_and_candidates.py generators/emoji data/emoji --scorer runs/emoji-clip

Retrieval@1 and @5 say how often the real image is the nearest, or among the five nearest, of all images of
the data set, in pixels: for each guidance scale, and for the best of 1, 4, 16 and 32 candidates. Candidate
j of a caption has seed + j, so the first 4 are among the 16. They are chosen by the generator's own
likelihood of the caption, and by a CLIP if --scorer names one; the best of all candidates, chosen by
retrieval itself, is the most that any choice can reach. Ten minutes on 2 cores.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mmvit import CaptionScorer, Generator
from mmvit.data.samples import CaptionSample, PixelsSample
from mmvit.errors import run_script
from mmvit.evaluation.held_out import HeldOut
from mmvit.evaluation.retrieval import pixel_ranks, recall
from mmvit.evaluation.splits import read_split

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
NUMBERS = (1, 4, 16, 32)
AT_ONCE = 64  # captions' candidates and their pixels in memory


def main() -> None:
    options = parse_arguments()
    generator = Generator.from_pretrained(options.generator)
    real = read_split(options.data, "*", PixelsSample(generator.size))
    held_out = HeldOut.of(read_split(options.data, options.split, CaptionSample()), real, [])
    settings = {"temperature": options.temperature, "seed": options.seed}
    print(f"{len(held_out.own)} captions among {len(held_out.everything)} images, {settings}\n")
    print("| guidance | retrieval@1 | @5 |\n|---|---|---|")
    for scale in SCALES:
        codes = generator.generate_codes(held_out.captions, guidance_scale=scale, **settings)
        ranks = pixel_ranks(generator.decode(codes).cpu(), held_out.everything, held_out.own)
        print(f"| {scale:g} | {recall(ranks, 1):.1%} | {recall(ranks, 5):.1%} |", flush=True)
    scorer = CaptionScorer.from_pretrained(options.scorer) if options.scorer else None
    ranks, scores = candidates(generator, held_out, scorer, guidance_scale=options.guidance_scale, **settings)
    how = f"guidance {options.guidance_scale:g}, temperature {options.temperature:g}"
    print(f"\n| best of ({how}), chosen by | {' | '.join(map(str, NUMBERS))} |")
    print("|---" * (1 + len(NUMBERS)) + "|")
    for name, score in {**scores, "retrieval itself": -ranks.float()}.items():
        cells = []
        for number in NUMBERS:
            best = score[:, :number].argmax(1, keepdim=True)
            cells.append(f"{recall(ranks.gather(1, best).squeeze(1), 1):.1%}")
        print(f"| {name} | {' | '.join(cells)} |")


def candidates(
    generator: Generator, held_out: HeldOut, scorer: CaptionScorer | None, **settings: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rank of the real image for every candidate, and the candidate's scores by scorer, (captions,
    candidates)."""
    most, ranks, own, clip = max(NUMBERS), [], [], []
    for first in range(0, len(held_out.captions), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        codes = generator.generate_codes(held_out.captions[part], most, **settings)
        repeated = [caption for caption in held_out.captions[part] for _ in range(most)]
        pixels = generator.decode(codes).cpu()
        ranks.append(pixel_ranks(pixels, held_out.everything, held_out.own[part].repeat_interleave(most)))
        own.append(generator.evidence(repeated, codes).cpu())
        if scorer is not None:
            clip.append(scorer.scores(pixels, repeated).cpu())
    scores = {"the generator's own likelihood of the caption": torch.cat(own).view(-1, most)}
    if scorer is not None:
        scores["CLIP"] = torch.cat(clip).view(-1, most)
    return torch.cat(ranks).view(-1, most), scores


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generator", help="a run or a generator's folder")
    parser.add_argument("data", type=Path, help="a folder of shards with images and captions")
    parser.add_argument("--split", default="combinations", help="(%(default)s)")
    parser.add_argument("--scorer", help="a CLIP's folder")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of candidates (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
