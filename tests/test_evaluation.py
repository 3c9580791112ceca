"""Measures against exact values."""

import pickle
import sys
import types

import pytest
import torch
from torch import nn

from mmvit.errors import UserError
from mmvit.evaluation.code_use import use_metrics
from mmvit.evaluation.frechet import coarse_pixels, feature_space, frechet_distance
from mmvit.evaluation.generated import COPY, all_alike, diversity, nearest
from mmvit.evaluation.held_out import evenly_spread
from mmvit.evaluation.reconstruction import image_psnr, image_ssim
from mmvit.evaluation.retrieval import caption_ranks, pixel_ranks
from mmvit.evaluation.splits import listed


def gaussian(mean: torch.Tensor, root: torch.Tensor, number: int = 4000) -> torch.Tensor:
    """Samples whose mean and covariance are exactly `mean` and root · rootᵀ."""
    white = torch.randn(number, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    return mean + white @ root.T


def test_frechet_distance_of_gaussians_has_its_closed_form():
    one = gaussian(torch.tensor([1.0, 2, 3]).double(), torch.diag(torch.tensor([1.0, 2, 3])).double())
    two = gaussian(torch.tensor([1.0, 0, 3]).double(), torch.diag(torch.tensor([2.0, 2, 1])).double())
    # |μ₁ − μ₂|² = 4; variances commute, so (1 − 2)² + 0 + (3 − 1)²
    assert frechet_distance(one, two) == pytest.approx(4 + 1 + 4)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert frechet_distance(one @ turn, two @ turn) == pytest.approx(9)
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(one, two[:, :2])


def test_frechet_distance_where_covariances_do_not_commute():
    root = torch.tensor([[1.0, 0.5], [0.0, 2.0]]).double()
    one, two = gaussian(torch.zeros(2).double(), root), gaussian(torch.zeros(2).double(), root.flip(0, 1))
    first, second = root @ root.T, root.flip(0, 1) @ root.flip(0, 1).T
    product = first @ second  # 2 x 2: tr(M^½) = sqrt(tr M + 2 sqrt(det M))
    crossed = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = first.trace() + second.trace() - 2 * crossed
    assert frechet_distance(one, two) == pytest.approx(expected.item())


def test_what_is_not_finite_has_no_rank():
    images = torch.zeros(2, 3)
    with pytest.raises(UserError, match="generated images contain NaN or infinity"):
        pixel_ranks(torch.full((2, 3), float("nan")), images, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="scores contain NaN or infinity"):
        caption_ranks(torch.full((1, 2), float("nan")), torch.tensor([[True, False]]))


def test_half_of_the_ties_outrank_the_own_candidate_rounded_up():
    belongs = torch.zeros(4, 6, dtype=torch.bool)
    belongs[:, 0] = True
    scores = torch.tensor(
        [[2.0, 1, 1, 1, 1, 1], [1.0, 1, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 0], [1.0, 2, 1, 1, 1, 1]]
    )
    assert caption_ranks(scores, belongs).tolist() == [0, 1, 2, 3]  # with 0, 1, 3 and 4 ties
    belongs[1, 1] = True  # the same score, but also its own
    assert caption_ranks(scores, belongs).tolist() == [0, 0, 2, 3]


def test_psnr_and_ssim_of_known_errors():
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    off = torch.tensor([0.0, 0.2, 0.02])[:, None, None, None]
    torch.testing.assert_close(image_psnr(pixels + off, pixels), torch.tensor([100.0, 20.0, 40.0]))
    similar = image_ssim(pixels + off, pixels)
    assert similar[0] == pytest.approx(1)
    assert similar[1] < similar[2] < 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image_ssim(pixels + off, pixels), similar)
    flat, other = torch.full((1, 3, 32, 32), -0.2), torch.full((1, 3, 32, 32), 0.4)
    # without variance only the luminance term is left: (2 · 0.4 · 0.7 + c) / (0.4² + 0.7² + c), c = 0.01²
    assert image_ssim(flat, other).item() == pytest.approx(0.5601 / 0.6501, rel=1e-3)


def test_coarse_pixels_are_mean_colours():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, 1, :2, :2] = 1
    features = coarse_pixels(pixels)
    assert features.shape == (1, 192)
    assert features.sum() == features[0, 64] == 1


def test_use_of_a_codebook_is_that_of_its_counts():
    figures = use_metrics(torch.tensor([5.0, 5, 0, 10]).double())
    assert figures["codes_in_use"] == 0.75
    assert figures["perplexity"] == pytest.approx(2**1.5)  # half, and two quarters: 1.5 bits


