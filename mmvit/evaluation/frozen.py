"""How good a frozen classifier's features are: closed-form few-shot ridge regression, nearest neighbours, and
a linear probe."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.progress import with_progress

L2 = 2.0**10  # of the ridge regression, as in big_vision, the code of the paper's authors
BIAS = 100.0  # the constant feature
SHOTS, SEEDS = (1, 5, 10, 25), 3
PROBE_ROUNDS = 10  # of the linear probe's optimizer, between which it shows progress


def frozen_figures(
    features: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor
) -> dict[str, Any]:
    """Accuracy on held-out images of probes that learn from `features`: `K_shot_accuracy`, the mean over
    three draws, and `K_shot_spread` for K of 1, 5, 10 and 25; `nearest_neighbour_accuracy`;
    `linear_probe_accuracy`."""
    data = (held_out, held_out_labels)
    accuracies: dict[int, list[float]] = {shots: [] for shots in SHOTS}
    draws = itertools.product(SHOTS, range(SEEDS))
    for shots, seed in with_progress(draws, len(SHOTS) * SEEDS, "few-shot probes"):
        chosen = draw_shots(labels, shots, seed)
        accuracies[shots].append(few_shot_accuracy(features[chosen], labels[chosen], *data))
    figures: dict[str, Any] = {}
    for shots, found in accuracies.items():
        figures[f"{shots}_shot_accuracy"] = sum(found) / len(found)
        figures[f"{shots}_shot_spread"] = max(found) - min(found)
    figures["nearest_neighbour_accuracy"] = nearest_neighbour_accuracy(features, labels, *data)
    figures["linear_probe_accuracy"] = linear_probe_accuracy(features, labels, *data)
    return figures


def few_shot_accuracy(
    features: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, l2: float = L2
) -> float:
    """Accuracy of ridge regression to targets of ±1, in closed form (2010.11929, section 4.1).

    All features are standardised by the mean and deviation of the training ones, and a constant is added.

    Args:
        features: (samples, dimensions) to learn from, with `labels` (samples,) of the classes to choose from.
        held_out: (others, dimensions), with `held_out_labels` (others,).
    """
    classes = labels.unique()
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    known, others = (
        F.pad((each.double() - mean) / deviation, (0, 1), value=BIAS) for each in (features, held_out)
    )
    targets = (labels[:, None] == classes).double() * 2 - 1
    if len(known) < known.shape[1]:  # the dual form has the smaller matrix
        kernel = known @ known.T + l2 * torch.eye(len(known), dtype=torch.float64)
        weights = known.T @ torch.linalg.solve(kernel, targets)
    else:
        gram = known.T @ known + l2 * torch.eye(known.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, known.T @ targets)
    predicted = classes[(others @ weights).argmax(1)]
    return (predicted == held_out_labels).double().mean().item()


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of `shots` random samples of each class, or of all that it has."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:shots] for label in labels.unique()]
    return torch.cat(chosen)


def nearest_neighbour_accuracy(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a vote among the nearest neighbours by cosine, weighted by exp(similarity / temperature)
    (1805.01978)."""
    known, others = F.normalize(features.float(), dim=1), F.normalize(held_out.float(), dim=1)
    neighbours = min(neighbours, len(known))
    correct = 0
    parts = list(zip(others.split(1024), held_out_labels.split(1024), strict=True))
    for part, truth in with_progress(parts, len(others), "nearest neighbours", lambda pair: len(pair[0])):
        similar, places = (part @ known.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[places], (similar / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(held_out)


def linear_probe_accuracy(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    l2: float = 1e-4,
    iterations: int = 100,
) -> float:
    """Accuracy of multinomial logistic regression on standardised features, trained by L-BFGS to its optimum,
    which does not depend on the start."""
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
    known, others = ((each - mean) / deviation for each in (features.float(), held_out.float()))
    classes = labels.unique()
    targets = torch.searchsorted(classes, labels)
    layer = torch.nn.Linear(known.shape[1], len(classes))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=iterations // PROBE_ROUNDS,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(known), targets) + l2 * layer.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        for _ in with_progress(range(PROBE_ROUNDS), PROBE_ROUNDS, "linear probe"):
            optimizer.step(closure)
    with torch.no_grad():
        predicted = classes[layer(others).argmax(1)]
    return (predicted == held_out_labels).double().mean().item()
