"""Whether a classifier's confidence matches its accuracy, and which classes it confuses."""

from pathlib import Path

import torch
from torch import Tensor

from mmvit.files import whole_file

MOST_NAMED = 120  # classes; with more the names would overlap
LARGEST = 20.0  # inches, a side of the confusion matrix


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (1706.04599): the mean difference between confidence and accuracy over bins
    of confidence of equal width, each weighted by its share of the samples.

    Args:
        probabilities: (samples, classes), rows with sum 1.
        labels: (samples,).
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    differences = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, confidence - correct)
    return (differences.abs().sum() / len(labels)).item()


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each class (row) is predicted as each (column), int64 (classes, classes)."""
    places = labels * num_classes + predicted
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)


def draw_confusion(counts: Tensor, names: list[str], path: Path) -> None:
    """Draws `confusion_matrix` as shares of each true class."""
    from matplotlib.figure import Figure  # takes half a second to import

    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 1.5 + 0.45 * len(names)), LARGEST)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    if len(names) <= MOST_NAMED:
        size = 8 if len(names) <= 40 else 5
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) <= 20:
        for row, column in (shares > 0.005).nonzero().tolist():
            share = shares[row, column].item()
            colour = "white" if share > 0.5 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axes.text(column, row, f"{100 * share:.0f}", **text)
    axes.set(xlabel="predicted", ylabel="true", title="percent of each true class")
    figure.colorbar(image, shrink=0.8)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)
