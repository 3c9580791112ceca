"""Measure a model on held-out data: a classifier, generator, image tokenizer, CLIP or joint model.

    mmvit evaluate runs/emoji-demo data/emoji --out demo.png
    mmvit evaluate runs/fashion-mnist data/fashion-mnist --shift 1 --mirror

The split is the held-out one that the data have (combinations, held-out, test, ...), and of a run the export
that its recipe selects is measured; the first line says which. The figures are printed and kept in a .json:
OUT.json, of a generator MODEL/evaluation-SPLIT.json. Anything that takes longer than five seconds shows its
progress.

A classifier: top-1 and top-5 accuracy, that of every class, calibration error. OUT shows which class is taken
for which. OUT-saliency.png shows, from the most confident mistakes to the most confident hits, what
predictions depend on (gradient times input) beside attention rollout, which only tells what they are mixed
from. --probe also judges the frozen features: ridge regression on 1, 5, 10 and 25 images per class, nearest
neighbours, and a linear probe.

A generator: held-out loss in nats per image code; retrieval@1 and @5, the share of captions whose generated
image has its own real image as the nearest, or among the five nearest, in pixels, of all images of the data
set (the same for reconstructions is the most that any generator on these codes can reach); the Fréchet
distance; copies, which agree with a training image, as the tokenizer shows it, to 34 dB (unless the image
agrees as closely with most other generated ones: an untrained generator draws one blank image for every
caption). Of a large data set these are a sample (--sample), and the figures say of how many. OUT shows
caption, real image, reconstruction and generated image, from worst to best. 405 captions take 15 s
on 2 cores.

An image tokenizer: PSNR, SSIM, L1 and the Fréchet distance of reconstructions, and the codes that the split
uses. OUT shows reconstructions from worst to best, OUT-codes.png how often each code occurs.

A CLIP: how often it finds an image's caption among all, and a caption's image.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import parse_size
from mmvit.evaluation.evaluate import Part, evaluate
from mmvit.sampling.settings import (
    GuidanceScaleOption,
    NumStepsOption,
    ScorerOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    explicit_options,
)
from mmvit.streams.address import place

CLASSIFIER, GENERATOR, TOKENIZER = "For a classifier", "For a generator", "For an image tokenizer"


def main(
    model: Annotated[str, Argument(help="a run, a model's folder or a Hub repository")],
    data: Annotated[Path, Argument(help="a folder of shards with images", parser=place)],
    split: Annotated[str | None, Option(help="the split (default: the held-out one that there is)")] = None,
    part: Annotated[
        Part | None, Option("--as", help="measure this part of a joint model (default: both)")
    ] = None,
    out: Annotated[Path, Option(help="the image to draw")] = Path("evaluation.png"),
    rows: Annotated[int | None, Option(help="rows of the image, two samples each (default: 8)")] = None,
    limit: Annotated[
        int | None,
        Option(
            help="measure this many samples, evenly spread over the split (default: all; of a CLIP 10,000); "
            "of a generator, copies are then counted only with --train"
        ),
    ] = None,
    features: Annotated[
        Path | None,
        Option(
            help="measure Fréchet distances in the features of this classifier, or of Inception v3 (FID) by "
            "torch-fidelity's .pth file (default: mean colours of 8x8 cells)"
        ),
    ] = None,
    language: Annotated[
        str | None,
        Option(help="languages of the captions, as en,de; images are generated anew for each (default: en)"),
    ] = None,
    train: Annotated[
        str | None,
        Option(help="the split that --probe learns from, and generators copy from (default: train)"),
    ] = None,
    sample: Annotated[
        int | None,
        Option(
            help="of larger data sets use so many images, evenly spread: for --probe to learn from (default: "
            "100,000), or for retrieval and copies of a generator to look among (default: as many as take "
            "4 GiB, 87,381 of 64x64 pixels)"
        ),
    ] = None,
    size: Annotated[
        str | None,
        Option(help="image size for a tokenizer, a side or HEIGHTxWIDTH (default: its run's, else 64)"),
    ] = None,
    shift: Annotated[
        int | None,
        Option(
            help="average a classifier over copies shifted by this many pixels: 5 times slower (default: 0)"
        ),
    ] = None,
    mirror: Annotated[
        bool, Option("--mirror", help="average a classifier over mirrored copies, too: twice slower")
    ] = False,
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Option(help="fp32 or bf16 for a classifier; bf16 is faster and differs in the last digits"),
    ] = None,
    probe: Annotated[
        bool, Option("--probe", help="judge a classifier's features; reads the whole training split")
    ] = False,
    keys: Annotated[
        str | None, Option(help="measure only samples in whose key this regular expression is found")
    ] = None,
    seeds: Annotated[
        int | None,
        Option(
            help="measure the diversity of this many images per caption, generated in addition (default: 1)"
        ),
    ] = None,
    captioned: Annotated[
        int | None,
        Option(
            help="search the caption of this many real images among all captions: 10 to 30 s for each with "
            "4,000 captions on 2 cores (default: 0)"
        ),
    ] = None,
    clip: Annotated[
        str | None, Option(help="a CLIP in whose space a generator is measured; not --scorer, to be fair")
    ] = None,
    classifier: Annotated[
        str | None, Option(help="a classifier that looks for the caption's class in generated images")
    ] = None,
    classes: Annotated[
        Path | None, Option(help="shards with the classes of the same images (default: DATA)", parser=place)
    ] = None,
    guidance_scale: GuidanceScaleOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    num_steps: NumStepsOption = None,
    seed: Annotated[
        int | None, Option(help="image j of a caption is drawn with seed + j (default: 0)")
    ] = None,
    candidates: Annotated[
        int | None,
        Option(help="draw this many candidates for each image, which takes this many times as long"),
    ] = None,
    scorer: ScorerOption = None,
) -> None:
    options = explicit_options(
        rows=rows, limit=limit, features=features, train=train, sample=sample,
        language=language,
        size=parse_size(size) if size else None, shift=shift, mirror=mirror or None, precision=precision,
        probe=probe or None, keys=keys, seeds=seeds, captioned=captioned, clip=clip, classifier=classifier,
        classes=classes, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
        num_steps=num_steps, seed=seed, candidates=candidates, scorer=scorer,
    )  # fmt: skip
    figures = evaluate(model, data, split, part=part, out=out, **options)
    show(figures)
    drawn = figures.get("generator", figures)
    if "retrieval@1" in drawn:
        sampled = drawn["candidates"] < drawn["images_of_data"]
        of_all = f" (a sample of {drawn['images_of_data']:,})" if sampled else ""
        print(
            f"{drawn['retrieval@1']:.1%} of {drawn['captions']} captions find their own image among "
            f"{drawn['candidates']}{of_all}, {drawn['retrieval@5']:.1%} among the five nearest; "
            f"reconstructions {drawn['reconstruction_retrieval@1']:.1%}"
        )
    print(f"images: {out.resolve()} and beside it")


def show(figures: dict[str, Any], indent: str = "") -> None:
    """Prints figures, one a line, nested ones below their name."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value:.4g}" if isinstance(value, float) else f"{indent}{name}: {value}")


if __name__ == "__main__":
    run_script(main)