def test_references_are_compared_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(50, 3, 4, 4, generator=generator)
    references[40] = references[3]  # of those that are equally near the first is named
    own = torch.arange(0, 50, 4)
    images = references[own] + 3 * torch.randn(13, 3, 4, 4, generator=generator)
    images[5] = references[40]
    squares = (images[:, None].double() - references.double()).square().flatten(2).sum(2)
    expected = (squares < squares.gather(1, own[:, None])).sum(1)
    assert len(expected.unique()) > 5
    for module in ("retrieval", "generated"):
        monkeypatch.setattr(f"mmvit.evaluation.{module}.AT_ONCE", 7)
    assert torch.equal(pixel_ranks(images, references, own, chunk=4), expected)
    distances, places = nearest(images, references, chunk=4)
    assert places.tolist() == squares.argmin(1).tolist()
    assert places[5] == 3
    torch.testing.assert_close(distances * 2 * 48**0.5, squares.amin(1).sqrt(), atol=1e-6, rtol=1e-6)


def test_the_nearest_image_and_its_distance():
    references = torch.stack([torch.full((3, 4, 4), level) for level in (-1.0, 0.0, 1.0)])
    images = torch.stack([torch.full((3, 4, 4), level) for level in (0.1, -0.9, 0.0)])
    distances, places = nearest(images, references, chunk=2)
    assert places.tolist() == [1, 0, 1]
    torch.testing.assert_close(distances, torch.tensor([0.05, 0.05, 0.0]).double(), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="images are"):
        nearest(images, references[:, :, :2])


def test_a_copy_differs_by_less_than_34_decibels():
    assert pytest.approx(10 ** (-34 / 20), rel=0.01) == COPY


def test_diversity_within_and_between_captions():
    levels = torch.tensor([[0.0, 0.2], [1.0, 0.8]])  # of two captions, two images each
    images = levels[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    within, between = diversity(images)
    assert within == pytest.approx(0.1)  # 0.2 of [-1, 1]
    assert between == pytest.approx((1 + 0.8 + 0.8 + 0.6) / 4 / 2)
    with pytest.raises(ValueError, match="no pairs"):
        diversity(images[:, :1])


class Inception(nn.Module):
    """Stands in for torch-fidelity's, which needs torchvision."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str):
        super().__init__()
        assert features == ["2048"]
        self.scale = nn.Parameter(torch.ones(1))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, levels: torch.Tensor) -> tuple[torch.Tensor]:
        assert levels.dtype == torch.uint8
        return (self.scale * levels.flatten(1).float(),)


def test_fid_is_the_distance_in_inceptions_features(tmp_path, monkeypatch):
    torch.save({"scale": torch.tensor([2.0])}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="torch_fidelity is missing"):
        feature_space(tmp_path / "inception.pth")
    name = "torch_fidelity.feature_extractor_inceptionv3"
    for part in ("torch_fidelity", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].FeatureExtractorInceptionV3 = Inception
    space = feature_space(tmp_path / "inception.pth")
    assert space.name == "inception-v3"
    black, white = torch.full((2, 3, 1, 1), -1.0), torch.full((2, 3, 1, 1), 1.0)
    assert space.features(white).tolist() == [[510.0] * 3] * 2
    assert space.distance(black, white) == pytest.approx(3 * 510**2)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Inception))
    for file in ("other.pth", "code.pth", "missing.pth"):
        with pytest.raises(UserError, match="does not hold torch-fidelity's Inception"):
            feature_space(tmp_path / file)


def test_names_in_a_list_may_have_spaces():
    assert listed("en, de ") == listed(["en", "de"]) == ["en", "de"]


def test_places_of_a_sample_are_all_different():
    for total, number in ((87_382, 87_381), (3_000_000, 2_900_000)):
        places = evenly_spread(total, number)
        assert (places[0], places[-1]) == (0, total - 1)
        assert (places.diff() > 0).all()


def test_blank_images_are_all_alike_and_copy_nothing():
    noise = torch.Generator().manual_seed(0)
    blank, own = torch.ones(5, 3, 8, 8), torch.rand(3, 3, 8, 8, generator=noise)
    assert all_alike(torch.cat([blank, own])).tolist() == [True] * 5 + [False] * 3
    assert not all_alike(torch.cat([own, own[:1]])).any()  # two of one kind are no more than a coincidence
    assert not all_alike(blank[:2]).any()
