"""Where Fréchet distances are measured: a space of features, with its name."""

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.evaluation.frechet import coarse_pixels, frechet_distance
from mmvit.models.classifier import Classifier
from mmvit.models.perceptual import fit_pixels


@dataclass(frozen=True)
class FeatureSpace:
    """`features`: pixels (pictures, 3, height, width) in [-1, 1] → (pictures, dimensions)."""

    name: str
    features: Callable[[Tensor], Tensor]

    def distance(self, one: Tensor, two: Tensor) -> float:
        """The Fréchet distance of two sets of pictures, as pixels."""
        return frechet_distance(self.features(one), self.features(two))


def feature_space(source: Path | None) -> FeatureSpace:
    """Mean colours of 8x8 cells where there is no `source`; what the head of a classifier of ours reads,
    named by its folder; or that of Inception v3, whose weights torch-fidelity publishes as a `.pth` file, in
    which the distance is called FID (1706.08500)."""
    if source is None:
        return FeatureSpace("pixels-8x8", coarse_pixels)
    return inception_space(source) if source.suffix == ".pth" else classifier_space(source)


def classifier_space(classifier: Path) -> FeatureSpace:
    model = Classifier.from_pretrained(classifier)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        return torch.cat([model.features(fit_pixels(part, model.config)) for part in pixels.split(64)])

    folder = classifier.resolve()
    return FeatureSpace((folder.parent if folder.name in ("best", "last") else folder).name, features)


def inception_space(weights: Path) -> FeatureSpace:
    """Raises UserError where torch-fidelity or the weights are missing, or these are of another network."""
    extractor = load_inception(weights)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return torch.cat([extractor(part)[0] for part in levels.split(32)])

    return FeatureSpace("inception-v3", features)


def load_inception(weights: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f'the package {error.name} is missing; install it with: pip install "mmvit[fid]"'
        ) from None
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:  # the extractor unpickles: it gets what was read safely
            torch.save(state, safe := f"{folder}/inception.pth")
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError) as error:
        raise UserError(
            f"{weights} does not hold torch-fidelity's Inception v3 (of its releases "
            f"weights-inception-2015-12-05-6726825d.pth): {str(error).splitlines()[0]}"
        ) from None
