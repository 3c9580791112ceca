"""Measures a generator or an image tokenizer on pictures that it has not seen, and draws what it makes of
them.

    python pipelines/evaluate.py runs/emoji-demo data/emoji --split combinations --out demo.png
    python pipelines/evaluate.py tokenizers/emoji-image data/emoji --split combinations --out tokenizer.png

A generator: held-out loss in nats per image code; retrieval@1 and @5: the share of captions whose generated
picture has its own true picture as the nearest, or among the five nearest, in pixels, of all pictures of the
data set. The same for the image tokenizer's reconstructions of the true pictures is the most that any
generator on these codes can reach. Fréchet distance to the real pictures of the split; copies: pictures that
agree with a training picture, as the tokenizer shows it, to 34 dB or more (marked in the picture; of which
one, the .json says). --seeds 4 measures how much pictures of one caption differ, --clip retrieval in a CLIP's
space, --classifier whether a classifier of ours finds the caption's class (of --classes, shards with the same
keys), --language several languages, --captioned 32 how many of 32 real pictures have their own caption as the
likeliest of all. --keys measures a part of the split, emoji without skin tones by --keys "^(?!.*1f3f[b-f])".
The picture shows caption · real · reconstruction · generated, from the worst to the best. 15 s for 405
captions on 2 cores. MODEL/evaluation-SPLIT.json keeps the figures, of a part of the split
evaluation-SPLIT-LIMIT.json, of certain keys -of-keys.json.

An image tokenizer: PSNR, SSIM, L1, the codes that the split uses, and the Fréchet distance between the
pictures and their reconstructions. The picture shows real and reconstruction from the worst to the best; a
.json beside it keeps the figures, and a second picture, -codes.png, shows how often each code occurs.

Fréchet distances are in the space of 8x8 mean colours or (--features) of a classifier of ours, or of
Inception v3 (FID), whose weights torch-fidelity has.
"""

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch

from mmvit.data.images import parse_size
from mmvit.data.samples import CaptionSample, ClassSample, PixelsSample
from mmvit.data.shards import Sample
from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError, run_script
from mmvit.evaluation.code_use import draw_code_use
from mmvit.evaluation.frechet import feature_space
from mmvit.evaluation.generator_report import (
    Unseen,
    draw_worst_to_best,
    evenly_spread,
    loss_and_retrieval,
    report_generator,
)
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.evaluation.splits import read_split
from mmvit.evaluation.tokenizer_report import draw_tokens_worst_to_best, report_tokenizer
from mmvit.hub import find_model_folder, read_description, shorten, write_json
from mmvit.models.classifier import Classifier
from mmvit.models.registry import IMAGE_TOKENIZERS, load_image_tokenizer
from mmvit.sampling.candidates import CaptionScorer
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import check_grid_file
from mmvit.sampling.settings import SAVED_FIELDS, add_options, given

MOST, BYTES = 16, 4 * 3  # GiB of memory for the pictures; of a pixel
AT_ONCE = 3  # of a measured picture: real, reconstructed or drawn, in between
TRAIN = "train"
UNSEEN = ("combinations", "held-out", "heldout", "test")
# of a generator whose captions in another language are measured, too
OF_LANGUAGE = ("held_out_loss", "retrieval@1", "retrieval@5")


def main() -> None:
    options = parse_arguments()
    check_grid_file(options.out)
    for name in ("rows", "seeds", "limit"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name} {number}: it is 1 or more")
    if options.captioned < 0:
        raise UserError(f"--captioned {options.captioned}: it is 0 or more")
    try:
        re.compile(options.keys)
    except re.error as error:
        raise UserError(f"--keys {options.keys!r} is no regular expression: {error}") from None
    if options.scorer and options.candidates == 1:
        raise UserError("--scorer chooses among --candidates: give 2 of them or more, or leave it out")
    if read_description(find_model_folder(options.model))["kind"] in IMAGE_TOKENIZERS:
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
    check_memory(AT_ONCE * number_of(options.data).get(options.split, 1), options.size, "--size")
    space = feature_space(options.features)
    unseen = read_split(options.data, options.split, PixelsSample(options.size))
    if options.limit:
        chosen = evenly_spread(len(unseen["keys"]), options.limit)
        unseen = {"keys": [unseen["keys"][i] for i in chosen], "pixels": unseen["pixels"][chosen]}
    if len(unseen["pixels"]) < 2:
        raise UserError(
            f"the split {options.split} holds one picture; the Fréchet distance needs two or more"
        )
    report = report_tokenizer(tokenizer, unseen["pixels"], space)
    figures = {"split": options.split, **report.figures}
    kept, drawn = options.out.with_suffix(".json"), options.out.with_name(f"{options.out.stem}-codes.png")
    write_json(figures, kept)
    draw_code_use(report.counts, drawn)
    draw_tokens_worst_to_best(report, unseen["keys"], options.rows).save(options.out)
    show(figures)
    print(f"figures: {kept.resolve()}; use of the codes: {drawn.resolve()}")


