"""A generator on captions that it has not seen, beside the real pictures and what its image tokenizer can say
of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.evaluation.generated import COPY, diversity, nearest
from mmvit.evaluation.likelihood import mean_loss
from mmvit.evaluation.retrieval import caption_ranks, pixel_ranks, recall
from mmvit.evaluation.spaces import FeatureSpace
from mmvit.evaluation.splits import decode, encode
from mmvit.evaluation.tokenizer_report import draw_halves
from mmvit.models.classifier import Classifier
from mmvit.models.perceptual import fit_pixels
from mmvit.sampling.editing import rank_captions
from mmvit.sampling.generator import Generator
from mmvit.sampling.pictures import pictures_from_pixels
from mmvit.sampling.rerank import CaptionScorer


@dataclass(frozen=True)
class Unseen:
    """A split, (pictures, ...), among `everything`, all pictures of its data set, of which `own` are the
    places of its own and `trained` those of the train split."""

    keys: list[str]
    captions: list[str]
    all_captions: list[str]
    pixels: Tensor
    everything: Tensor
    own: Tensor
    trained: Tensor

    @classmethod
    def of(cls, unseen: Mapping[str, Any], real: Mapping[str, Any], trained: Sequence[str]) -> "Unseen":
        """`unseen` and `real` as `read_split` gives them, with captions; `trained` are keys."""
        place = {key: i for i, key in enumerate(real["keys"])}
        own = torch.tensor([place[key] for key in unseen["keys"]])
        places = torch.tensor([place[key] for key in trained], dtype=torch.long)
        captions, pixels = ([one[name] for one in (unseen, real)] for name in ("captions", "pixels"))
        return cls(unseen["keys"], *captions, *pixels, own, places)


@dataclass(frozen=True)
class GeneratorReport:
    """Figures; and of every caption what was drawn and what the image tokenizer makes of the real picture, as
    pixels, with the rank of the true picture."""

    figures: dict[str, Any]
    generated: Tensor
    reconstructed: Tensor
    ranks: Tensor


def report_generator(
    generator: Generator,
    unseen: Unseen,
    space: FeatureSpace,
    *,
    seeds: int = 1,
    clip: CaptionScorer | None = None,
    classifier: Classifier | None = None,
    labels: Mapping[str, int] | None = None,
    captioned: int = 0,
    **settings: Any,
) -> GeneratorReport:
    """Draws a picture of every caption and measures it.

    Args:
        space: of the Fréchet distance.
        seeds: pictures of every caption, of which the first is measured, and all for their diversity.
        clip: in whose space retrieval is measured, too, and how well pictures fit their captions.
        classifier, labels: by whom and of which classes (key → class) pictures are; without `labels` nothing
            is measured by it.
        captioned: pictures of the split, evenly spread, whose caption is looked for among all.
        settings: as for `Generator.draw`.
    """
    codes = encode(generator.image_tokenizer, unseen.pixels)
    drawn = generator.generate_codes(unseen.captions, seeds, **settings)
    pictures = decode(generator.image_tokenizer, drawn).unflatten(0, (-1, seeds))
    generated, reconstructed = pictures[:, 0], decode(generator.image_tokenizer, codes)
    ranks = pixel_ranks(generated, unseen.everything, unseen.own)
    loss = held_out_loss(generator, unseen.captions, codes)
    figures: dict[str, Any] = {
        "captions": len(unseen.own),
        "candidates": len(unseen.everything),
        "held_out_loss": loss,
        "held_out_loss_of_picture": loss * codes[0].numel(),
        **recalls("retrieval", ranks),
        **recalls("reconstruction_retrieval", pixel_ranks(reconstructed, unseen.everything, unseen.own)),
    }
    if len(generated) > 1:
        name = f"frechet_distance_{space.name}"
        figures[name] = space.distance(unseen.pixels, generated)
        figures[f"reconstruction_{name}"] = space.distance(unseen.pixels, reconstructed)
    if len(unseen.trained):
        tokenizer = generator.image_tokenizer
        trained = decode(tokenizer, encode(tokenizer, unseen.everything[unseen.trained]))
        figures["copies"] = int((nearest(generated, trained)[0] < COPY).sum())
        figures["copies_among_reconstructions"] = int((nearest(reconstructed, trained)[0] < COPY).sum())
    if seeds > 1 and len(pictures) > 1:
        figures["diversity"], figures["diversity_of_captions"] = diversity(pictures)
    if clip is not None:
        figures |= measure_by_clip(clip, unseen, generated)
    if classifier is not None and labels is not None:
        figures |= measure_by_classes(classifier, labels, unseen, generated)
    if captioned:
        figures |= measure_captions(generator, unseen, captioned)
    return GeneratorReport(figures, generated, reconstructed, ranks)


def measure_captions(generator: Generator, unseen: Unseen, number: int) -> dict[str, float]:
    """How often a real picture's own caption is the likeliest of all captions of the data set
    (`rank_captions`), for `number` pictures evenly spread over the split."""
    chosen = torch.linspace(0, len(unseen.own) - 1, min(number, len(unseen.own))).round().long()
    candidates = list(dict.fromkeys(unseen.all_captions))
    scores = rank_captions(generator, unseen.pixels[chosen], candidates).cpu()
    place = {caption: i for i, caption in enumerate(candidates)}
    is_own = torch.zeros(scores.shape, dtype=torch.bool)
    is_own[torch.arange(len(chosen)), [place[unseen.captions[i]] for i in chosen]] = True
    ranks = caption_ranks(scores, is_own)
    return {"captioned": len(chosen), "caption_candidates": len(candidates), **recalls("caption", ranks)}


def recalls(name: str, ranks: Tensor) -> dict[str, float]:
    return {f"{name}@1": recall(ranks, 1), f"{name}@5": recall(ranks, 5)}


def held_out_loss(generator: Generator, captions: list[str], codes: Tensor, batch_size: int = 64) -> float:
    """Cross-entropy of the true codes given their captions, nats per code."""
    caption_ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    batches = [
        {"caption_ids": ids, "codes": true.flatten(1)}
        for ids, true in zip(caption_ids.split(batch_size), codes.split(batch_size), strict=True)
    ]
    return mean_loss(generator.transformer, batches, count="codes")["image_loss"]


def measure_by_clip(clip: CaptionScorer, unseen: Unseen, generated: Tensor) -> dict[str, float]:
    """Retrieval by the cosine of pictures, and the mean cosine of pictures with their captions."""
    drawn, real = clip.embed_pictures(generated), clip.embed_pictures(unseen.everything)
    is_own = torch.zeros(len(drawn), len(real), dtype=torch.bool)
    is_own[torch.arange(len(drawn)), unseen.own] = True
    captions = clip.embed_captions(unseen.captions)
    return {
        **recalls("clip_retrieval", caption_ranks((drawn @ real.T).cpu(), is_own)),
        "clip_score": (drawn * captions).sum(1).mean().item(),
        "clip_score_of_real": (real[unseen.own] * captions).sum(1).mean().item(),
    }


@torch.inference_mode()
def measure_by_classes(
    classifier: Classifier, labels: Mapping[str, int], unseen: Unseen, generated: Tensor
) -> dict[str, float]:
    """How often a classifier finds the class of the caption in what was drawn, and in the real picture; of
    the pictures that have a class."""
    places = [i for i, key in enumerate(unseen.keys) if key in labels]
    wanted = torch.tensor([labels[unseen.keys[i]] for i in places])
    figures: dict[str, float] = {"with_class": len(places)}
    if not places:
        return figures
    for name, pixels in (("class_accuracy", generated), ("class_accuracy_of_real", unseen.pixels)):
        parts = pixels[places].split(64)
        predicted = torch.cat([classifier(fit_pixels(part, classifier.config)).argmax(1) for part in parts])
        figures[name] = (predicted == wanted).double().mean().item()
    return figures


def draw_best_to_worst(report: GeneratorReport, unseen: Unseen, num_rows: int) -> Image.Image:
    """Caption, real picture, reconstruction and what was drawn, in two halves of `num_rows`: evenly from the
    caption whose true picture ranks first to the one where it ranks last, of the same rank in their order."""
    order = report.ranks.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(2 * num_rows, len(order))).round().long()].tolist()
    columns = [
        pictures_from_pixels(pixels[chosen])
        for pixels in (unseen.pixels, report.reconstructed, report.generated)
    ]
    captions = [f"{unseen.captions[i]} (rank {report.ranks[i] + 1})" for i in chosen]
    return draw_halves(columns, captions, ["caption, never seen", "real", "tokenizer", "generated"], num_rows)
