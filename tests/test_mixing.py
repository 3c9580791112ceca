"""Augmentation of batches: every image by its own draw, and labels that say what is in the image."""

import pytest
import torch

from mmvit.data.mixing import Mixing, MixingConfig, draw_boxes

CLASSES = 4


def batch(number: int = 64, size: int = 16) -> dict:
    """Images of one value each, which tells their class: -1, -1/3, 1/3 or 1."""
    labels = torch.arange(number) % CLASSES
    values = labels.float() * 2 / (CLASSES - 1) - 1
    return {
        "pixels": values.view(-1, 1, 1, 1).expand(-1, 3, size, size).clone(),
        "labels": labels,
        "keys": "k",
    }


def value_of(labels: torch.Tensor) -> torch.Tensor:
    """The mean pixel that images of these shares have."""
    return labels @ (torch.arange(CLASSES) * 2 / (CLASSES - 1) - 1)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_the_shares_of_what_is_in_the_image(settings):
    torch.manual_seed(0)
    mixed = Mixing(MixingConfig(**settings), CLASSES)(batch())
    torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(64))
    torch.testing.assert_close(value_of(mixed["labels"]), mixed["pixels"].mean((1, 2, 3)))
    assert mixed["keys"] == "k"
    blended = (mixed["labels"] > 0).sum(1) == 2
    assert blended.float().mean() > 0.3
    of_one_value = mixed["pixels"].flatten(1).std(1) < 1e-6
    if "cutmix" not in settings:
        assert of_one_value.all()
        assert len(mixed["labels"].max(1).values.unique()) > 20  # every image has a share of its own
    elif "mixup" not in settings:
        assert not (of_one_value & blended).any()
        assert ((mixed["pixels"] * 3).round() - mixed["pixels"] * 3).abs().max() < 1e-5  # nothing is blended
    else:
        assert (of_one_value & blended).any()
        assert (~of_one_value).any()


def test_boxes_have_the_area_that_was_drawn():
    torch.manual_seed(0)
    boxes = draw_boxes(torch.full((2000,), 0.25), 64, 32)
    whole = boxes[:, 0].sum(1) + boxes[:, -1].sum(1) + boxes[:, :, 0].sum(1) + boxes[:, :, -1].sum(1) == 0
    assert whole.sum() > 100
    areas = boxes.mean((1, 2))
    torch.testing.assert_close(areas[whole], torch.full_like(areas[whole], 0.25), rtol=0.1, atol=0)
    assert areas.max() < 0.28
    assert not draw_boxes(torch.zeros(3), 8, 8).any()
    small = draw_boxes(torch.full((2000,), 0.01), 64, 32)
    assert (small.mean(0) > 0).all()  # they lie anywhere, corners included
    rows, columns = small.sum(2).argmax(1), small.sum(1).argmax(1)
    assert torch.corrcoef(torch.stack((rows, columns)).float())[0, 1].abs() < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_gets_operations_of_its_own(channels):
    torch.manual_seed(0)
    image = torch.rand(1, channels, 16, 16) * 2 - 1
    pixels = image.repeat(64, 1, 1, 1)
    mixing = Mixing(MixingConfig(rand_augment=1, magnitude=15), CLASSES, channels)
    made = mixing({"pixels": pixels, "labels": torch.arange(64) % CLASSES})
    assert torch.equal(made["labels"], torch.arange(64) % CLASSES)
    assert made["pixels"].shape == pixels.shape
    assert made["pixels"].abs().max() <= 1
    different = {tuple(image.flatten().mul(1000).round().int().tolist()) for image in made["pixels"]}
    assert len(different) > 12
    assert torch.equal(pixels, image.expand_as(pixels))  # what came in is as it was


def test_it_draws_from_torchs_generator_alone():
    mixing = Mixing(MixingConfig(rand_augment=2, mixup=0.3, cutmix=0.5), CLASSES)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mixing(batch())["pixels"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