def number_of(data: Path) -> dict[str, int]:
    """Samples by split, as the folder's card tells them; empty without one."""
    return read_dataset_card(data).get("samples", {})


def check_memory(pictures: int, size: tuple[int, int], name: str) -> None:
    if (needed := pictures * size[0] * size[1] * BYTES / 2**30) > MOST:
        raise UserError(
            f"{name} {size[0]}x{size[1]}: {pictures:,} of them in memory take {needed:,.0f} GiB, the most is "
            f"{MOST}; take fewer by pipelines/take_share.py"
        )


def evaluate_generator(options: argparse.Namespace) -> None:
    generator = Generator.from_pretrained(options.model)
    numbers = number_of(options.data)
    check_memory(
        sum(numbers.values()) + AT_ONCE * numbers.get(options.split, 1), generator.size, "pictures of"
    )
    first, *others = options.language or ["en"]
    real = read_split(options.data, "*", PixelsSample(generator.size))
    trained = keys_of_train(options)

    def captions(split: str, language: str) -> dict[str, Any]:
        return read_split(options.data, split, CaptionSample([language], falls_back=not options.language))

    def measured(language: str) -> Unseen:
        whole = Unseen.of(captions(options.split, language), real, trained)
        whole = whole.matching(options.keys) if options.keys else whole
        return whole.spread(options.limit) if options.limit else whole

    unseen = measured(first)
    how = generator.defaults.replace(given(options, "seed"))
    settings = how.model_dump(include={*SAVED_FIELDS, "seed"}) | {"candidates": options.candidates}
    scorer = CaptionScorer.from_pretrained(options.scorer) if options.scorer else None
    classifier = read_classifier(options) if options.classifier else None
    report = report_generator(
        generator,
        unseen,
        feature_space(options.features),
        seeds=options.seeds,
        captioned=options.captioned,
        all_captions=captions("*", first)["captions"] if options.captioned else (),
        clip=CaptionScorer.from_pretrained(options.clip) if options.clip else None,
        classifier=classifier,
        labels=read_labels(options, classifier, unseen.keys) if classifier else None,
        scorer=scorer,
        **settings,
    )
    figures = {"split": options.split, "language": first, **report.figures}
    if others:
        figures["languages"] = {first: {name: figures[name] for name in OF_LANGUAGE}}
        for language in others:
            own = measured(language)
            found, _, _ = loss_and_retrieval(
                generator, own, generator.encode(own.pixels), scorer=scorer, **settings
            )
            figures["languages"][language] = {name: found[name] for name in OF_LANGUAGE}
    settings["candidates_drawn"] = settings.pop("candidates")
    if options.model.is_dir():
        kept = {**figures, **settings, "scorer": options.scorer, "data": str(options.data)}
        kept |= {"copied": report.copies} if report.copies else {}
        kept |= {"keys": options.keys} if options.keys else {}
        part = f"-{options.limit}" if options.limit else ""
        of_keys = "-of-keys" if options.keys else ""
        write_json(kept, options.model / f"evaluation-{options.split}{part}{of_keys}.json")
    heading = "caption" if options.split == options.train else "caption, never seen"
    draw_worst_to_best(report, unseen, options.rows, heading).save(options.out)
    show(figures)
    print(
        f"of {figures['captions']} captions of {options.split} {figures['retrieval@1']:.1%} find their own "
        f"picture among {figures['candidates']}, {figures['retrieval@5']:.1%} among the five nearest; the "
        f"tokenizer's own reconstructions {figures['reconstruction_retrieval@1']:.1%}"
    )


