"""Measures a generator or an image tokenizer on pictures that it has not seen, and draws what it makes of
them.

    python pipelines/evaluate.py runs/emoji-demo data/emoji --split combinations --out demo.png
    python pipelines/evaluate.py tokenizers/emoji-image data/emoji --split combinations --out tokenizer.png

A generator: held-out loss in nats per image code; retrieval@1 and @5: the share of captions whose generated
picture has its own true picture as the nearest, or among the five nearest, in pixels, of all pictures of the
data set. The same for the image tokenizer's reconstructions of the true pictures is the most that any
generator on these codes can reach. The picture shows caption · real · reconstruction · generated. 12 s for
405 captions on 2 cores. MODEL/evaluation-SPLIT.json keeps the figures.

An image tokenizer: PSNR, SSIM, L1, the codes that the split uses, and the Fréchet distance between the
pictures and their reconstructions, in the space of 8x8 mean colours or (--features) of a classifier of ours.
The picture shows real and reconstruction from the worst to the best; a .json beside it keeps the figures,
and a second picture, -codes.png, shows how often each code occurs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import parse_size
from mmvit.data.samples import CaptionPixelsSample, PixelsSample
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError, run_script
from mmvit.evaluation.code_use import draw_code_use, use_metrics
from mmvit.evaluation.frechet import coarse_pixels, frechet_distance
from mmvit.evaluation.likelihood import mean_loss
from mmvit.evaluation.reconstruction import image_psnr, image_ssim
from mmvit.evaluation.retrieval import pixel_ranks, recall
from mmvit.hub import find_model_folder, read_description, write_json
from mmvit.models.classifier import Classifier
from mmvit.models.image_tokenizer import KINDS, ImageTokenizer, load_image_tokenizer
from mmvit.models.perceptual import fit_pixels
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import check_picture_name, labelled_grid, side_by_side
from mmvit.sampling.pictures import pictures_from_pixels
from mmvit.sampling.rerank import CaptionScorer


def main() -> None:
    options = parse_arguments()
    check_picture_name(options.out)
    if options.rows < 1:
        raise UserError(f"--rows {options.rows}: the picture has 1 row or more")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if read_description(find_model_folder(options.model))["kind"] in KINDS:
        evaluate_image_tokenizer(options)
    else:
        evaluate_generator(options)
    print(f"picture: {options.out.resolve()}")


def evaluate_image_tokenizer(options: argparse.Namespace) -> None:
    tokenizer = load_image_tokenizer(options.model, "cuda" if torch.cuda.is_available() else "cpu")
    height, width = options.size
    if height % tokenizer.factor or width % tokenizer.factor:
        raise UserError(
            f"--size {height}x{width}: {options.model} has a code for every "
            f"{tokenizer.factor}x{tokenizer.factor} pixels; give sides that are multiples of that"
        )
    space, features = feature_space(options.features)
    unseen = read_split(options.data, options.split, PixelsSample(options.size))
    pixels = unseen["pixels"]
    if len(pixels) < 2:
        raise UserError(
            f"the split {options.split} holds one picture; the Fréchet distance needs two or more"
        )
    codes = encode(tokenizer, pixels)
    reconstructed = decode(tokenizer, codes)
    psnr = image_psnr(reconstructed, pixels)
    parts = zip(reconstructed.split(64), pixels.split(64), strict=True)
    counts = torch.bincount(codes.flatten().cpu(), minlength=tokenizer.codebook_size).double()
    figures = {
        "split": options.split,
        "pictures": len(pixels),
        "psnr": psnr.mean().item(),
        "ssim": torch.cat([image_ssim(*each) for each in parts]).mean().item(),
        "l1": ((reconstructed - pixels) / 2).abs().mean().item(),
        **use_metrics(counts),
        f"frechet_distance_{space}": frechet_distance(features(pixels), features(reconstructed)),
    }
    kept, drawn = options.out.with_suffix(".json"), options.out.with_name(f"{options.out.stem}-codes.png")
    write_json(figures, kept)
    draw_code_use(counts, drawn)
    draw_worst_to_best(unseen["keys"], pixels, reconstructed, psnr, options.rows).save(options.out)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"figures: {kept.resolve()}; use of the codes: {drawn.resolve()}")


def feature_space(classifier: Path | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Its name, and pixels (pictures, 3, height, width) → features (pictures, dimensions)."""
    if classifier is None:
        return "pixels-8x8", coarse_pixels
    model = Classifier.from_pretrained(classifier)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        return torch.cat([model.features(fit_pixels(part, model.config)) for part in pixels.split(64)])

    folder = classifier.resolve()
    return (folder.parent if folder.name in ("best", "last") else folder).name, features


