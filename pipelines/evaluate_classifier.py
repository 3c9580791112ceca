"""Measures a classifier on pictures with classes that it has not seen, and draws what it confuses and where
it looks.

    python pipelines/evaluate_classifier.py runs/fashion-mnist data/fashion-mnist --split test
    python pipelines/evaluate_classifier.py runs/vit-b16 data/photos --split held-out --features

Top-1 and top-5 accuracy, that of every class, and the calibration error. OUT.png shows which class is taken
for which; OUT-attention.png what the classifier reads its answer from (attention rollout), from the pictures
that it gets wrong most surely to those that it gets right, and not of a ResNet; OUT.json keeps the figures.

--shift 1 --mirror averages what it says of ten views of each picture: as it is and moved by a pixel in each
direction, and each of these mirrored. --precision bf16 is several times faster where the hardware multiplies
bfloat16, and is what training measures there; the last digits may differ.

With --features, the features that the head reads are judged without training them, on the train split's
classes: ridge regression on 1, 5, 10 and 25 pictures of each class in closed form (three draws), the nearest
neighbours, and a linear probe.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmvit.data.images import images_from_pixels
from mmvit.data.samples import ClassifierSample
from mmvit.data.shards import shards_of
from mmvit.data.stream import ShardStream
from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError, run_script
from mmvit.evaluation.accuracy import views_of
from mmvit.evaluation.attention_maps import attention_maps
from mmvit.evaluation.calibration import calibration_error, confusion_matrix, draw_confusion
from mmvit.evaluation.frozen import few_shot_accuracies, linear_probe_accuracy, nearest_neighbour_accuracy
from mmvit.evaluation.image_classifier import UNTRAINED, ImageClassifier
from mmvit.evaluation.splits import refuse_broken
from mmvit.hub import write_json
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.models.resnet import ResNet
from mmvit.sampling.grids import check_grid_file, labelled_grid
from mmvit.training.distributed import choose_precision

DRAWN = 16  # pictures with their attention


def main() -> None:
    options = parse_arguments()
    check_grid_file(options.out)
    if options.out.parent.exists() and not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: {options.out.parent} is a file, not a folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = ImageClassifier.from_pretrained(options.model, device)
    if not (classifier.is_trained or options.features):
        raise UserError(f"{options.model}: {UNTRAINED} (--features)")
    model, names = classifier.model, class_names(options.data, classifier)
    if options.shift < 0:
        raise UserError(f"--shift {options.shift}: it is a number of pixels, 0 or more")
    views = partial(views_of, shift=options.shift, mirror=options.mirror)
    read = partial(read_out, model, options.data, precision=choose_precision(options.precision, device))
    unseen = read(options.split, views=views, with_pixels=isinstance(model, Classifier))
    logits, labels = unseen["logits"], unseen["labels"]
    probabilities, predicted = logits.softmax(1), logits.argmax(1)
    counts = confusion_matrix(predicted, labels, len(names))
    ranked = logits.topk(min(5, len(names))).indices == labels[:, None]
    recalls = counts.diagonal() / counts.sum(1)  # not a number for classes without a picture
    of_class = [None if recall != recall else recall for recall in recalls.tolist()]
    figures: dict[str, Any] = {
        "split": options.split,
        "pictures": len(labels),
        "views": len(views(torch.zeros(1, 1, 1, 1))),
        "accuracy": ranked[:, 0].double().mean().item(),
        "mean_accuracy_of_classes": recalls.nanmean().item(),
        "top5_accuracy": ranked.any(1).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "calibration_error": calibration_error(probabilities, labels),
        "accuracy_of_class": dict(zip(names, of_class, strict=True)),
    }
    if options.features:
        figures |= judge_features(read(options.train), unseen)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".json")
    write_json(figures, kept)
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    draw_confusion(counts, names, options.out)
    drawn = f"confusion: {options.out}"
    if isinstance(model, Classifier):
        attention = options.out.with_name(f"{options.out.stem}-attention.png")
        draw_attention(model, unseen, names).save(attention)
        drawn += f"; attention: {attention}"
    print(f"figures: {kept}; {drawn}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a run folder or an exported classifier")
    parser.add_argument("data", type=Path, help="folder of shards with pictures and classes")
    parser.add_argument("--split", default="test", help="the unseen split (%(default)s)")
    parser.add_argument("--train", default="train", help="what features are judged on (%(default)s)")
    parser.add_argument(
        "--shift", type=int, default=0, help="pixels by which views are moved (%(default)s: none is)"
    )
    parser.add_argument("--mirror", action="store_true", help="views are mirrored, too")
    parser.add_argument("--features", action="store_true", help="judge the features, too")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("classifier.png"), help="the picture (%(default)s)")
    return parser.parse_args()


def class_names(data: Path, classifier: ImageClassifier) -> list[str]:
    """What dataset.json calls the classes, or the classifier does. Raises UserError where they differ."""
    names = read_dataset_card(data).get("classes") or classifier.classes
    if len(names) != len(classifier.classes):
        raise UserError(f"{data} has {len(names)} classes, the classifier {len(classifier.classes)}")
    if classifier.named and list(names) != classifier.classes:
        number, own, other = next(
            (number, *pair)
            for number, pair in enumerate(zip(classifier.classes, names, strict=True))
            if pair[0] != pair[1]
        )
        raise UserError(f"class {number} is {own!r} to the classifier and {other!r} in {data}/dataset.json")
    return list(names)


@torch.inference_mode()
def read_out(
    model: Classifier | ResNet,
    data: Path,
    split: str,
    *,
    precision: torch.dtype,
    views: Callable[[Tensor], list[Tensor]] = lambda pixels: [pixels],
    with_pixels: bool = False,
) -> dict[str, Tensor]:
    """`labels`, `features` and `logits` of a split, of several `views` the logarithm of their mean
    probability, and if wanted its `pixels`, in 256 levels."""
    config, device = model.config, next(model.parameters()).device
    sample = ClassifierSample(config.height_width, config.num_classes)
    stream = ShardStream(shards_of(data, split), sample, 256, shuffle_buffer=0, repeat=False)
    parts: dict[str, list[Tensor]] = {"labels": [], "features": [], "logits": []}
    if with_pixels:
        parts["pixels"] = []
    for batch in stream:
        pixels = batch["pixels"]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            features, *others = map(model.features, views(fit_pixels(pixels.to(device), config)))
            logits = torch.stack([model.head(each).float().cpu() for each in (features, *others)])
        parts["features"].append(features.float().cpu())
        parts["logits"].append(logits.softmax(-1).mean(0).log() if others else logits[0])
        parts["labels"].append(batch["labels"])
        if with_pixels:
            parts["pixels"].append(((pixels + 1) * 127.5).round().byte())
    refuse_broken(stream)
    if not parts["labels"]:
        raise UserError(f"{data}/{split}-*.tar holds no samples")
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def judge_features(known: dict[str, Tensor], unseen: dict[str, Tensor]) -> dict[str, Any]:
    data = (known["features"], known["labels"], unseen["features"], unseen["labels"])
    figures: dict[str, Any] = {}
    for shots, accuracies in few_shot_accuracies(*data):
        mean = sum(accuracies) / len(accuracies)
        figures[f"{shots}_shot_accuracy"] = mean
        figures[f"{shots}_shot_spread"] = max(accuracies) - min(accuracies)
    figures["nearest_neighbour_accuracy"] = nearest_neighbour_accuracy(*data)
    figures["linear_probe_accuracy"] = linear_probe_accuracy(*data)
    return figures


def draw_attention(model: Classifier, unseen: dict[str, Tensor], names: list[str]) -> Image.Image:
    """Picture and its attention, from nothing (black) to the most (yellow) over the grey picture; from the
    surest mistakes to the surest hits."""
    from matplotlib import colormaps  # takes half a second to import

    truth = unseen["logits"].log_softmax(1).gather(1, unseen["labels"][:, None])[:, 0]
    order = truth.argsort()
    places = order[torch.linspace(0, len(order) - 1, min(DRAWN, len(order))).round().long()]
    pixels = unseen["pixels"][places] / 127.5 - 1
    device = next(model.parameters()).device
    light = attention_maps(model, fit_pixels(pixels.to(device), model.config)).cpu()
    least = light.amin((1, 2), keepdim=True)
    heat = torch.from_numpy(colormaps["inferno"](((light - least) / (1 - least).clamp(min=1e-6)).numpy()))
    mixed = 0.35 * pixels.mean(1, keepdim=True) + 0.65 * (2 * heat[..., :3].permute(0, 3, 1, 2) - 1)
    columns = [images_from_pixels(each) for each in (pixels, mixed)]
    predicted = unseen["logits"][places].argmax(1).tolist()
    labels = unseen["labels"][places].tolist()
    captions = [
        names[true] if true == said else f"{names[true]}, taken for {names[said]}"
        for true, said in zip(labels, predicted, strict=True)
    ]
    return labelled_grid(list(zip(*columns, strict=True)), captions, ["true class", "picture", "attention"])


if __name__ == "__main__":
    run_script(main)
