"""VQ image tokenizer: what its codes promise, and a codebook that stays alive."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import start_processes

from mmvit.config import build_config
from mmvit.errors import UserError
from mmvit.evaluation.code_use import code_counts, use_metrics
from mmvit.evaluation.reconstruction import reconstruction_metrics
from mmvit.hub import fingerprint
from mmvit.models.quantizers import (
    QUANTIZERS,
    REVIVED_USE,
    Codebook,
    FiniteScalar,
    LinearCodebook,
    QuantizerConfig,
)
from mmvit.models.vq import VQConfig, VQModel

SMALL = {"codebook_size": 16, "code_width": 4, "encoder_width": 16, "decoder_widths": (16, 8)}


def small_model(**settings) -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQConfig(**{**SMALL, **settings}))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80)])
def test_every_factor_and_size_goes_to_its_grid_and_back(factor, height, width):
    model = small_model(factor=factor).eval()
    codes = model.encode(noise(2, 3, height, width))
    assert codes.shape == (2, *model.grid(height, width)) == (2, height // factor, width // factor)
    assert codes.dtype == torch.int64
    pixels = model.decode(codes)
    assert pixels.shape == (2, 3, height, width)
    assert pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1


def test_codes_are_the_same_alone_in_a_batch_and_under_autocast():
    model, pixels = small_model().eval(), noise(3, 3, 32, 32)
    codes = model.encode(pixels)
    assert torch.equal(codes, torch.cat([model.encode(image[None]) for image in pixels]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, model.encode(pixels))


def test_a_code_depends_on_its_patch_and_margin_alone():
    model = small_model(margin=2).eval()
    pixels, others = noise(1, 3, 40, 40), noise(1, 3, 40, 40, seed=1)
    others[:, :, 14:26, 14:26] = pixels[:, :, 14:26, 14:26]  # patch (2, 2) is 16 to 24, its margin 2 more
    one, two = model.encoder(pixels), model.encoder(others)
    torch.testing.assert_close(one[:, 2, 2], two[:, 2, 2])
    others[:, :, 14, 14] += 1
    assert not torch.allclose(one[:, 2, 2], model.encoder(others)[:, 2, 2])


def test_the_decoder_sees_beyond_a_patch():
    model = small_model().eval()
    codes = torch.zeros(1, 5, 5, dtype=torch.int64)
    changed = codes.clone()
    changed[0, 2, 2] = 1
    difference = (model.decode(codes) - model.decode(changed)).abs()
    assert difference[..., :8, :8].max() > 0


@pytest.mark.parametrize("attention_depth", [0, 1])
def test_with_attention_the_decoder_sees_all_codes(attention_depth):
    model = small_model(attention_depth=attention_depth).eval()
    codes = torch.zeros(1, 2, 40, dtype=torch.int64)
    changed = codes.clone()
    changed[0, 0, 39] = 1
    far_away = (model.decode(codes) - model.decode(changed)).abs()[..., :8]
    assert (far_away.max() > 0) == bool(attention_depth)


def test_the_encoder_learns_through_the_quantisation():
    model = small_model(commitment_weight=0.0)
    loss, _ = model.loss({"pixels": noise(4, 3, 32, 32)})
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_loss_is_l1_plus_l2_plus_commitment_of_the_reconstruction():
    model = small_model(commitment_weight=0.5).eval()
    pixels = noise(2, 3, 16, 16)
    loss, metrics = model.loss({"pixels": pixels})
    vectors = F.normalize(model.encoder(pixels), dim=-1)
    chosen = model.codebook.vectors()[model.encode(pixels)]
    error = model.decoder(2 * chosen) - pixels  # entries of vectors of length 1 in 4 dimensions are about 1/2
    commitment = (2 - 2 * (vectors * chosen).sum(-1)).mean()
    torch.testing.assert_close(loss, error.abs().mean() + error.square().mean() + 0.5 * commitment)
    torch.testing.assert_close(metrics["commitment"], commitment.detach())
    assert not any(value.requires_grad for value in metrics.values())


def test_dead_codes_are_revived_where_the_error_is_and_living_ones_follow_their_vectors():
    codebook = Codebook(VQConfig(**SMALL))
    vectors = torch.eye(4)[[0] * 60 + [1] * 4]  # one common vector, one rare one
    codebook.sums.copy_(-torch.eye(4)[[3] * 16])
    codebook.sums[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    codebook.use.zero_()
    codebook.use[0] = 1
    metrics = codebook.update(vectors, codebook.nearest(vectors))
    assert metrics["dead_codes"] >= 14 / 16
    assert torch.equal(codebook.use[1:] == torch.tensor(REVIVED_USE), torch.ones(15, dtype=torch.bool))
    # the rare vector alone is far from its code: all revivals go there, none to the common one
    torch.testing.assert_close(codebook.vectors()[1:], torch.eye(4)[[1] * 15], atol=1e-3, rtol=0)
    assert codebook.nearest(torch.eye(4)[:1]).item() == 0


@pytest.mark.parametrize(("update", "length"), [("ema", REVIVED_USE), ("gradient", 1.0)])
def test_a_revived_code_can_move_as_fast_as_others(update, length):
    """An average's code begins with the little use that it has, an optimizer's as a unit vector."""
    settings = {**SMALL, "codebook_update": update, "revive_below": 0.09}
    codebook = Codebook(VQConfig(**settings))
    codebook.update(torch.eye(4), torch.zeros(4, dtype=torch.int64))  # code 0 alone is in use
    torch.testing.assert_close(codebook.sums[1:].norm(dim=-1), torch.full((15,), length))


def test_averages_of_a_codes_vectors_and_use_by_hand():
    codebook = Codebook(VQConfig(**SMALL, codebook_decay=0.75, revive_below=0.0))
    codebook.use.fill_(1)
    before = codebook.sums.clone()
    vectors = torch.eye(4)[[0] * 5 + [1] * 3]
    codebook.update(vectors, torch.tensor([2] * 5 + [7] * 3))
    use, sums = torch.full((16,), 0.75), 0.75 * before
    # 8 vectors for 16 codes: one vector counts as 2 / 1 of the average code's use
    use[2] += 0.25 * 2 * 5
    use[7] += 0.25 * 2 * 3
    sums[2, 0] += 0.25 * 2 * 5
    sums[7, 1] += 0.25 * 2 * 3
    torch.testing.assert_close(codebook.use, use)
    torch.testing.assert_close(codebook.sums, sums)


@pytest.mark.parametrize("quantizer", ["vq", "simvq"])
def test_commitment_pulls_the_encoder_at_its_weight_and_the_codes_at_theirs(quantizer):
    torch.manual_seed(0)
    config = QuantizerConfig(
        quantizer=quantizer, codebook_size=8, code_width=4, codebook_update="gradient", commitment_weight=0.3
    )
    module = QUANTIZERS[quantizer](config).eval()
    encoded = torch.randn(2, 3, 3, 4, requires_grad=True)
    (codes_weight,) = module.parameters()
    gradients = torch.autograd.grad(module(encoded)[1], (encoded, codes_weight))
    chosen = module.vectors()[module.encode(encoded)]
    compared = F.normalize(encoded, dim=-1) if quantizer == "vq" else encoded
    distance = (compared - chosen).square().sum(-1).mean()
    to_encoder, to_codes = torch.autograd.grad(distance, (encoded, codes_weight))
    torch.testing.assert_close(gradients, (0.3 * to_encoder, to_codes))


def test_revival_keeps_a_codebook_in_use_that_would_collapse():
    """One code begins among the vectors, all others on the far side of the sphere."""

    def vectors(seed: int) -> torch.Tensor:
        return F.normalize(noise(256, 4, seed=seed) + torch.tensor([1.5, 0, 0, 0]), dim=-1)

    def codes_in_use(revive_below: float) -> int:
        codebook = Codebook(VQConfig(**SMALL, codebook_decay=0.9, revive_below=revive_below))
        codebook.sums.copy_(torch.tensor([-1.0, 0, 0, 0]))
        codebook.sums[0] *= -1
        for step in range(100):
            codebook.update(vectors(step), codebook.nearest(vectors(step)))
        return len(codebook.nearest(vectors(100)).unique())

    assert codes_in_use(revive_below=0.0) == 1
    assert codes_in_use(revive_below=0.01) == 16


def test_kmeans_starts_the_codes_where_the_vectors_are():
    centres = torch.eye(4)
    vectors = F.normalize(centres.repeat(64, 1) + 0.1 * noise(256, 4), dim=-1)
    codebook = Codebook(VQConfig(**{**SMALL, "codebook_size": 8, "kmeans_steps": 10})).train()
    torch.manual_seed(0)
    codebook(vectors[None, None])
    codes = codebook.nearest(vectors)
    assert len(codes.unique()) == 8
    assert (codebook.vectors()[codes] * vectors).sum(-1).min() > 0.98
    before = codebook.vectors().clone()
    codebook(vectors[None, None])  # started once
    assert (codebook.vectors() * before).sum(-1).min() > 0.99


@pytest.mark.parametrize("steps", [1, 4])
def test_kmeans_moves_every_centre_to_the_middle_of_its_vectors_so_many_times(steps):
    vectors, codebook = F.normalize(noise(64, 4), dim=-1), Codebook(VQConfig(**SMALL, kmeans_steps=steps))
    with mock.patch("torch.randperm", return_value=torch.arange(64)):
        codebook.start(vectors)
    centres = vectors[:16]
    for _ in range(steps):
        nearest = (vectors @ centres.T).argmax(-1)
        centres = torch.stack([F.normalize(vectors[nearest == code].sum(0), dim=0) for code in range(16)])
    torch.testing.assert_close(codebook.sums, centres)


def test_a_codebook_of_the_optimizer_is_pulled_to_its_vectors_and_revived():
    torch.manual_seed(0)
    settings = {**SMALL, "codebook_update": "gradient", "codebook_decay": 0.9}
    codebook = Codebook(VQConfig(**settings)).train()
    encoded = noise(1, 1, 200, 4).requires_grad_()
    quantized, loss, _ = codebook.eval()(encoded)
    vectors, chosen = F.normalize(encoded, dim=-1), codebook.vectors()[codebook.encode(encoded)]
    torch.testing.assert_close(loss, 1.25 * (vectors - chosen).square().sum(-1).mean())
    torch.testing.assert_close(quantized, chosen)
    optimizer = torch.optim.Adam(codebook.train().parameters(), 0.02)
    errors = []
    for step in range(300):
        _, loss, metrics = codebook(noise(1, 1, 256, 4, seed=step) + torch.tensor([1.5, 0, 0, 0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(metrics["commitment"].item())
    assert errors[-1] < 0.5 * errors[0]
    assert metrics["dead_codes"] == 0


def update_on_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    codebook = small_model().codebook
    torch.manual_seed(rank)  # ranks draw different vectors to revive codes at
    for step in range(3):
        vectors = F.normalize(noise(64, 4, seed=10 * step + rank), dim=-1)
        codebook.update(vectors, codebook.nearest(vectors))
    torch.save(codebook.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_reviving_a_code_does_not_change_the_gradient_of_its_batch():
    torch.manual_seed(0)
    settings = {"codebook_size": 8, "code_width": 4, "codebook_update": "gradient", "revive_below": 0.09}
    quantizer, twin = (Codebook(QuantizerConfig(**settings)) for _ in range(2))
    twin.load_state_dict(quantizer.state_dict())
    encoded = torch.randn(1, 4, 4, 4)
    with mock.patch.object(twin, "update", return_value={}):  # nothing is revived
        gradients = [torch.autograd.grad(each(encoded)[1], each.sums)[0] for each in (quantizer, twin)]
    assert not torch.equal(quantizer.sums, twin.sums)
    assert torch.equal(*gradients)


def test_processes_keep_one_codebook(tmp_path):
    start_processes(update_on_rank, (tmp_path,), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["sums"], two["sums"])
    assert torch.equal(one["use"], two["use"])


def test_evaluation_leaves_the_codebook_alone():
    model = small_model().eval()
    before = model.codebook.sums.clone()
    _, metrics = model.loss({"pixels": noise(2, 3, 16, 16)})
    assert torch.equal(before, model.codebook.sums)
    assert "dead_codes" not in metrics


def test_training_lowers_the_error_with_every_code_in_use():
    model = small_model(codebook_decay=0.9)
    pixels = noise(32, 3, 1, 1).expand(32, 3, 8, 8).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss, metrics = model.loss({"pixels": pixels})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["l1"] < 0.2  # 0.5 for grey
    counts = code_counts(model.eval(), [{"pixels": pixels}])
    assert use_metrics(counts)["codes_in_use"] >= 14 / 16


def test_reloaded_weights_make_the_same_codes_and_pixels(tmp_path):
    model, pixels = small_model().eval(), noise(2, 3, 32, 32)
    again = VQModel.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(model.encode(pixels), again.encode(pixels))
    assert torch.equal(model.decode(model.encode(pixels)), again.decode(again.encode(pixels)))


@pytest.mark.parametrize(("height", "width"), [(4, 64), (64, 60), (65, 64)])
def test_an_image_that_does_not_divide_into_patches_is_named(height, width):
    model = small_model()
    for use in (model.encode, lambda pixels: model.loss({"pixels": pixels})):
        with pytest.raises(UserError, match=f"{height}x{width} pixels.*multiples of 8"):
            use(noise(1, 3, height, width))


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_outside_the_codebook_is_named(code):
    with pytest.raises(UserError, match=f"{code}.*0 to 15"):
        small_model().decode(torch.full((1, 2, 2), code))


def test_a_configuration_that_does_not_fit_is_explained():
    with pytest.raises(UserError, match="factor must be a multiple of 4 for 3 decoder stages, got 6"):
        build_config(
            VQConfig, {"factor": 6, "decoder_widths": [8, 8, 8], "decoder_depths": [1, 1, 1]}, "x.toml"
        )
    with pytest.raises(UserError, match="decoder_widths has 1 stages, decoder_depths 2"):
        build_config(VQConfig, {"decoder_widths": [8], "decoder_depths": [1, 1]}, "x.toml")


def test_psnr_is_that_of_known_errors():
    """Reconstructions that are off by 0.1 and 0.01 of [0, 1]: 20 and 40 dB."""
    model = small_model().eval()
    pixels = torch.zeros(2, 3, 16, 16)
    model.decode = lambda codes: pixels + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    metrics = reconstruction_metrics(model, [{"pixels": pixels}])
    assert metrics["psnr"] == pytest.approx(30, abs=1e-3)
    assert metrics["psnr_of_mean_error"] == pytest.approx(22.967, abs=1e-3)
    assert metrics["l1"] == pytest.approx(0.055, abs=1e-5)


# The other quantisers

FSQ = QuantizerConfig(quantizer="fsq", levels=(8, 5, 3), codebook_size=120)


def test_fsq_codes_are_all_combinations_of_the_levels():
    quantizer = FiniteScalar(FSQ)
    vectors = quantizer.vectors()
    assert vectors.shape == (120, 3)
    assert [sorted(set(column.tolist())) for column in vectors.T] == [
        [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75],
        [-1, -0.5, 0, 0.5, 1],
        [-1, 0, 1],
    ]
    assert len({tuple(vector) for vector in vectors.tolist()}) == 120


def test_fsq_encodes_what_it_looks_up_and_all_codes_can_be_reached():
    quantizer = FiniteScalar(FSQ)
    encoded = 3 * torch.randn(2, 50, 200, 3, generator=torch.Generator().manual_seed(0))
    quantized, loss, metrics = quantizer(encoded)
    codes = quantizer.encode(encoded)
    assert torch.equal(quantized, quantizer.vectors()[codes])
    assert len(codes.unique()) == 120
    assert loss == 0
    assert metrics["dead_codes"] == 0
    quantizer.use[7] = 0
    lonely = quantizer.vectors()[:1].expand(10, 3).atanh().clamp(-9, 9)
    assert quantizer(lonely[None, None])[2]["dead_codes"] == pytest.approx(1 / 120)
    assert quantizer.encode(torch.zeros(1, 3)).item() == 4 + 8 * 2 + 40 * 1  # every digit in the middle


def test_fsq_passes_the_gradient_of_its_bounds_straight_through():
    quantizer = FiniteScalar(FSQ)
    encoded = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    quantizer(encoded)[0].sum().backward()
    half = torch.tensor([7, 4, 2]) * 0.999 / 2
    shift = torch.tan(torch.tensor([0.5, 0, 0]) / half)
    expected = (1 - torch.tanh(encoded.detach() + shift) ** 2) * half / torch.tensor([4, 2, 1])
    torch.testing.assert_close(encoded.grad, expected)


def test_fsq_levels_are_part_of_the_fingerprint():
    shapes = {"quantizer": "fsq", "codebook_size": 32}
    one, other = (small_model(**shapes, levels=levels) for levels in ((8, 4), (4, 8)))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)


def test_fsq_levels_must_make_the_codebook():
    with pytest.raises(UserError, match=r"levels \(8, 8, 4, 4\) make 1024 codes, codebook_size is 1000"):
        build_config(VQConfig, {"quantizer": "fsq", "codebook_size": 1000}, source="x")


def test_simvq_chooses_the_nearest_code_and_moves_its_matrix_alone():
    torch.manual_seed(0)
    quantizer = LinearCodebook(QuantizerConfig(quantizer="simvq", codebook_size=50, code_width=4))
    torch.nn.init.normal_(quantizer.mix.weight)
    encoded = torch.randn(2, 3, 3, 4, requires_grad=True)
    codes = quantizer.encode(encoded)
    distances = torch.cdist(encoded.reshape(-1, 4), quantizer.vectors())
    assert torch.equal(codes, distances.argmin(-1).view(2, 3, 3))
    quantized, loss, _ = quantizer(encoded)
    torch.testing.assert_close(quantized, quantizer.vectors()[codes])
    distance = (encoded - quantizer.vectors()[codes]).square().sum(-1).mean()
    torch.testing.assert_close(loss, 1.25 * distance)
    quantized.sum().backward()
    assert torch.equal(encoded.grad, torch.ones_like(encoded))  # straight through
    assert quantizer.mix.weight.grad is None
    quantizer(encoded)[1].backward()
    assert quantizer.mix.weight.grad.abs().sum() > 0
    assert [name for name, _ in quantizer.named_parameters()] == ["mix.weight"]


def test_simvq_brings_all_its_codes_to_where_the_vectors_are():
    """Vectors far from every code: of codes that move one by one, only the nearest would follow."""
    torch.manual_seed(0)
    quantizer = LinearCodebook(QuantizerConfig(quantizer="simvq", codebook_size=64, code_width=4))
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for step in range(200):
        quantizer(4 * noise(256, 4, seed=step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(quantizer.encode(4 * noise(2000, 4, seed=-1)).unique()) > 55


@pytest.mark.parametrize(
    "settings", [{"quantizer": "fsq", "codebook_size": 16, "levels": (4, 4)}, {"quantizer": "simvq"}]
)
def test_models_of_every_quantiser_train_save_and_load(settings, tmp_path):
    model, pixels = small_model(**settings), noise(2, 3, 16, 24)
    loss, metrics = model.loss({"pixels": pixels})
    loss.backward()
    assert {"l1", "l2", "dead_codes", "perplexity"} <= metrics.keys()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    again = VQModel.from_pretrained(model.eval().save_pretrained(tmp_path))
    codes = again.encode(pixels)
    assert torch.equal(codes, model.encode(pixels))
    assert torch.equal(again.decode(codes), model.decode(codes))
    assert again.code_vectors().shape == (16, model.config.quantized_width)