def draw_worst_to_best(
    keys: list[str], pixels: Tensor, reconstructed: Tensor, psnr: Tensor, num_rows: int
) -> Image.Image:
    """Real and reconstruction in two halves of `num_rows`: evenly from the worst of the split to its best."""
    order = psnr.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(2 * num_rows, len(order))).round().long()].tolist()
    columns = [pictures_from_pixels(of[chosen]) for of in (pixels, reconstructed)]
    rows = list(zip(*columns, strict=True))
    labels = [f"{keys[i]} {psnr[i]:.1f} dB" for i in chosen]
    halves = [part for part in (slice(None, num_rows), slice(num_rows, None)) if rows[part]]
    headings = ["worst to best", "real", "tokenizer"]
    return side_by_side([labelled_grid(rows[part], labels[part], headings, cell=128) for part in halves])


def evaluate_generator(options: argparse.Namespace) -> None:
    generator = Generator.from_pretrained(options.model)
    size = tuple(side * generator.image_tokenizer.factor for side in generator.transformer.config.grid)
    real = read_split(options.data, "*", CaptionPixelsSample(size, [options.language]))
    unseen = read_split(options.data, options.split, CaptionPixelsSample(size, [options.language]))
    place = {key: i for i, key in enumerate(real["keys"])}
    own = torch.tensor([place[key] for key in unseen["keys"]])

    codes = encode(generator.image_tokenizer, unseen["pixels"])
    drawn = generator.generate_codes(
        unseen["captions"],
        candidates=options.candidates,
        scorer=CaptionScorer.from_pretrained(options.scorer) if options.scorer else None,
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    generated, reconstructed = (decode(generator.image_tokenizer, each) for each in (drawn, codes))
    figures: dict[str, Any] = {
        "split": options.split,
        "captions": len(own),
        "candidates": len(place),
        "held_out_loss": held_out_loss(generator, unseen["captions"], codes),
    }
    for name, pixels in (("retrieval", generated), ("reconstruction_retrieval", reconstructed)):
        ranks = pixel_ranks(pixels, real["pixels"], own)
        figures |= {f"{name}@1": recall(ranks, 1), f"{name}@5": recall(ranks, 5)}
    names = ("guidance_scale", "temperature", "top_k", "top_p", "seed")
    settings = {
        **{name: getattr(options, name) for name in names},
        "candidates_drawn": options.candidates,
        "scorer": options.scorer,
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run folder, a generator's or an image tokenizer's")
    parser.add_argument("data", type=Path, help="folder of shards with pictures and captions")
    parser.add_argument("--split", default="combinations", help="the unseen split (%(default)s)")
    parser.add_argument("--language", default="en", help="of the captions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("evaluation.png"), help="the picture (%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of the picture, two captions each (%(default)s)"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default="64",
        help="side of the pictures, or HEIGHTxWIDTH, for a tokenizer (%(default)s)",
    )
    parser.add_argument("--features", type=Path, help="a classifier's folder, for a tokenizer")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        help="a generator's pictures of which each is the best (%(default)s)",
    )
    parser.add_argument("--scorer", help="a CLIP that chooses; without it the generator itself does")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_split(folder: Path, split: str, decode: PixelsSample) -> dict[str, Any]:
    """All samples of a split, `*` for all splits: {"keys": [...], "pixels": (samples, 3, height, width)}, and
    "captions" where `decode` reads them."""
    stream = ShardStream(f"{folder}/{split}-*.tar", decode, batch_size=256, shuffle_buffer=0, repeat=False)
    batches = list(stream)
    if not batches:
        raise UserError(f"{folder}/{split}-*.tar holds no samples")
    names = [name for name in ("keys", "captions") if name in batches[0]]
    lists = {name: [value for batch in batches for value in batch[name]] for name in names}
    return {**lists, "pixels": torch.cat([batch["pixels"] for batch in batches])}


def encode(tokenizer: ImageTokenizer, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Pixels (pictures, 3, height, width) → codes (pictures, rows, columns)."""
    device = next(tokenizer.parameters()).device
    return torch.cat([tokenizer.encode(part.to(device)) for part in pixels.split(batch_size)])


def decode(tokenizer: ImageTokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """The inverse of `encode`, as far as the tokenizer can; on the CPU."""
    return torch.cat([tokenizer.decode(part).cpu() for part in codes.split(batch_size)])


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
