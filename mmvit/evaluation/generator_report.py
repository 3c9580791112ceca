"""A generator on captions that it has not seen, beside the real pictures and what its image tokenizer can say
of them."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.errors import UserError
from mmvit.evaluation.frechet import FeatureSpace
from mmvit.evaluation.generated import COPY, diversity, nearest
from mmvit.evaluation.likelihood import generator_loss
from mmvit.evaluation.retrieval import caption_ranks, pixel_ranks, recalls
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.sampling.candidates import CaptionScorer, rank_captions
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import two_halves
from mmvit.training.distributed import choose_precision


@dataclass(frozen=True)
class Unseen:
    """A split's captions and, of all pictures of its data set as pixels (pictures, 3, height, width), the
    places of its own, and of those of the train split."""

    keys: list[str]
    captions: list[str]
    everything: Tensor
    own: Tensor
    trained: Tensor
    trained_keys: list[str]

    @property
    def pixels(self) -> Tensor:
        """The split's own pictures."""
        return self.everything[self.own]

    @classmethod
    def of(cls, unseen: Mapping[str, Any], real: Mapping[str, Any], trained: Sequence[str]) -> Self:
        """`unseen` (keys, captions) and `real` (keys, pixels) as `read_split` gives them; `trained` are keys.
        What has no picture in `real` is left out. Raises UserError where two pictures have one key."""
        place = {key: i for i, key in enumerate(real["keys"])}
        if len(place) < len(real["keys"]):
            (twin, _), *_ = Counter(real["keys"]).most_common(1)
            raise UserError(
                f"several pictures have the key {twin}, perhaps one of each split, and a caption's own "
                "cannot be told: give every sample of the data set a key of its own"
            )
        pairs = [pair for pair in zip(unseen["keys"], unseen["captions"], strict=True) if pair[0] in place]
        trained = [key for key in trained if key in place]
        return cls(
            keys=[key for key, _ in pairs],
            captions=[caption for _, caption in pairs],
            everything=real["pixels"],
            own=torch.tensor([place[key] for key, _ in pairs], dtype=torch.long),
            trained=torch.tensor([place[key] for key in trained], dtype=torch.long),
            trained_keys=trained,
        )

    def spread(self, number: int) -> Self:
        """`number` of the captions, evenly spread over the split, or all where there are fewer."""
        return self.some(evenly_spread(len(self.own), number))

    def matching(self, pattern: str) -> Self:
        """The captions in whose key this regular expression is found. Raises UserError for none."""
        chosen = [i for i, key in enumerate(self.keys) if re.search(pattern, key)]
        if not chosen:
            raise UserError(f"--keys {pattern!r} is found in none of {len(self.keys)}, as {self.keys[:2]}")
        return self.some(chosen)

    def some(self, chosen: Sequence[int] | Tensor) -> Self:
        """The captions at these places."""
        return replace(
            self,
            keys=[self.keys[i] for i in chosen],
            captions=[self.captions[i] for i in chosen],
            own=self.own[chosen],
        )


@dataclass(frozen=True)
class GeneratorReport:
    """Figures; and of every caption what was drawn and what the image tokenizer makes of the real picture, as
    pixels, with the rank of the true picture; and which drawn pictures are copies (key → key of the training
    picture)."""

    figures: dict[str, Any]
    generated: Tensor
    reconstructed: Tensor
    ranks: Tensor
    copies: dict[str, str]


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
    all_captions: Sequence[str] = (),
    **settings: Any,
) -> GeneratorReport:
    """Draws a picture of every caption and measures it.

    Args:
        space: of the Fréchet distance.
        seeds: pictures of every caption that are drawn once more, without candidates, for their diversity.
        clip: in whose space retrieval is measured, too, and how well pictures fit their captions.
        classifier: which looks for the class of the caption in what was drawn.
        labels: the class of each picture by its key; without them the classifier measures nothing.
        captioned: pictures of the split, evenly spread, whose caption is looked for in `all_captions`.
        settings: as for `Generator.draw`.
    """
    tokenizer = generator.image_tokenizer
    own = tokenizer.encode_many(unseen.pixels)
    reconstructed = tokenizer.decode_many(own).cpu()
    figures, generated, ranks = loss_and_retrieval(generator, unseen, own, **settings)
    reconstructed_ranks = pixel_ranks(reconstructed, unseen.everything, unseen.own)
    figures |= recalls("reconstruction_retrieval@", reconstructed_ranks)
    if len(generated) > 1:
        name = f"frechet_distance_{space.name}"
        figures[name] = space.distance(unseen.pixels, generated)
        figures[f"reconstruction_{name}"] = space.distance(unseen.pixels, reconstructed)
    copies: dict[str, str] = {}
    if len(unseen.trained):
        codes = tokenizer.encode_many(unseen.everything[unseen.trained])
        trained = tokenizer.decode_many(codes).cpu()
        distances, places = nearest(generated, trained)
        found = (distances < COPY).nonzero().flatten().tolist()
        copies = {unseen.keys[i]: unseen.trained_keys[places[i]] for i in found}
        figures["copies"] = len(copies)
        figures["copies_among_reconstructions"] = int((nearest(reconstructed, trained)[0] < COPY).sum())
    if seeds > 1 and len(unseen.keys) > 1:
        plain = {name: value for name, value in settings.items() if name not in ("candidates", "scorer")}
        drawn = generator.generate_codes(unseen.captions, seeds, **plain)
        pictures = generator.decode(drawn).cpu().unflatten(0, (-1, seeds))
        figures["diversity"], figures["diversity_of_captions"] = diversity(pictures)
    if clip is not None:
        figures |= measure_by_clip(clip, unseen, generated)
    if classifier is not None and labels is not None:
        figures |= measure_by_classes(classifier, labels, unseen, generated)
    if captioned:
        figures |= measure_captions(generator, unseen, captioned, all_captions)
    return GeneratorReport(figures, generated, reconstructed, ranks, copies)


