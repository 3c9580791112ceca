"""A generator on held-out captions, compared with the real images and with what its image tokenizer makes of
those."""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.data.samples import CaptionSample, ClassSample, PixelsSample
from mmvit.errors import MissingData, UserError
from mmvit.evaluation.frechet import FeatureSpace, feature_space
from mmvit.evaluation.generated import COPY, all_alike, diversity, nearest
from mmvit.evaluation.held_out import HeldOut, evenly_spread
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.evaluation.likelihood import generator_loss
from mmvit.evaluation.retrieval import caption_ranks, pixel_ranks, recalls
from mmvit.evaluation.splits import (
    BYTES_PER_PIXEL,
    Only,
    check_memory,
    find_split,
    listed,
    num_samples,
    read_split,
    splits_in,
)
from mmvit.evaluation.tokenizer_report import reconstruct
from mmvit.files import whole_file, write_json
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.models.resnet import ResNet
from mmvit.progress import with_progress
from mmvit.sampling.candidates import CaptionScorer, rank_captions
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import two_halves
from mmvit.sampling.settings import SAVED_FIELDS, explicit_options
from mmvit.streams.address import Address, place
from mmvit.streams.shards import Sample, split_of
from mmvit.training.distributed import choose_precision

TRAIN = "train"
SAMPLE_MEMORY = 4  # GiB
IN_MEMORY = 3  # copies of each measured image: real, reconstructed, generated
OF_LANGUAGE = ("held_out_loss", "retrieval@1", "retrieval@5")  # figures of each further language


def evaluate_generator(
    model: Path,
    data: Path,
    split: str,
    out: Path | None = None,
    *,
    rows: int = 8,
    limit: int | None = None,
    keys: str = "",
    language: str | Sequence[str] = (),
    train: str | None = None,
    features: str | Path | None = None,
    seeds: int = 1,
    captioned: int = 0,
    clip: str | Path | None = None,
    classifier: str | Path | None = None,
    classes: str | Path | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    candidates: int = 1,
    scorer: str | Path | None = None,
    sample: int | None = None,
) -> dict[str, Any]:
    """Generates an image for every caption of a split and measures it (`report_generator`).

    In memory are pixels of the captions' own images, generated images and reconstructions, and of a sample of
    the data set among which retrieval and copies look.

    Args:
        out: draws the captions there from worst to best, `rows` on either side, and writes the figures to
            MODEL/evaluation-SPLIT.json.
        limit: measures so many captions, evenly spread over the split, and searches copies only if `train`
            is named: this reconstructs the training images of the sample.
        keys: measures only the samples in whose key this regular expression is found.
        language: of the captions, English by default; loss and retrieval are also measured in further ones,
            as "en,de" or a list.
        train: the split that the generator was trained on, searched for copies; `train` by default.
        classes: shards with the classes of the same images, for `classifier`; `data` by default.
        guidance_scale, temperature, top_k, top_p, num_steps: by default those that the model's folder names.
        sample: of a larger data set, so many images, evenly spread, and the captions' own are candidates of
            retrieval; copies are searched among those of them that are of `train`. By default as many as take
            4 GiB: 87,381 of 64x64 pixels.

    Raises:
        UserError: for figures that the data do not allow.
    """
    for name, number, least in (
        ("rows", rows, 1), ("seeds", seeds, 1), ("limit", limit, 1), ("captioned", captioned, 0),
        ("sample", sample, 1),
    ):  # fmt: skip
        if number is not None and number < least:
            raise UserError(f"--{name} must be at least {least}, got {number}")
    try:
        re.compile(keys)
    except re.error as error:
        raise UserError(f"--keys {keys!r} is not a regular expression: {error}") from None
    if scorer and candidates == 1:
        raise UserError("--scorer chooses among candidates: add --candidates 2 or more")
    generator = Generator.from_pretrained(model)
    of_train = split_of_train(data, split, train)
    there, measured = num_samples(data, "*"), num_samples(data, split)
    most = min(there, sample or sample_of_memory(generator.size))
    check_memory(most + IN_MEMORY * min(measured, limit or measured), generator.size)

    def captions_of(split: str, language: str, most: int | None = None) -> dict[str, Any]:
        return read_split(data, split, CaptionSample([language], falls_back=not languages), most)

    def chosen(captions: dict[str, Any], real: dict[str, Any], trained: Sequence[str] = ()) -> HeldOut:
        whole = HeldOut.of(captions, real, trained)
        whole = whole.matching(keys) if keys else whole
        return whole.spread(limit) if limit else whole

    languages = listed(language)
    first, *others = languages or ["en"]
    captions = {code: captions_of(split, code) for code in (first, *others)}
    real = read_split(data, "*", PixelsOfSplit(generator.size), most)
    if most < there:
        own = {key for each in captions.values() for key in chosen(each, {**each, "pixels": None}).keys}
        add_missing(real, own, data, split, generator.size)
        captions = {code: only_of(each, own) for code, each in captions.items()}
    trained = [key for key, name in zip(real["keys"], real["splits"], strict=True) if name == of_train]
    trained = [] if limit and train is None else trained
    held_out = chosen(captions[first], real, trained)
    further = {code: chosen(captions[code], real, trained) for code in others}
    how = generator.defaults.replace(
        explicit_options(
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_steps=num_steps,
            seed=seed,
        )
    )
    settings = how.model_dump(include={*SAVED_FIELDS, "seed"})
    drawing = {
        **settings,
        "candidates": candidates,
        "scorer": CaptionScorer.from_pretrained(scorer) if scorer else None,
    }
    network, labels = (
        read_labels(classifier, place(classes or data), held_out.keys) if classifier else (None, None)
    )
    report = report_generator(
        generator,
        held_out,
        feature_space(features),
        seeds=seeds,
        captioned=captioned,
        all_captions=captions_of("*", first, most)["captions"] if captioned else (),
        clip=CaptionScorer.from_pretrained(clip) if clip else None,
        classifier=network,
        labels=labels,
        **drawing,
    )
    figures = {"split": split, "language": first, **report.figures, "images_of_data": there}
    if others:
        figures["languages"] = {first: {name: figures[name] for name in OF_LANGUAGE}}
    for number, (code, own) in enumerate(further.items(), start=2):
        print(f"language {number} of {len(languages)}: {code}", flush=True)
        found, _, _ = loss_and_retrieval(generator, own, generator.encode(own.pixels), **drawing)
        figures["languages"][code] = {name: found[name] for name in OF_LANGUAGE}
    if out is not None:
        kept = {**figures, **settings, "candidates_drawn": candidates, "scorer": scorer, "data": data}
        kept |= {"copied": report.copies} if report.copies else {}
        kept |= {"keys": keys} if keys else {}
        part = (f"-{limit}" if limit else "") + ("-of-keys" if keys else "")
        folder = model if model.is_dir() else out.parent
        kept = {
            name: str(value) if isinstance(value, Path | Address) else value for name, value in kept.items()
        }
        write_json(kept, folder / f"evaluation-{split}{part}.json")
        heading = "caption" if split == (train or TRAIN) else "held-out caption"
        with whole_file(out) as partial:
            draw_worst_to_best(report, held_out, rows, heading).save(partial)
    return figures


