"""How good a classifier's features are, without training it: closed-form few-shot ridge regression, nearest
neighbours, and a linear probe."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

L2 = 2.0**10  # of the ridge regression, as the paper's authors have it in big_vision
BIAS = 100.0  # the constant feature
SHOTS = (1, 5, 10, 25)


def few_shot_accuracy(
    features: Tensor, labels: Tensor, unseen: Tensor, unseen_labels: Tensor, l2: float = L2
) -> float:
    """Accuracy on `unseen` of ridge regression to targets of ±1, in closed form (2010.11929, section 4.1).

    Features are brought to mean 0 and standard deviation 1 in each dimension, as the training ones have it,
    and get a constant beside them.

    Args:
        features: (samples, dimensions), of which the regression learns; `unseen` (others, dimensions).
        labels: (samples,); `unseen_labels` (others,). Classes are those that occur in `labels`.
    """
    classes = labels.unique()
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    known, others = (
        F.pad((each.double() - mean) / deviation, (0, 1), value=BIAS) for each in (features, unseen)
    )
    targets = (labels[:, None] == classes).double() * 2 - 1
    if len(known) < known.shape[1]:  # the dual form has the smaller matrix
        kernel = known @ known.T + l2 * torch.eye(len(known), dtype=torch.float64)
        weights = known.T @ torch.linalg.solve(kernel, targets)
    else:
        gram = known.T @ known + l2 * torch.eye(known.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, known.T @ targets)
    predicted = classes[(others @ weights).argmax(1)]
    return (predicted == unseen_labels).double().mean().item()


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of `shots` samples of each class, or of all that it has."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:shots] for label in labels.unique()]
    return torch.cat(chosen)


def nearest_neighbour_accuracy(
    features: Tensor,
    labels: Tensor,
    unseen: Tensor,
    unseen_labels: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a vote among the nearest by cosine, each with weight exp(similarity / temperature)
    (1805.01978)."""
    known, others = F.normalize(features.float(), dim=1), F.normalize(unseen.float(), dim=1)
    neighbours = min(neighbours, len(known))
    right = 0
    for part, truth in zip(others.split(1024), unseen_labels.split(1024), strict=True):
        similar, places = (part @ known.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[places], (similar / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(unseen)


def linear_probe_accuracy(
    features: Tensor,
    labels: Tensor,
    unseen: Tensor,
    unseen_labels: Tensor,
    l2: float = 1e-4,
    iterations: int = 100,
) -> float:
    """Accuracy of multinomial logistic regression on normalised features, trained by L-BFGS to its optimum,
    which is the same whatever the start."""
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
    known, others = ((each - mean) / deviation for each in (features.float(), unseen.float()))
    classes = labels.unique()
    targets = torch.searchsorted(classes, labels)
    layer = torch.nn.Linear(known.shape[1], len(classes))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(known), targets) + l2 * layer.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        predicted = classes[layer(others).argmax(1)]
    return (predicted == unseen_labels).double().mean().item()


def few_shot_accuracies(
    features: Tensor, labels: Tensor, unseen: Tensor, unseen_labels: Tensor, seeds: int = 3
) -> Iterator[tuple[int, list[float]]]:
    """(shots, accuracy of each seed) for 1, 5, 10 and 25 shots."""
    for shots in SHOTS:
        accuracies = []
        for seed in range(seeds):
            chosen = draw_shots(labels, shots, seed)
            accuracies.append(few_shot_accuracy(features[chosen], labels[chosen], unseen, unseen_labels))
        yield shots, accuracies
