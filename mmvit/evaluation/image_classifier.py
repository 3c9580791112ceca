"""A trained classifier beside the names of its classes: Pillow pictures in, names out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import check_images, pixels_from_images
from mmvit.errors import UserError
from mmvit.hub import find_model_folder, write_json
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.models.registry import load_classifier
from mmvit.models.resnet import ResNet

CLASSES = "classes.json"  # beside the weights
UNTRAINED = (
    "this classifier has not learnt classes: its head is all zeros, as after pre-training. Train it on, by "
    "pipelines/train_classifier.py with --start.model FOLDER; its features need no head"
)


class ImageClassifier:
    """`classifier.classify(pictures)`: the likeliest classes of each.

    Pictures are resized and centre-cropped to the model's size, laid over white, and made grey where it reads
    grey.

    Args:
        model: the network.
        classes: names by number; numbers where there are none.

    Raises:
        UserError: when there are more names or fewer than classes.
    """

    def __init__(self, model: Classifier | ResNet, classes: Sequence[str] | None = None):
        number = model.config.num_classes
        if classes is not None and len(classes) != number:
            raise UserError(f"there are {len(classes)} names for a classifier of {number} classes")
        self.model, self.named = model.eval(), classes is not None
        self.classes = list(classes) if classes is not None else [str(label) for label in range(number)]

    @property
    def is_trained(self) -> bool:
        """Whether it has learnt classes: the head of one that was pre-trained without them is all zeros."""
        return bool(self.model.head.weight.any())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> Self:
        """Loads a run folder (its best model), an exported classifier or a Hub repository, a ViT's, a
        ResNet's or the classifier of one core with a generator.

        Raises:
            UserError: when the folder holds no classifier, or names for another number of classes.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        return cls(load_classifier(folder, device), read_classes(folder / CLASSES))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes the weights and, where it has names, classes.json."""
        folder = self.model.save_pretrained(folder, dtype)
        if self.named:
            write_json(self.classes, folder / CLASSES)
        return folder

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """What the head reads: (pictures, width), float32 on the CPU."""
        check_images(pictures)
        if not pictures:
            raise UserError("no pictures to classify; give at least one")
        config, found = self.model.config, []
        for first in range(0, len(pictures), batch_size):
            pixels = pixels_from_images(pictures[first : first + batch_size], *config.height_width)
            found.append(self.model.features(fit_pixels(pixels.to(self.device), config)).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def logits(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """(pictures, classes), float32 on the CPU. Raises UserError where the head is untrained."""
        if not self.is_trained:
            raise UserError(UNTRAINED)
        return self.model.head(self.features(pictures, batch_size).to(self.device)).float().cpu()

    def classify(
        self, pictures: Sequence[Image.Image], top: int = 5, batch_size: int = 64
    ) -> list[list[tuple[str, float]]]:
        """Of each picture the `top` likeliest classes with their probabilities, the likeliest first."""
        if top < 1:
            raise UserError(f"top is {top}; at least 1 class is told")
        best = self.logits(pictures, batch_size).softmax(-1).topk(min(top, len(self.classes)))
        return [
            [(self.classes[place], share) for share, place in zip(shares, places, strict=True)]
            for shares, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def read_classes(path: Path) -> list[str] | None:
    """The names in classes.json, None where it is not there. Raises UserError for anything else."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of names, a class each")
    return names