def sample_of_memory(size: tuple[int, int]) -> int:
    """How many images of `size` pixels take as much memory as a sample may by default."""
    return int(SAMPLE_MEMORY * 2**30 // (size[0] * size[1] * BYTES_PER_PIXEL))


class PixelsOfSplit(PixelsSample):
    """→ {"pixels": as of PixelsSample, "splits": str}."""

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        return {**super().__call__(sample, rng), "splits": split_of(sample.shard)}


def split_of_train(data: Path, split: str, train: str | None) -> str | None:
    """The training split; None if that is what is measured, or if there is none and it was not asked for."""
    name = train or TRAIN
    if split == name or (train is None and name not in splits_in(data)):
        return None
    return find_split(data, name)


def add_missing(real: dict[str, Any], keys: set[str], data: Path, split: str, size: tuple[int, int]) -> None:
    """Adds the images of `keys`, of `split`, to a sample of all splits."""
    if missing := keys - {*real["keys"]}:
        own = read_split(data, split, Only(missing, PixelsOfSplit(size)))
        real["keys"], real["splits"] = real["keys"] + own["keys"], real["splits"] + own["splits"]
        real["pixels"] = torch.cat([real["pixels"], own["pixels"]])


def only_of(captions: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    pairs = [pair for pair in zip(captions["keys"], captions["captions"], strict=True) if pair[0] in keys]
    return {"keys": [key for key, _ in pairs], "captions": [caption for _, caption in pairs]}


def read_labels(
    classifier: str | Path, data: Path, keys: Sequence[str]
) -> tuple[Classifier | ResNet, dict[str, int]]:
    """A classifier, and the class of every image of `keys` in `data`. Raises UserError if the classifier is
    untrained or knows other classes, or if no image of `keys` has a class."""
    found = ImageClassifier.from_pretrained(classifier, "cpu")
    if not found.is_trained:
        raise UserError(f"--classifier {classifier}: its head is all zeros, so it knows no classes yet")
    found.check_classes(data)
    try:
        whole = read_split(data, "*", Only({*keys}, ClassSample(found.model.config.num_classes)))
    except MissingData:
        raise UserError(
            f"no measured image has a class in {data}: pass shards with the same keys with --classes"
        ) from None
    return found.model, dict(zip(whole["keys"], whole["labels"].tolist(), strict=True))


@dataclass(frozen=True)
class GeneratorReport:
    """Figures, and for every caption the generated image and the reconstruction of the real one, as pixels,
    with the rank of the real one; and which generated images are copies (key → key of the training image)."""

    figures: dict[str, Any]
    generated: Tensor
    reconstructed: Tensor
    ranks: Tensor
    copies: dict[str, str]


def report_generator(
    generator: Generator,
    held_out: HeldOut,
    space: FeatureSpace,
    *,
    seeds: int = 1,
    clip: CaptionScorer | None = None,
    classifier: Classifier | ResNet | None = None,
    labels: Mapping[str, int] | None = None,
    captioned: int = 0,
    all_captions: Sequence[str] = (),
    **settings: Any,
) -> GeneratorReport:
    """Generates an image for every caption and measures it.

    Args:
        space: for the Fréchet distance.
        seeds: for diversity, images per caption that are generated in addition, without candidates.
        clip: also measures retrieval in its space, and how well images fit their captions.
        classifier: looks for the caption's class in the generated image.
        labels: the class of each image by its key, without which the classifier measures nothing.
        captioned: images, evenly spread over the split, whose caption is searched for among `all_captions`.
        settings: as for `Generator.draw`.
    """
    codes, reconstructed = reconstruct(generator.image_tokenizer, held_out.pixels, "reconstructing images")
    figures, generated, ranks = loss_and_retrieval(generator, held_out, codes, **settings)
    figures |= recalls(
        "reconstruction_retrieval@", pixel_ranks(reconstructed, held_out.everything, held_out.own)
    )
    if len(generated) > 1:
        name = f"frechet_distance_{space.name}"
        figures[name] = space.distance(held_out.pixels, generated)
        figures[f"reconstruction_{name}"] = space.distance(held_out.pixels, reconstructed)
    copies: dict[str, str] = {}
    if len(held_out.trained):
        trained = held_out.everything[held_out.trained]
        trained = reconstruct(generator.image_tokenizer, trained, "reconstructing training images")[1]
        distances, places = nearest(generated, trained)
        found = ((distances < COPY) & ~all_alike(generated)).nonzero().flatten().tolist()
        copies = {held_out.keys[i]: held_out.trained_keys[places[i]] for i in found}
        figures["copies_among"] = len(trained)
        figures["copies"] = len(copies)
        figures["copies_among_reconstructions"] = int((nearest(reconstructed, trained)[0] < COPY).sum())
    if seeds > 1 and len(held_out.keys) > 1:
        plain = {name: value for name, value in settings.items() if name not in ("candidates", "scorer")}
        drawn = draw_all(generator, held_out.captions, seeds, **plain)
        figures["diversity"], figures["diversity_of_captions"] = diversity(drawn.unflatten(0, (-1, seeds)))
    if clip is not None:
        figures |= measure_by_clip(clip, held_out, generated)
    if classifier is not None and labels is not None:
        figures |= measure_by_classes(classifier, labels, held_out, generated)
    if captioned:
        figures |= measure_captions(generator, held_out, captioned, all_captions)
    return GeneratorReport(figures, generated, reconstructed, ranks, copies)


def loss_and_retrieval(
    generator: Generator, held_out: HeldOut, codes: Tensor, **settings: Any
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The loss of the real images' `codes` given their captions, and whether the image generated for a
    caption is nearest to its real one; with the generated pixels, and the ranks.

    Args:
        settings: as for `Generator.draw`.
    """
    generated = draw_all(generator, held_out.captions, **settings)
    ranks = pixel_ranks(generated, held_out.everything, held_out.own)
    loss = held_out_loss(generator, held_out.captions, codes)
    figures = {
        "captions": len(held_out.own),
        "candidates": len(held_out.everything),
        "held_out_loss": loss,
        "held_out_loss_of_image": loss * codes[0].numel(),
        **recalls("retrieval@", ranks),
    }
    return figures, generated, ranks


def draw_all(generator: Generator, captions: Sequence[str], num_images: int = 1, **settings: Any) -> Tensor:
    """`num_images` images of each caption as pixels, with progress."""
    at_once = max(1, generator.defaults.batch_size // (num_images * settings.get("candidates", 1)))
    parts = [captions[first : first + at_once] for first in range(0, len(captions), at_once)]
    what = "generating images" if num_images == 1 else f"generating {num_images} images of each caption"
    return torch.cat([
        generator.decode(generator.generate_codes(part, num_images, **settings)).cpu()
        for part in with_progress(parts, len(captions), what, len)
    ])  # fmt: skip


def measure_captions(
    generator: Generator, held_out: HeldOut, number: int, all_captions: Sequence[str]
) -> dict[str, float]:
    """How often a real image's own caption is the likeliest of all captions of the data set
    (`rank_captions`), for `number` images evenly spread over the split. Captions with the same tokens are
    one."""
    chosen = evenly_spread(len(held_out.own), number)
    captions = list(dict.fromkeys([*held_out.captions, *all_captions]))
    ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    read = dict(zip(captions, map(tuple, ids.tolist()), strict=True))  # what the model sees of each
    candidates = list({read[caption]: caption for caption in reversed(captions)}.values())
    precision = choose_precision("auto", generator.device)
    images = with_progress(held_out.pixels[chosen].split(1), len(chosen), "searching captions of images")
    scores = torch.cat([rank_captions(generator, image, candidates, precision).cpu() for image in images])
    place = {read[caption]: i for i, caption in enumerate(candidates)}
    is_own = torch.zeros(scores.shape, dtype=torch.bool)
    is_own[torch.arange(len(chosen)), [place[read[held_out.captions[i]]] for i in chosen]] = True
    ranks = caption_ranks(scores, is_own)
    return {"captioned": len(chosen), "caption_candidates": len(candidates), **recalls("caption@", ranks)}


def held_out_loss(generator: Generator, captions: list[str], codes: Tensor, batch_size: int = 64) -> float:
    """Cross-entropy of the real images' codes given their captions, nats per code."""
    caption_ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    batches = [
        {"caption_ids": ids, "codes": true.flatten(1)}
        for ids, true in zip(caption_ids.split(batch_size), codes.split(batch_size), strict=True)
    ]
    batches = with_progress(batches, len(captions), "measuring the loss", lambda b: len(b["codes"]))
    return generator_loss(generator.transformer, batches)["image_loss"]


def measure_by_clip(clip: CaptionScorer, held_out: HeldOut, generated: Tensor) -> dict[str, float]:
    """Retrieval by the cosine of images, and the mean cosine of images with their captions."""
    parts = with_progress(held_out.everything.split(64), len(held_out.everything), "embedding images", len)
    drawn, real = clip.embed_images(generated), torch.cat([clip.embed_images(part) for part in parts])
    first: dict[bytes, int] = {}  # images that are equal are one
    hashes = (hashlib.sha256(image.numpy().tobytes()).digest() for image in held_out.everything)
    same = torch.tensor([first.setdefault(each, i) for i, each in enumerate(hashes)])
    is_own = same[held_out.own].unsqueeze(1) == same
    captions = clip.embed_captions(held_out.captions)
    return {
        **recalls("clip_retrieval@", caption_ranks((drawn @ real.T).cpu(), is_own)),
        "clip_score": (drawn * captions).sum(1).mean().item(),
        "clip_score_of_real": (real[held_out.own] * captions).sum(1).mean().item(),
    }


@torch.inference_mode()
def measure_by_classes(
    classifier: Classifier | ResNet, labels: Mapping[str, int], held_out: HeldOut, generated: Tensor
) -> dict[str, float]:
    """How often a classifier finds the caption's class in the generated image, and in the real one; of the
    images that have a class."""
    places = [i for i, key in enumerate(held_out.keys) if key in labels]
    expected = torch.tensor([labels[held_out.keys[i]] for i in places])
    figures: dict[str, float] = {"with_class": len(places)}
    if not places:
        return figures
    for name, pixels in (("class_accuracy", generated), ("class_accuracy_of_real", held_out.pixels)):
        parts = with_progress(pixels[places].split(64), len(places), "classifying images", len)
        predicted = torch.cat([classifier(fit_pixels(part, classifier.config)).argmax(1) for part in parts])
        figures[name] = (predicted == expected).double().mean().item()
    return figures


def draw_worst_to_best(
    report: GeneratorReport, held_out: HeldOut, num_rows: int, heading: str = "caption"
) -> Image.Image:
    """Caption, real image, reconstruction and generated image in two halves of `num_rows`, evenly from the
    caption whose real image ranks last to the first, equal ranks in order; copies of a training image are
    marked."""
    order = report.ranks.argsort(stable=True, descending=True)
    chosen = order[evenly_spread(len(order), 2 * num_rows)].tolist()
    columns = [
        images_from_pixels(pixels[chosen])
        for pixels in (held_out.pixels, report.reconstructed, report.generated)
    ]
    marks = [", a copy" if key in report.copies else "" for key in held_out.keys]
    captions = [f"{held_out.captions[i]} (rank {report.ranks[i] + 1}{marks[i]})" for i in chosen]
    return two_halves(columns, captions, [heading, "real", "tokenizer", "generated"], num_rows)