def keys_of_train(options: argparse.Namespace) -> list[str]:
    """The keys of the split that the generator has seen; none where that is what is measured, or where there
    is no such split and none was named."""
    there = list(options.data.glob(f"{options.train}-*.tar"))
    if options.train != TRAIN and not there:
        raise UserError(f"--train {options.train}: there are no shards {options.data}/{options.train}-*.tar")
    if not there or options.train == options.split:
        return []
    return read_split(options.data, options.train, keys_alone)["keys"]


def keys_alone(sample: Sample, rng: random.Random) -> dict[str, Any]:
    return {}


def read_classifier(options: argparse.Namespace) -> Classifier:
    """Raises UserError for one that has learnt nothing, or other classes than those of the shards."""
    classifier = ImageClassifier.from_pretrained(options.classifier, "cpu")
    folder = options.classes or options.data
    names = read_dataset_card(folder).get("classes")
    if not classifier.is_trained:
        raise UserError(f"--classifier {options.classifier}: its head is all zeros, it names nothing yet")
    if classifier.named and names and classifier.classes != names:
        raise UserError(
            f"--classifier {options.classifier} knows {shorten(classifier.classes)}, and {folder} has "
            f"{shorten(names)}: give the shards that it learnt from by --classes"
        )
    return classifier.model


def read_labels(options: argparse.Namespace, classifier: Classifier, keys: list[str]) -> dict[str, int]:
    """The class of every picture that has one, by its key, of which some are of `keys`."""
    folder = options.classes or options.data
    found = read_split(folder, "*", ClassSample(classifier.config.num_classes))
    labels = dict(zip(found["keys"], found["labels"].tolist(), strict=True))
    if not labels.keys() & set(keys):
        raise UserError(
            f"no picture of the split {options.split} has a class in {folder}: give shards with the same "
            "keys by --classes"
        )
    return labels


def show(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, own in value.items():
                print(f"  {key}: " + ", ".join(f"{part} {number:.4g}" for part, number in own.items()))
        else:
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run folder, a generator's or an image tokenizer's")
    parser.add_argument("data", type=Path, help="folder of shards with pictures and captions")
    parser.add_argument("--split", help=f"the unseen split (of {', '.join(UNSEEN)} the first that there is)")
    parser.add_argument("--out", type=Path, default=Path("evaluation.png"), help="the picture (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="of the picture, two pictures each (%(default)s)")
    parser.add_argument(
        "--features", type=Path, help="for Fréchet distances a classifier, or Inception's .pth"
    )
    parser.add_argument(
        "--limit", type=int, help="samples measured, evenly spread over a larger split (all of the split)"
    )
    tokenizer = parser.add_argument_group("for an image tokenizer")
    tokenizer.add_argument(
        "--size", type=parse_size, default="64", help="of the pictures, a side or HEIGHTxWIDTH (%(default)s)"
    )
    drawing = parser.add_argument_group("for a generator: how it draws")
    add_options(drawing)
    measured = parser.add_argument_group("for a generator: what is measured")
    measured.add_argument(
        "--language", nargs="+", help="of the captions (en); of further ones loss and retrieval"
    )
    measured.add_argument(
        "--keys", default="", help="a regular expression: only samples in whose key it is found (all)"
    )
    measured.add_argument("--train", default=TRAIN, help="the split it has seen (%(default)s)")
    measured.add_argument("--seeds", type=int, default=1, help="pictures of each caption (%(default)s)")
    measured.add_argument(
        "--captioned",
        type=int,
        default=0,
        help="pictures whose caption is sought among all (%(default)s)",
    )
    measured.add_argument("--clip", help="a CLIP's folder; another one than --scorer, to be fair")
    measured.add_argument("--classifier", type=Path, help="a classifier's folder")
    measured.add_argument("--classes", type=Path, help="shards with `cls` of the same pictures (DATA)")
    options = parser.parse_args()
    options.split = options.split or find_unseen(options.data)
    return options


def find_unseen(data: Path) -> str:
    return next((split for split in UNSEEN if any(data.glob(f"{split}-*.tar"))), UNSEEN[0])


if __name__ == "__main__":
    run_script(main)
