"""A CLIP's retrieval, counted by hand."""

import pytest
import torch
from torch import nn

from mmvit.errors import UserError
from mmvit.evaluation.clip_report import retrieval


class Lookup(nn.Module):
    """A CLIP whose vectors are given: pixels are image vectors, ids pick caption vectors."""

    def __init__(self, captions: torch.Tensor):
        super().__init__()
        self.captions = nn.Parameter(captions)

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def embed_captions(self, ids: torch.Tensor) -> torch.Tensor:
        return self.captions[ids[:, 0]]


def batches(pixels: torch.Tensor, ids: list[int], size: int) -> list[dict[str, torch.Tensor]]:
    parts = zip(pixels.split(size), torch.tensor(ids).view(-1, 1).split(size), strict=True)
    return [{"pixels": part, "caption_ids": own} for part, own in parts]


@pytest.mark.parametrize("size", [2, 8])
def test_retrieval_is_counted_in_both_directions(size):
    # image 0 is nearest to caption 1; images 1 to 5 to their own; caption 0 is nearest to its own image
    vectors = torch.eye(6)
    pixels = vectors.clone()
    pixels[0] = torch.tensor([0.6, 0.8, 0, 0, 0, 0])
    figures = retrieval(Lookup(vectors), batches(pixels, [*range(6)], size))
    assert figures == pytest.approx(
        {"caption_at_1": 5 / 6, "caption_at_5": 1, "image_at_1": 1, "image_at_5": 1}
    )
    pixels = vectors.roll(1, dims=0)  # each image shows the caption before it, every score of the own is 0
    figures = retrieval(Lookup(vectors), batches(pixels, [*range(6)], size))
    assert figures["caption_at_1"] == figures["image_at_1"] == 0


def test_equal_captions_belong_to_all_of_their_images():
    pixels = torch.eye(3)[[0, 0, 1]]
    figures = retrieval(Lookup(torch.eye(3)), batches(pixels, [0, 0, 1], 3))
    assert figures["caption_at_1"] == figures["image_at_1"] == 1


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no samples to evaluate on"):
        retrieval(Lookup(torch.eye(2)), [])
