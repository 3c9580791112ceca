"""Measures a generator on captions that it has not seen, and draws what it makes of them.

    python pipelines/evaluate.py runs/emoji-demo data/emoji --split combinations --out demo.png

Held-out loss in nats per image code; retrieval@1 and @5: the share of captions whose generated picture has
its own true picture as the nearest, or among the five nearest, in pixels, of all pictures of the data set.
The same for the image tokenizer's reconstructions of the true pictures is the most that any generator on
these codes can reach. The picture shows caption · real · reconstruction · generated;
RUN/evaluation-SPLIT.json keeps the figures. 12 s for 405 captions on 2 cores.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.samples import CaptionPixelsSample
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError, run_script
from mmvit.evaluation.likelihood import mean_loss
from mmvit.evaluation.retrieval import pixel_ranks, recall
from mmvit.hub import write_json
from mmvit.sampling.generator import Generator, pictures_from_pixels
from mmvit.sampling.grids import labelled_grid, side_by_side


def main() -> None:
    options = parse_arguments()
    generator = Generator.from_pretrained(options.model)
    size = tuple(side * generator.image_tokenizer.config.factor for side in generator.transformer.config.grid)
    real = read_split(options.data, "*", size, options.language)
    unseen = read_split(options.data, options.split, size, options.language)
    place = {key: i for i, key in enumerate(real["keys"])}
    own = torch.tensor([place[key] for key in unseen["keys"]])

    codes = encode(generator, unseen["pixels"])
    drawn = generator.generate_codes(
        unseen["captions"],
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    generated, reconstructed = decode(generator, drawn), decode(generator, codes)
    figures: dict[str, Any] = {
        "split": options.split,
        "captions": len(own),
        "candidates": len(place),
        "held_out_loss": held_out_loss(generator, unseen["captions"], codes),
    }
    for name, pixels in (("retrieval", generated), ("reconstruction_retrieval", reconstructed)):
        ranks = pixel_ranks(pixels, real["pixels"], own)
        figures |= {f"{name}@1": recall(ranks, 1), f"{name}@5": recall(ranks, 5)}
    settings = {
        name: getattr(options, name) for name in ("guidance_scale", "temperature", "top_k", "top_p", "seed")
    }
    if options.model.is_dir():
        write_json({**figures, **settings}, options.model / f"evaluation-{options.split}.json")
    draw_sheet(unseen, reconstructed, generated, options.rows).save(options.out)
    print(
        f"{options.split}: held-out loss {figures['held_out_loss']:.3f} nats per code, "
        f"retrieval@1 {figures['retrieval@1']:.1%}, @5 {figures['retrieval@5']:.1%} "
        f"({len(own)} unseen captions, {len(place)} candidates; "
        f"the image tokenizer alone: @1 {figures['reconstruction_retrieval@1']:.1%})"
    )
    print(f"picture: {options.out.resolve()}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run folder or a generator's folder")
    parser.add_argument("data", type=Path, help="folder of shards with pictures and captions")
    parser.add_argument("--split", default="combinations", help="the unseen split (%(default)s)")
    parser.add_argument("--language", default="en", help="of the captions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("evaluation.png"), help="the picture (%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of the picture, two captions each (%(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_split(folder: Path, split: str, size: tuple[int, int], language: str) -> dict[str, Any]:
    """All samples of a split, `*` for all splits: {"keys": [...], "captions": [...], "pixels": (samples, 3,
    height, width)}."""
    stream = ShardStream(
        f"{folder}/{split}-*.tar",
        CaptionPixelsSample(size, [language]),
        batch_size=256,
        shuffle_buffer=0,
        repeat=False,
    )
    batches = list(stream)
    if not batches:
        raise UserError(f"{folder}/{split}-*.tar holds no samples")
    lists = {name: [value for batch in batches for value in batch[name]] for name in ("keys", "captions")}
    return {**lists, "pixels": torch.cat([batch["pixels"] for batch in batches])}


def encode(generator: Generator, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Pixels (pictures, 3, height, width) → codes (pictures, rows, columns)."""
    parts = pixels.split(batch_size)
    return torch.cat([generator.image_tokenizer.encode(part.to(generator.device)) for part in parts])


def decode(generator: Generator, codes: Tensor, batch_size: int = 64) -> Tensor:
    """The inverse of `encode`, as far as the tokenizer can; on the CPU."""
    return torch.cat([generator.image_tokenizer.decode(part).cpu() for part in codes.split(batch_size)])


def held_out_loss(generator: Generator, captions: list[str], codes: Tensor, batch_size: int = 64) -> float:
    """Cross-entropy of the true codes given their captions, nats per code."""
    caption_ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    batches = [
        {"caption_ids": ids, "codes": true.flatten(1)}
        for ids, true in zip(caption_ids.split(batch_size), codes.split(batch_size), strict=True)
    ]
    return mean_loss(generator.transformer, batches, count="codes")["image_loss"]


def draw_sheet(
    unseen: dict[str, Any], reconstructed: Tensor, generated: Tensor, num_rows: int
) -> Image.Image:
    """The picture: captions spread evenly over the split, `num_rows` on the left and as many on the right."""
    step = max(1, len(unseen["keys"]) // (2 * num_rows))
    chosen = list(range(0, len(unseen["keys"]), step))[: 2 * num_rows]
    columns = [
        pictures_from_pixels(pixels[chosen]) for pixels in (unseen["pixels"], reconstructed, generated)
    ]
    rows = list(zip(*columns, strict=True))
    captions = [unseen["captions"][i] for i in chosen]
    headings = ["caption, never seen", "real", "tokenizer", "generated"]
    halves = [part for part in (slice(None, num_rows), slice(num_rows, None)) if rows[part]]
    return side_by_side([labelled_grid(rows[part], captions[part], headings, cell=128) for part in halves])


if __name__ == "__main__":
    run_script(main)
