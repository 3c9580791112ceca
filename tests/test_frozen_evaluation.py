"""Classifiers judged without training: exact values of each measure, and the script on tiny shards."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from mmvit.core.transformer import TransformerConfig
from mmvit.data.writing import ShardWriter
from mmvit.evaluation.accuracy import classification_metrics, shifted_and_mirrored
from mmvit.evaluation.attention_maps import attention_maps, attention_weights, rollout
from mmvit.evaluation.calibration import calibration_error, confusion_matrix, draw_confusion
from mmvit.evaluation.classifier_report import evaluate_classifier, read_out
from mmvit.evaluation.frozen import (
    draw_shots,
    few_shot_accuracy,
    linear_probe_accuracy,
    nearest_neighbour_accuracy,
)
from mmvit.evaluation.saliency import saliency_maps
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import ResNet, ResNetConfig
from mmvit.streams.shards import read_shard


def clouds(number: int, dimensions: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three centres, and which."""
    centres = 3 * torch.randn(3, dimensions, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(number) % 3
    noise = torch.randn(number, dimensions, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + spread * noise, labels


def test_what_many_classes_confuse_is_drawn_small_enough(tmp_path):
    draw_confusion(torch.eye(500, dtype=torch.long), [str(i) for i in range(500)], tmp_path / "many.png")
    assert max(Image.open(tmp_path / "many.png").size) < 2500


@pytest.mark.parametrize(("number", "dimensions"), [(30, 5), (30, 200)])  # the primal form, and the dual
def test_few_shot_regression_is_ridge_in_closed_form(number, dimensions):
    features, labels = clouds(number, dimensions, 1, spread=6.0)
    held_out, truth = clouds(300, dimensions, 2, spread=6.0)
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
    known, others = (
        torch.cat([(each - mean) / deviation, torch.full((len(each), 1), 100.0)], 1).double()
        for each in (features, held_out)
    )
    targets = torch.where(labels[:, None] == torch.arange(3), 1.0, -1.0).double()
    stacked = torch.cat([known, 1024**0.5 * torch.eye(known.shape[1])])  # least squares of both terms
    zeros = torch.zeros(known.shape[1], 3, dtype=torch.float64)
    weights = torch.linalg.lstsq(stacked, torch.cat([targets, zeros])).solution
    expected = ((others @ weights).argmax(1) == truth).double().mean().item()
    assert few_shot_accuracy(features, labels, held_out, truth) == expected
    assert 0.4 < expected < 1


def test_copies_are_shifted_and_mirrored():
    pixels = torch.arange(12.0).view(1, 1, 3, 4)
    assert [copy.tolist() for copy in shifted_and_mirrored(pixels)] == [pixels.tolist()]
    copies = shifted_and_mirrored(pixels, shift=1, mirror=True)
    assert len(copies) == 10
    down, right = copies[1][0, 0], copies[3][0, 0]
    assert down.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert right.tolist() == [[0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10]]
    assert all(torch.equal(one.flip(-1), other) for one, other in zip(copies[:5], copies[5:], strict=True))


def test_few_shot_predictions_depend_on_the_bias():
    """Of few, overlapping and uneven samples every single prediction is the closed form's."""
    features, labels = clouds(24, 4, 3, spread=9.0)
    labels = torch.where(torch.arange(24) < 15, 0, labels)
    held_out, truth = clouds(200, 4, 4, spread=9.0)
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
    known, others = (
        torch.cat([(each - mean) / deviation, torch.full((len(each), 1), 100.0)], 1).double()
        for each in (features, held_out)
    )
    targets = torch.where(labels[:, None] == torch.arange(3), 1.0, -1.0).double()
    weights = torch.linalg.inv(known.T @ known + 1024 * torch.eye(5)) @ known.T @ targets
    expected = ((others @ weights).argmax(1) == truth).double()
    found = [
        few_shot_accuracy(features, labels, held_out[i : i + 1], truth[i : i + 1]) for i in range(len(truth))
    ]
    assert found == expected.tolist()
    assert 0.1 < expected.mean() < 0.9


class Scores(torch.nn.Module):
    """A classifier of six classes whose pixels are its logits."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = ClassifierConfig(num_classes=6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.weight


def test_the_first_class_is_among_the_first_five():
    logits = torch.tensor([5.0, 4, 3, 2, 1, 0]).expand(4, 6)
    labels = torch.tensor([0, 0, 4, 5])
    found = classification_metrics(Scores(), [{"pixels": logits, "labels": labels}])
    assert found["accuracy"] == 0.5
    assert found["top5_accuracy"] == 0.75
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_shots_are_so_many_of_each_class_and_a_draw_of_its_own():
    labels = torch.tensor([0] * 10 + [1] * 3 + [5] * 10)
    drawn = draw_shots(labels, 5, seed=0)
    assert labels[drawn].bincount().tolist() == [5, 3, 0, 0, 0, 5]
    assert len(drawn.unique()) == 13
    assert torch.equal(drawn, draw_shots(labels, 5, seed=0))
    assert not torch.equal(drawn, draw_shots(labels, 5, seed=1))


def test_neighbours_vote_with_their_weights():
    known = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.0, 1.0]])
    labels, held_out = torch.tensor([2, 0, 0, 1]), torch.tensor([[2.0, 0.0]])
    # similarities 1, 0.8, 0.8: exp(1 / t) against 2 exp(0.8 / t), equal at t = 0.2 / ln 2 = 0.289
    vote = {"neighbours": 3}
    assert (
        nearest_neighbour_accuracy(known, labels, held_out, torch.tensor([2]), temperature=0.28, **vote) == 1
    )
    assert (
        nearest_neighbour_accuracy(known, labels, held_out, torch.tensor([0]), temperature=0.30, **vote) == 1
    )


def test_the_linear_probe_separates_what_can_be_separated():
    features, labels = clouds(60, 8, 1)
    held_out, truth = clouds(300, 8, 2)
    assert linear_probe_accuracy(features, labels * 4, held_out, truth * 4) > 0.99
    assert linear_probe_accuracy(features, labels, held_out, (truth + 1) % 3) < 0.01


def test_calibration_has_its_exact_value():
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.35, 0.65], [0.35, 0.65]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = 4 / 6 * abs(0.9 - 3 / 4) + 2 / 6 * abs(0.65 - 1)
    assert calibration_error(sure, labels, bins=10) == pytest.approx(expected)
    edge = torch.tensor(
        [[0.45, 0.3, 0.25], [0.5, 0.3, 0.2], [0.55, 0.25, 0.2]]
    )  # bins end at their upper edge
    expected = abs(0.45 + 0.5 - 1) / 3 + abs(0.55 - 1) / 3
    assert calibration_error(edge, torch.tensor([1, 0, 0]), bins=10) == pytest.approx(expected)
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0
    counts = confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("pooling", "positions"),
    [("cls", "learned_1d"), ("mean", "rotary_2d"), ("mean_beside_cls", "relative_1d")],
)
@torch.no_grad()
def test_attention_maps_are_made_of_the_attention_that_the_model_computes(pooling, positions):
    torch.manual_seed(0)
    core = TransformerConfig(width=16, depth=2, num_heads=2, qk_norm=True)
    config = ClassifierConfig(
        image_size=(16, 32), patch_size=8, num_classes=3, pooling=pooling, positions=positions, core=core
    )
    model = Classifier(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 16, 32)
    seen = []
    attention = model.core.blocks[1].attention
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    weights = attention_weights(model, pixels)
    hook.remove()
    (x, output), tokens = seen[0], 8 + model.num_prefix
    assert [w.shape for w in weights] == [(2, 2, tokens, tokens)] * 2
    value = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 8)).transpose(1, 2)
    by_weights = attention.out((weights[1] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_weights, output)
    first, second = (0.5 * w.mean(1) + 0.5 * torch.eye(tokens) for w in weights)
    torch.testing.assert_close(rollout(weights), second @ first)
    torch.testing.assert_close(rollout(weights).sum(-1), torch.ones(2, tokens))
    maps = attention_maps(model, pixels)
    assert maps.shape == (2, 16, 32)
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
    assert ((maps == 1).float().mean((1, 2)) > 0.04).all()  # a twentieth, so that the rest is not dark
    assert maps.min() > 0


def images_with_a_patch(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise of 6 x 6 patches of 4 pixels, of which one has the colour of the class, or none in class 4, and
    another one is white whatever the class; the classes, and the places of their patches."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.rand(number, 3, 24, 24, generator=rng) - 0.5
    labels = torch.randint(5, (number,), generator=rng)
    places = torch.rand(number, 36, generator=rng).argsort(1)[:, :2]
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
    for image, label, (own, other) in zip(pixels, labels.tolist(), places.tolist(), strict=True):
        paint(image, other, torch.ones(3))
        if label < 4:
            paint(image, own, colours[label])
    return pixels, labels, places[:, 0]


def paint(image: torch.Tensor, place: int, colour: torch.Tensor) -> None:
    row, column = divmod(place, 6)
    image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = colour[:, None, None]


def test_saliency_finds_the_patch_that_decides_where_attention_does_not():
    torch.manual_seed(0)
    core = TransformerConfig(width=32, depth=2, num_heads=2)
    stem = {"stem": "residual", "stem_width": 16, "stem_blocks": (1, 1), "pooling": "mean"}
    model = Classifier(
        ClassifierConfig(image_size=24, patch_size=4, num_classes=5, core=core, **stem)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(100):
        pixels, labels, _ = images_with_a_patch(32, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    pixels, labels, places = images_with_a_patch(128, seed=1000)
    model.eval()
    with torch.no_grad():
        known = (model(pixels).argmax(1) == labels) & (labels < 4)
    assert known.sum() > 80

    def hits(maps: torch.Tensor) -> float:
        """How often the strongest patch is the one that decides; by chance once in 36."""
        cells = torch.nn.functional.avg_pool2d(maps[:, None], 4).flatten(1)
        return (cells.argmax(1) == places)[known].float().mean().item()

    found = saliency_maps(model, pixels)
    assert found.shape == (128, 24, 24)
    assert (found.amin((1, 2)) == 0).all()
    assert (found.amax((1, 2)) == 1).all()
    assert hits(found) > 0.7  # the deviation from the mean colour alone finds 54%
    assert hits(attention_maps(model, pixels)) < 0.5  # the stem's norms have told all other patches


class Flat(torch.nn.Module):
    """A classifier of two classes whose features are its two pixels, and whose head doubles them."""

    def __init__(self):
        super().__init__()
        self.config = ClassifierConfig(image_size=(1, 2), patch_size=1, channels=1, num_classes=2)
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.head.weight.data = 2 * torch.eye(2)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)


def test_augmented_copies_vote_with_probabilities():
    pixels, labels = (
        torch.tensor([[0.9, -0.3], [0.1, 0.2]])[:, None, None].expand(2, 3, 1, 2),
        torch.tensor([0, 1]),
    )
    with mock.patch(
        "mmvit.evaluation.classifier_report.batches_of",
        return_value=[{"keys": ["a", "b"], "pixels": pixels, "labels": labels}],
    ):
        found = read_out(
            Flat(), Path(), "test", precision=torch.float32, copies=lambda x: [x, x.flip(-1), -x]
        )
    x = pixels[:, 0, 0]
    shares = torch.stack([(2 * each).softmax(1) for each in (x, x.flip(-1), -x)]).mean(0)
    torch.testing.assert_close(found["logits"].softmax(1), shares)
    torch.testing.assert_close(found["features"], x)  # of the image itself


def test_probes_learn_from_the_training_split(tiny_shards, tmp_path):
    core = TransformerConfig(width=16, depth=1, num_heads=2)
    model = Classifier(ClassifierConfig(image_size=16, patch_size=8, num_classes=4, core=core))
    with mock.patch("mmvit.evaluation.classifier_report.frozen_figures", return_value={}) as probes:
        evaluate_classifier(model.save_pretrained(tmp_path), tiny_shards, "held-out", probe=True)
    known, labels, held_out, truth = probes.call_args.args
    assert known.shape == (48, 16)
    assert held_out.shape == (8, 16)
    assert labels.tolist() == [number % 4 for number in range(48)]
    assert truth.tolist() == [number % 4 for number in range(8)]
    with mock.patch("mmvit.evaluation.classifier_report.frozen_figures", return_value={}) as probes:
        figures = evaluate_classifier(tmp_path, tiny_shards, "held-out", probe=True, sample=5)
    assert probes.call_args.args[1].tolist() == [number % 4 for number in (0, 12, 24, 35, 47)]
    assert figures["learnt_from"] == 5


def test_the_script_measures_and_draws(run_script, tiny_shards, tmp_path):
    core = TransformerConfig(width=16, depth=1, num_heads=2)
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(image_size=16, patch_size=8, num_classes=4, core=core))
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "sheet.png"
    arguments = (tmp_path / "model", tiny_shards, "--split", "held-out", "--probe", "--out", out)
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(out.with_suffix(".json").read_text())
    assert figures["images"] == 8
    assert len(figures["accuracy_of_class"]) == 4
    assert sum(figures["accuracy_of_class"].values()) / 4 == pytest.approx(figures["accuracy"])
    assert figures["mean_accuracy_of_classes"] == pytest.approx(figures["accuracy"])  # as many of each
    assert figures["linear_probe_accuracy"] == figures["25_shot_accuracy"] == 1  # colours are easy
    assert figures["nearest_neighbour_accuracy"] > 0.9
    assert Image.open(out).width > 300
    assert figures["tta"] == 1
    ran = run_script("pipelines/evaluate.py", *arguments[:-2], "--precision", "bf16", "--out", out)
    assert ran.returncode == 0, ran.stderr
    rough = json.loads(out.with_suffix(".json").read_text())["loss"]
    assert rough == pytest.approx(figures["loss"], rel=0.05)
    assert rough != figures["loss"]
    ran = run_script("pipelines/evaluate.py", *arguments, "--shift", 1, "--mirror")
    assert ran.returncode == 0, ran.stderr
    more = json.loads(out.with_suffix(".json").read_text())
    assert more["tta"] == 10
    assert more["loss"] != figures["loss"]
    assert Image.open(out.with_name("sheet-saliency.png")).height > 8 * 96
    with ShardWriter(tmp_path / "two", "held-out") as writer:  # of four classes
        for sample in read_shard(tiny_shards / "held-out-000000.tar"):
            if sample.files["cls"] in (b"0", b"2"):
                writer.write(sample.key, sample.files)
    arguments = (tmp_path / "model", tmp_path / "two", "--split", "held-out", "--out", tmp_path / "two.png")
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "two.json").read_text())
    known = [figures["accuracy_of_class"][name] for name in "02"]
    assert [figures["accuracy_of_class"][name] for name in "13"] == [None, None]
    assert figures["mean_accuracy_of_classes"] == pytest.approx(sum(known) / 2)
    resnet = ResNet(ResNetConfig(image_size=16, num_classes=4, width=32, depths=(1,), root="small"))
    resnet.save_pretrained(tmp_path / "resnet")
    out = tmp_path / "resnet.png"
    arguments = (tmp_path / "resnet", tiny_shards, "--split", "held-out", "--out", out)
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 2
    assert "has not learnt classes: its head is all zeros" in ran.stderr
    torch.nn.init.normal_(resnet.head.weight)
    resnet.save_pretrained(tmp_path / "resnet")
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(out.with_suffix(".json").read_text())["accuracy"] == 0.25  # a head of zeros
    assert Image.open(out.with_name("resnet-saliency.png")).height > 8 * 96
    ran = run_script("pipelines/evaluate.py", tmp_path / "model", tiny_shards, "--split", "none")
    assert ran.returncode == 2
    assert "has no split 'none'" in ran.stderr
    shutil.copytree(tiny_shards, tmp_path / "shards")
    shutil.copy(tiny_shards / "train-000000.tar", tmp_path / "shards" / "held-out-hard-000000.tar")
    arguments = (tmp_path / "model", tmp_path / "shards", "--split", "held-out", "--out", out)
    assert run_script("pipelines/evaluate.py", *arguments).returncode == 0
    assert json.loads(out.with_suffix(".json").read_text())["images"] == 8
    damaged = tmp_path / "shards" / "held-out-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:6000])
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 2
    assert "figures of the rest would not compare with others" in ran.stderr
