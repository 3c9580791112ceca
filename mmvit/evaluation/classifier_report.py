"""A classifier on held-out images: accuracy, calibration, what it confuses, where it looks, and how good its
features are without training them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.data.samples import ClassifierSample, PixelsSample
from mmvit.errors import UserError
from mmvit.evaluation.accuracy import shifted_and_mirrored
from mmvit.evaluation.attention_maps import attention_maps
from mmvit.evaluation.calibration import calibration_error, confusion_matrix, draw_confusion
from mmvit.evaluation.frozen import frozen_figures
from mmvit.evaluation.held_out import evenly_spread
from mmvit.evaluation.image_classifier import UNTRAINED, ImageClassifier
from mmvit.evaluation.saliency import saliency_maps
from mmvit.evaluation.splits import Only, batches_of, read_split
from mmvit.files import whole_file, write_json
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.models.resnet import ResNet
from mmvit.sampling.grids import labelled_grid
from mmvit.training.distributed import choose_precision

DRAWN = 16  # images with what matters in them
MOST_TO_LEARN_FROM = 100_000  # images, by default


def evaluate_classifier(
    model: Path,
    data: Path,
    split: str,
    out: Path | None = None,
    *,
    shift: int = 0,
    mirror: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    probe: bool = False,
    train: str = "train",
    sample: int = MOST_TO_LEARN_FROM,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, loss, calibration error and the accuracy of every class.

    Args:
        out: draws the confusion matrix there and what predictions depend on into OUT-saliency.png, and writes
            the figures to OUT.json.
        shift, mirror: test-time augmentation, the mean probability over copies of each image that are shifted
            by so many pixels, and mirrored (`shifted_and_mirrored`).
        probe: also judges the frozen features (`frozen_figures`), which learn from the split `train`.
        sample: of a split `train` with more images, so many are learnt from, evenly spread.

    In memory are the features and class scores of the images measured and learnt from, and their pixels a
    batch at a time.

    Raises:
        UserError: if the classifier is untrained or knows other classes than the data.
    """
    if shift < 0:
        raise UserError(f"--shift must be at least 0 pixels, got {shift}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = ImageClassifier.from_pretrained(model, device)
    if not (classifier.is_trained or probe):
        raise UserError(f"{model}: {UNTRAINED} (--probe)")
    names, network = classifier.check_classes(data), classifier.model
    copies = partial(shifted_and_mirrored, shift=shift, mirror=mirror)
    read = partial(read_out, network, data, precision=choose_precision(precision, device))
    held_out = read(split, copies=copies)
    logits, labels = held_out["logits"], held_out["labels"]
    counts = confusion_matrix(logits.argmax(1), labels, len(names))
    hits = logits.topk(min(5, len(names))).indices == labels[:, None]
    recalls = counts.diagonal() / counts.sum(1)  # nan for classes without an image
    figures: dict[str, Any] = {
        "split": split,
        "images": len(labels),
        "tta": len(copies(torch.zeros(1, 1, 1, 1))),
        "accuracy": hits[:, 0].double().mean().item(),
        "mean_accuracy_of_classes": recalls.nanmean().item(),
        "top5_accuracy": hits.any(1).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "calibration_error": calibration_error(logits.softmax(1), labels),
        "accuracy_of_class": {
            name: None if recall != recall else recall
            for name, recall in zip(names, recalls.tolist(), strict=True)
        },
    }
    if probe:
        known = read(train, most=sample)
        figures["learnt_from"] = len(known["labels"])
        figures |= frozen_figures(
            known["features"], known["labels"], held_out["features"], held_out["labels"]
        )
    if out is not None:
        write_json(figures, out.with_suffix(".json"))
        draw_confusion(counts, names, out)
        with whole_file(out.with_name(f"{out.stem}-saliency.png")) as file:
            draw_saliency(network, data, split, held_out, names).save(file)
    return figures


@torch.inference_mode()
def read_out(
    model: Classifier | ResNet,
    data: Path,
    split: str,
    *,
    precision: torch.dtype,
    copies: Callable[[Tensor], list[Tensor]] = lambda pixels: [pixels],
    most: int | None = None,
) -> dict[str, Any]:
    """`keys`, `labels`, `features` and `logits` of a split, or of `most` images evenly spread over it; for
    several `copies` of each image the logarithm of their mean probability."""
    config, device = model.config, next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {"labels": [], "features": [], "logits": []}
    keys: list[str] = []
    decode = ClassifierSample(config.height_width, config.num_classes)
    for batch in batches_of(data, split, decode, most=most):
        pixels = batch["pixels"]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            features, *others = map(model.features, copies(fit_pixels(pixels.to(device), config)))
            logits = torch.stack([model.head(each).float().cpu() for each in (features, *others)])
        parts["features"].append(features.float().cpu())
        parts["logits"].append(logits.softmax(-1).mean(0).log() if others else logits[0])
        parts["labels"].append(batch["labels"])
        keys += batch["keys"]
    return {"keys": keys, **{name: torch.cat(tensors) for name, tensors in parts.items()}}


def draw_saliency(
    model: Classifier | ResNet, data: Path, split: str, held_out: dict[str, Any], names: list[str]
) -> Image.Image:
    """Images beside what their prediction depends on (`saliency_maps`) and, of a ViT, attention rollout, from
    the most confident mistakes to the most confident hits."""
    truth = held_out["logits"].log_softmax(1).gather(1, held_out["labels"][:, None])[:, 0]
    places = truth.argsort()[evenly_spread(len(truth), DRAWN)]
    drawn = [held_out["keys"][place] for place in places]
    found = read_split(data, split, Only(drawn, PixelsSample(model.config.height_width)))
    pixels = torch.stack([found["pixels"][found["keys"].index(key)] for key in drawn])
    shown = fit_pixels(pixels.to(next(model.parameters()).device), model.config)
    columns = [images_from_pixels(pixels), overlaid(pixels, saliency_maps(model, shown).cpu())]
    headings = ["true class", "image", "what matters"]
    if isinstance(model, Classifier):
        columns.append(overlaid(pixels, attention_maps(model, shown).cpu()))
        headings.append("attention")
    predicted, labels = held_out["logits"][places].argmax(1).tolist(), held_out["labels"][places].tolist()
    captions = [
        names[true] if true == said else f"{names[true]}, taken for {names[said]}"
        for true, said in zip(labels, predicted, strict=True)
    ]
    return labelled_grid(list(zip(*columns, strict=True)), captions, headings)


def overlaid(pixels: Tensor, maps: Tensor) -> list[Image.Image]:
    """Maps (images, height, width) from their least (black) to 1 (yellow) over the grey images."""
    from matplotlib import colormaps  # takes half a second to import

    least = maps.amin((1, 2), keepdim=True)
    heat = torch.from_numpy(colormaps["inferno"](((maps - least) / (1 - least).clamp(min=1e-6)).numpy()))
    heat = heat[..., :3].permute(0, 3, 1, 2)
    return images_from_pixels(0.35 * pixels.mean(1, keepdim=True) + 0.65 * (2 * heat - 1))
