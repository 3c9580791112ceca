"""Fréchet distance between two sets of images (1706.08500), and the feature spaces it is measured in."""

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.models.classification import fit_pixels
from mmvit.models.classifier import Classifier
from mmvit.progress import with_progress


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two sets of features, in float64.

    It depends on the feature space and on the number of samples (few samples raise it): report both with it,
    and compare like with like.

    Args:
        one, two: (samples, dimensions), two samples or more.

    Raises:
        ValueError: if the shapes do not match or a set has fewer than two samples.
    """
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or min(len(one), len(two)) < 2:
        raise ValueError(f"features of shapes {tuple(one.shape)} and {tuple(two.shape)} cannot be compared")
    one, two = one.double(), two.double()
    first, second = torch.atleast_2d(one.T.cov(), two.T.cov())
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # Σ₁ Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed
    return max(distance.item(), 0.0)


def coarse_pixels(pixels: Tensor, cells: int = 8) -> Tensor:
    """Mean colours of a grid of cells, (images, 3 · cells²), of pixels (images, 3, height, width): the
    feature space `pixels-8x8`."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, cells).flatten(1)


@dataclass(frozen=True)
class FeatureSpace:
    """A name, and `features`: pixels (images, 3, height, width) in [-1, 1] → (images, dimensions)."""

    name: str
    features: Callable[[Tensor], Tensor]

    def distance(self, one: Tensor, two: Tensor) -> float:
        """The Fréchet distance of two sets of images, given as pixels."""
        return frechet_distance(self.features(one), self.features(two))


def feature_space(source: str | Path | None) -> FeatureSpace:
    """The space that `source` names: mean colours of 8x8 cells for None; the features of a classifier of
    ours, named after its folder; or those of Inception v3 for torch-fidelity's `.pth` file, in which the
    distance is called FID."""
    if source is None:
        return FeatureSpace("pixels-8x8", coarse_pixels)
    source = Path(source)
    return inception_space(source) if source.suffix == ".pth" else classifier_space(source)


def classifier_space(classifier: Path) -> FeatureSpace:
    model = Classifier.from_pretrained(classifier)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        parts = with_progress(pixels.split(64), len(pixels), "features of images", len)
        return torch.cat([model.features(fit_pixels(part, model.config)) for part in parts])

    folder = classifier.resolve()
    return FeatureSpace((folder.parent if folder.name in ("best", "last") else folder).name, features)


def inception_space(weights: Path) -> FeatureSpace:
    """The features of Inception v3. Raises UserError if torch-fidelity or the weights are missing, or the
    file holds another network."""
    extractor = load_inception(weights)

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts = with_progress(levels.split(32), len(levels), "features of images", len)
        return torch.cat([extractor(part)[0] for part in parts])

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
        with tempfile.TemporaryDirectory() as folder:  # the extractor unpickles: give it what was read safely
            torch.save(state, safe := f"{folder}/inception.pth")
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError) as error:
        raise UserError(
            f"{weights} does not hold torch-fidelity's Inception v3 (of its releases "
            f"weights-inception-2015-12-05-6726825d.pth): {str(error).splitlines()[0]}"
        ) from None
