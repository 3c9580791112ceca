"""A trained classifier with the names of its classes: Pillow images in, names out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.images import Fit, check_images, pixels_from_images
from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError
from mmvit.files import read_json, write_json
from mmvit.hub import find_model_folder
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.models.registry import load_classifier
from mmvit.models.resnet import ResNet
from mmvit.weights import MAX_FILE_SIZE

CLASSES = "classes.json"  # beside the weights
UNTRAINED = (
    "this classifier has not learnt classes: its head is all zeros, as after pre-training. Fine-tune it with "
    "mmvit train RECIPE --start.model FOLDER; its features need no head"
)


class ImageClassifier:
    """`classifier.classify(images)` returns the likeliest classes of each image.

    Images are resized and centre-cropped, or padded with white (`fit="pad"`), to the model's size, laid over
    white, and converted to grey if it reads grey.

    Args:
        model: the network.
        classes: names by number; None for numbers.

    Raises:
        UserError: if the number of names is not the number of classes.
    """

    def __init__(self, model: Classifier | ResNet, classes: Sequence[str] | None = None):
        number = model.config.num_classes
        if classes is not None and len(classes) != number:
            raise UserError(
                f"expected {number} names for a classifier of {number} classes, got {len(classes)}"
            )
        self.model, self.named = model.eval(), classes is not None
        self.classes = list(classes) if classes is not None else [str(label) for label in range(number)]

    @property
    def is_trained(self) -> bool:
        """False after pre-training without classes, which leaves the head all zeros."""
        return bool(self.model.head.weight.any())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> Self:
        """Loads a run folder (see `mmvit.hub.find_model_folder`), an exported model or a Hub repository: a
        ViT, a ResNet, or the classifier that shares its core with a generator.

        Args:
            device: by default a GPU if there is one.

        Raises:
            UserError: if the folder holds no classifier, or names for another number of classes.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        return cls(load_classifier(folder, device), read_classes(folder / CLASSES))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_file_size: int = MAX_FILE_SIZE
    ) -> Path:
        """Writes the weights, and classes.json if the classes have names."""
        folder = self.model.save_pretrained(folder, dtype, max_file_size)
        if self.named:
            write_json(self.classes, folder / CLASSES)
        return folder

    def check_classes(self, data: Path) -> list[str]:
        """The names of the classes: those in the dataset.json of `data`, or its own. Raises UserError if they
        differ."""
        names = read_dataset_card(data).get("classes") or self.classes
        if len(names) != len(self.classes):
            raise UserError(f"{data} has {len(names)} classes, the classifier has {len(self.classes)}")
        if self.named:
            for number, (own, other) in enumerate(zip(self.classes, names, strict=True)):
                if own != other:
                    raise UserError(
                        f"class {number} is {own!r} to the classifier and {other!r} in {data}/dataset.json: "
                        "use data with the classes that it was trained on"
                    )
        return list(names)

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], batch_size: int = 64, fit: Fit = "crop") -> Tensor:
        """What the head reads: (images, width), float32 on the CPU."""
        check_images(images)
        if not images:
            raise UserError("no images to classify: expected at least one")
        config, found = self.model.config, []
        for first in range(0, len(images), batch_size):
            pixels = pixels_from_images(images[first : first + batch_size], *config.height_width, fit)
            found.append(self.model.features(fit_pixels(pixels.to(self.device), config)).float().cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def logits(self, images: Sequence[Image.Image], batch_size: int = 64, fit: Fit = "crop") -> Tensor:
        """(images, classes), float32 on the CPU. Raises UserError if the head is untrained."""
        if not self.is_trained:
            raise UserError(UNTRAINED)
        return self.model.head(self.features(images, batch_size, fit).to(self.device)).float().cpu()

    def classify(
        self, images: Sequence[Image.Image], top: int = 5, batch_size: int = 64, fit: Fit = "crop"
    ) -> list[list[tuple[str, float]]]:
        """The `top` likeliest classes of each image with their probabilities, the likeliest first."""
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}")
        best = self.logits(images, batch_size, fit).softmax(-1).topk(min(top, len(self.classes)))
        return [
            [(self.classes[place], share) for share, place in zip(shares, places, strict=True)]
            for shares, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def read_classes(path: Path) -> list[str] | None:
    """The names in classes.json; None if there is no such file. Raises UserError if it is not a list of
    names."""
    if not path.is_file():
        return None
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of names: expected one for each class")
    return names