def loss_and_retrieval(
    generator: Generator, unseen: Unseen, codes: Tensor, **settings: Any
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What the true pictures' `codes` cost given their captions, and whether what is drawn of these (as
    `Generator.draw` does by `settings`) is nearest to its true picture; with the drawn pixels, and the
    ranks."""
    generated = generator.decode(generator.generate_codes(unseen.captions, **settings)).cpu()
    ranks = pixel_ranks(generated, unseen.everything, unseen.own)
    loss = held_out_loss(generator, unseen.captions, codes)
    figures = {
        "captions": len(unseen.own),
        "candidates": len(unseen.everything),
        "held_out_loss": loss,
        "held_out_loss_of_picture": loss * codes[0].numel(),
        **recalls("retrieval@", ranks),
    }
    return figures, generated, ranks


def measure_captions(
    generator: Generator, unseen: Unseen, number: int, all_captions: Sequence[str]
) -> dict[str, float]:
    """How often a real picture's own caption is the likeliest of all captions of the data set
    (`rank_captions`), for `number` pictures evenly spread over the split. Captions of the same tokens are
    one."""
    chosen = evenly_spread(len(unseen.own), number)
    captions = list(dict.fromkeys([*unseen.captions, *all_captions]))
    ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    read = dict(zip(captions, map(tuple, ids.tolist()), strict=True))  # what the model sees of each
    candidates = list({read[caption]: caption for caption in reversed(captions)}.values())
    precision = choose_precision("auto", generator.device)
    scores = rank_captions(generator, unseen.pixels[chosen], candidates, precision).cpu()
    place = {read[caption]: i for i, caption in enumerate(candidates)}
    is_own = torch.zeros(scores.shape, dtype=torch.bool)
    is_own[torch.arange(len(chosen)), [place[read[unseen.captions[i]]] for i in chosen]] = True
    ranks = caption_ranks(scores, is_own)
    return {"captioned": len(chosen), "caption_candidates": len(candidates), **recalls("caption@", ranks)}


def evenly_spread(total: int, number: int) -> Tensor:
    """Places of `number` among `total`, from the first to the last; all where there are not as many."""
    return torch.linspace(0, total - 1, min(number, total)).round().long()


def held_out_loss(generator: Generator, captions: list[str], codes: Tensor, batch_size: int = 64) -> float:
    """Cross-entropy of the true codes given their captions, nats per code."""
    caption_ids, _ = generator.text_tokenizer.encode(captions, generator.transformer.config.text_length)
    batches = [
        {"caption_ids": ids, "codes": true.flatten(1)}
        for ids, true in zip(caption_ids.split(batch_size), codes.split(batch_size), strict=True)
    ]
    return generator_loss(generator.transformer, batches)["image_loss"]


def measure_by_clip(clip: CaptionScorer, unseen: Unseen, generated: Tensor) -> dict[str, float]:
    """Retrieval by the cosine of pictures, and the mean cosine of pictures with their captions."""
    drawn, real = clip.embed_images(generated), clip.embed_images(unseen.everything)
    first: dict[bytes, int] = {}  # pictures that are equal are one
    hashes = (hashlib.sha256(picture.numpy().tobytes()).digest() for picture in unseen.everything)
    same = torch.tensor([first.setdefault(each, i) for i, each in enumerate(hashes)])
    is_own = same[unseen.own].unsqueeze(1) == same
    captions = clip.embed_captions(unseen.captions)
    return {
        **recalls("clip_retrieval@", caption_ranks((drawn @ real.T).cpu(), is_own)),
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


def draw_worst_to_best(
    report: GeneratorReport, unseen: Unseen, num_rows: int, heading: str = "caption"
) -> Image.Image:
    """Caption, real picture, reconstruction and what was drawn, in two halves of `num_rows`: evenly from the
    caption whose true picture ranks last to the one where it ranks first, of the same rank in their order;
    copies of a training picture are marked."""
    order = report.ranks.argsort(stable=True, descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(2 * num_rows, len(order))).round().long()].tolist()
    columns = [
        images_from_pixels(pixels[chosen])
        for pixels in (unseen.pixels, report.reconstructed, report.generated)
    ]
    captions = [
        f"{unseen.captions[i]} (rank {report.ranks[i] + 1}{', a copy' * (unseen.keys[i] in report.copies)})"
        for i in chosen
    ]
    return two_halves(columns, captions, [heading, "real", "tokenizer", "generated"], num_rows)
