"""VQ image tokenizer: what its codes promise, and a codebook that stays alive."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import start_processes

from mmvit.config import build_config
from mmvit.errors import UserError
from mmvit.evaluation.reconstruction import codebook_metrics, reconstruction_metrics
from mmvit.models.vq import REVIVED_USE, Codebook, VQConfig, VQModel

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
    vectors = model.encoder(pixels)
    chosen = model.codebook.vectors()[model.encode(pixels)]
    error = model.decoder(chosen) - pixels
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


def update_on_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    codebook = small_model().codebook
    torch.manual_seed(rank)  # ranks draw different vectors to revive codes at
    for step in range(3):
        vectors = F.normalize(noise(64, 4, seed=10 * step + rank), dim=-1)
        codebook.update(vectors, codebook.nearest(vectors))
    torch.save(codebook.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


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
    used = codebook_metrics(model.eval(), [{"pixels": pixels}])["codes_in_use"]
    assert used >= 14 / 16


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
    with pytest.raises(UserError, match="factor 6 is no multiple of 4, as 3 decoder stages need"):
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


def test_the_script_trains_evaluates_and_exports(run_script, tiny_shards, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        output = "{tmp_path / "run"}"
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = ["{tiny_shards}/heldout-*.tar"]
        image_size = [16, 16]
        [model]
        codebook_size = 16
        encoder_width = 16
        decoder_widths = [16, 8]
        [train]
        steps = 4
        batch_size = 8
        num_workers = 0
        """
    )
    ran = run_script("tokenizers/train_image_tokenizer.py", recipe)
    assert ran.returncode == 0, ran.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"psnr", "psnr_of_mean_error", "codes_in_use", "perplexity"} <= last.keys()
    model = VQModel.from_pretrained(tmp_path / "run")
    assert model.encode(noise(1, 3, 16, 16)).shape == (1, 2, 2)
    ran = run_script(
        "tokenizers/train_image_tokenizer.py",
        recipe,
        "--output",
        tmp_path / "x",
        "--data.image_size",
        "[20, 16]",
    )
    assert ran.returncode == 2
    assert "20x16" in ran.stderr
