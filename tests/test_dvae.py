"""DALL·E's discrete VAE: its formulas against exact values, its modules against OpenAI's own."""

import math
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mmvit.errors import UserError
from mmvit.interop.openai_dvae import dvae_from_openai, dvae_to_openai, load_openai_dvae
from mmvit.models.dvae import (
    SHARPNESS,
    DiscreteVAE,
    DiscreteVAEConfig,
    cosine,
    kl_to_uniform,
    logit_laplace,
    map_pixels,
    unmap_pixels,
)
from mmvit.models.registry import load_image_tokenizer

SMALL = DiscreteVAEConfig(codebook_size=32, width=8, blocks_per_group=1, code_width=8)


@pytest.fixture
def model() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(SMALL).eval()


def pixels_of(batch: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (1.5, 0.3), (-2.0, 0.7), (0.3, 0.05)])
def test_likelihood_integrates_to_one(location, scale):
    logits = torch.linspace(-40, 40, 400_001, dtype=torch.float64)  # values crowd where the density changes
    values = logits.sigmoid()
    inside = (values > 0) & (values < 1)
    values = values[inside]
    density = logit_laplace(values, torch.tensor(location), torch.tensor(math.log(scale))).exp()
    assert torch.trapezoid(density, values).item() == pytest.approx(1, abs=1e-4)


def test_likelihood_at_points_worked_out_by_hand():
    # μ = 0, b = 1, x = 1/2: exp(0) / (2 · 1/4) = 2
    assert logit_laplace(torch.tensor(0.5), torch.tensor(0.0), torch.tensor(0.0)).exp() == pytest.approx(2)
    # x = 4/5, logit ln 4, μ = 0, b = 1: exp(−ln 4) / (2 · 4/25) = (1/4) · 25/8
    value = logit_laplace(torch.tensor(0.8), torch.tensor(0.0), torch.tensor(0.0)).exp()
    assert value == pytest.approx(25 / 32)
    # μ = ln 4, b = 1/2: the exponent vanishes, 1 / (2 · 1/2 · 4/25)
    value = logit_laplace(torch.tensor(0.8), torch.tensor(math.log(4)), torch.tensor(math.log(0.5))).exp()
    assert value == pytest.approx(25 / 4)


def test_divergence_from_uniform_has_its_exact_values():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [100.0, 0.0]])[:, :, None, None]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = torch.tensor([0.0, math.log(2) - entropy, math.log(2)])
    torch.testing.assert_close(kl_to_uniform(logits).flatten(), expected)


def test_pixels_are_kept_from_the_ends_and_come_back():
    values = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(map_pixels(values), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(values)), values)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_schedules_are_half_cosines():
    assert cosine(0, 5000, 0.0, 6.6) == 0
    assert cosine(1250, 5000, 0.0, 6.6) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine(2500, 5000, 0.0, 6.6) == pytest.approx(3.3)
    assert cosine(5000, 5000, 0.0, 6.6) == cosine(9000, 5000, 0.0, 6.6) == 6.6
    assert cosine(75_000, 150_000, 1.0, 1 / 16) == pytest.approx((1 + 1 / 16) / 2)


def test_divergence_and_temperature_have_schedules_of_their_own():
    config = SMALL.model_copy(update={"kl_warmup": 10, "temperature_steps": 40})
    model = DiscreteVAE(config).eval()
    model.passes.fill_(5)
    metrics = model.loss({"pixels": pixels_of(1)})[1]
    assert metrics["kl_weight"].item() == pytest.approx(3.3)  # half-way
    assert metrics["temperature"].item() == pytest.approx(cosine(5, 40, 1.0, 1 / 16))


def test_an_older_config_names_start_images_otherwise():
    assert DiscreteVAEConfig.model_validate({"start_pictures": 3}) == DiscreteVAEConfig(start_images=3)
    assert "start_images" in DiscreteVAEConfig(start_images=3).model_dump()


def test_loss_is_likelihood_and_weighted_divergence_per_pixel_and_channel(model):
    model.passes.fill_(SMALL.kl_warmup)
    batch = {"pixels": pixels_of(2)}
    loss, metrics = model.loss(batch)
    mapped = map_pixels((batch["pixels"] + 1) / 2)
    logits = model.encoder(mapped)
    one_hot = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    location, log_scale = model.decoder(one_hot)[:, :3], model.decoder(one_hot)[:, 3:]
    density = (-(mapped.logit() - location).abs() / log_scale.exp()).exp() / (
        2 * log_scale.exp() * mapped * (1 - mapped)
    )
    divergence = (logits.softmax(1) * (logits.softmax(1) * 32).log()).sum(1)  # of (2, 2, 3) codes
    torch.testing.assert_close(metrics["nll"], -density.log().mean())
    torch.testing.assert_close(metrics["kl"], divergence.mean())
    torch.testing.assert_close(loss, -density.log().mean() + 6.6 * divergence.sum() / (2 * 3 * 16 * 24))


def test_schedules_move_in_training_alone_and_are_saved(model, tmp_path):
    batch = {"pixels": pixels_of(1)}
    assert model.loss(batch)[1]["kl_weight"] == 0
    for _ in range(3):
        model.train().loss(batch)
    model.eval().loss(batch)
    assert int(model.passes) == 3
    assert model.loss(batch)[1]["kl_weight"] == pytest.approx(cosine(3, 5000, 0.0, 6.6))
    again = DiscreteVAE.from_pretrained(model.save_pretrained(tmp_path, torch.bfloat16))
    assert int(again.passes) == 3


def test_relaxed_codes_follow_the_encoders_distribution(model):
    """With one code certain everywhere, training and evaluation see the same image."""
    with torch.no_grad():
        model.encoder.head.weight.zero_()
        model.encoder.head.bias.copy_(torch.where(torch.arange(32) == 5, 80.0, 0.0))
    batch = {"pixels": pixels_of(1)}
    certain = model.loss(batch)[1]
    torch.testing.assert_close(model.train().loss(batch)[1]["nll"], certain["nll"])
    assert certain["kl"] == pytest.approx(math.log(32), rel=1e-5)
    assert certain["perplexity"] == pytest.approx(1, rel=1e-4)


def test_the_temperature_falls_from_one_and_sharpens_what_is_drawn(model):
    """The largest share of a relaxed code, drawn by the Gumbel noise of 1611.01144 at each temperature."""
    seen = []
    decode = model.decoder.forward
    with mock.patch.object(model.decoder, "forward", lambda relaxed: seen.append(relaxed) or decode(relaxed)):
        for passes in (0, model.config.temperature_steps):
            model.train().passes.fill_(passes)
            torch.manual_seed(0)
            _, metrics = model.loss({"pixels": torch.rand(4, 3, 16, 16) * 2 - 1})
            expected = 1.0 if passes == 0 else model.config.final_temperature
            assert metrics["temperature"] == expected
    early, late = seen
    torch.testing.assert_close(early.sum(1), torch.ones_like(early.sum(1)))
    assert early.max(1).values.mean() < 0.9 < late.max(1).values.mean()
    assert torch.equal(early.argmax(1), late.argmax(1))  # the same noise chooses
    model.passes.fill_(0)
    torch.manual_seed(1)
    with mock.patch.object(model.decoder, "forward", lambda relaxed: seen.append(relaxed) or decode(relaxed)):
        model.loss({"pixels": torch.rand(4, 3, 16, 16) * 2 - 1})
    assert not torch.equal(seen[-1].argmax(1), early.argmax(1))  # other noise chooses otherwise


def test_decoding_codes_equals_decoding_their_one_hot_vectors(model):
    codes = model.encode(pixels_of(2))
    assert codes.shape == (2, 2, 3)
    one_hot = torch.nn.functional.one_hot(codes, 32).permute(0, 3, 1, 2).float()
    expected = unmap_pixels(model.decoder(one_hot)[:, :3].sigmoid()) * 2 - 1
    torch.testing.assert_close(model.decode(codes), expected)
    assert model.code_vectors().shape == (32, 8)


def test_it_learns_a_few_images():
    torch.manual_seed(0)
    model = DiscreteVAE(SMALL.model_copy(update={"width": 16, "kl_weight": 0.0})).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch = {"pixels": torch.ones(4, 3, 16, 16) * torch.tensor([-0.8, -0.2, 0.3, 0.9])[:, None, None, None]}
    losses = []
    for _ in range(60):
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_codes_that_start_from_patches_name_the_nearest(model):
    pixels = pixels_of(32)
    model.start_codes(pixels)
    with torch.no_grad():
        mapped = map_pixels((pixels + 1) / 2)
        vectors = model.encoder.features(mapped).flatten(2).transpose(1, 2).flatten(0, 1)
        logits = model.encoder(mapped).flatten(2).transpose(1, 2).flatten(0, 1)
    spread = (vectors - vectors.mean(0)).square().sum(1).mean().sqrt()
    vectors = (vectors - vectors.mean(0)) / spread
    centres = model.encoder.head.weight[:, :, 0, 0] * spread / SHARPNESS
    expected = -SHARPNESS / 2 * torch.cdist(vectors, centres).square()
    difference = logits - expected  # the same for all codes of a patch, so without a part in the softmax
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=2e-3, rtol=0)
    assert (torch.cdist(centres, vectors).amin(1) < 1e-3).all()  # each code is a patch


def test_fewer_patches_than_codes_all_have_their_own(model):
    pixels = pixels_of(4)
    model.start_codes(pixels)
    assert len(model.codes_of(pixels).unique()) == 4 * 2 * 3


def test_wrong_sizes_and_codes_are_refused(model):
    with pytest.raises(UserError, match="20x24 pixels cannot be cut into patches of 8x8"):
        model.encode(pixels_of(1, 20))
    with pytest.raises(UserError, match=r"codes from 0 to 32 do not fit .* codes 0 to 31"):
        model.decode(torch.tensor([[[0, 32]]]))


def test_a_folder_says_which_kind_of_tokenizer_it_holds(model, tmp_path):
    loaded = load_image_tokenizer(model.save_pretrained(tmp_path))
    assert isinstance(loaded, DiscreteVAE)
    assert torch.equal(loaded.encode(pixels_of(1)), model.encode(pixels_of(1)))


# OpenAI's own modules (PyPI's dall-e, installed without its dependencies)


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("dall_e", reason="pip install --no-deps dall-e; and attrs, requests")
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    torch.manual_seed(0)
    encoder = Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512)
    decoder = Decoder(n_hid=64, n_blk_per_group=2, vocab_size=512, n_init=16)
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)  # zero biases would hide a wrong name
    return encoder, decoder


def test_codes_and_pixels_equal_those_of_openais_modules(theirs):
    encoder, decoder = theirs
    model = dvae_from_openai(encoder.state_dict(), decoder.state_dict())
    pixels = pixels_of(2)
    mapped = 0.8 * (pixels + 1) / 2 + 0.1
    logits = encoder(mapped)
    torch.testing.assert_close(model.encoder(mapped), logits, atol=1e-5, rtol=1e-5)
    codes = logits.argmax(1)
    assert torch.equal(model.encode(pixels), codes)
    assert len(codes.unique()) > 2
    statistics = decoder(torch.nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float())
    expected = ((statistics[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close((model.decode(codes) + 1) / 2, expected, atol=1e-5, rtol=1e-5)
    back_encoder, back_decoder = dvae_to_openai(model)
    encoder.load_state_dict(back_encoder)
    decoder.load_state_dict(back_decoder)


def test_pickled_modules_load_without_running_their_classes(theirs, tmp_path):
    for name, module in zip(("encoder.pkl", "decoder.pkl"), theirs, strict=True):
        torch.save(module, tmp_path / name)
    model = load_openai_dvae(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    for name, tensor in theirs[0].state_dict().items():
        assert torch.equal(dvae_to_openai(model)[0][name], tensor)
    with pytest.raises(UserError, match=r"encoder\.\w.* is missing|do not fit|lack"):
        load_openai_dvae(tmp_path / "decoder.pkl", tmp_path / "decoder.pkl")
    torch.save(theirs[0], tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"old.pkl is not an encoder.pkl .* openai/DALL-E: Only persistent_load"
    ):
        load_openai_dvae(tmp_path / "old.pkl", tmp_path / "decoder.pkl")


def test_the_script_writes_state_dicts_for_openais_modules(theirs, tmp_path, run_script):
    for name, module in zip(("encoder.pkl", "decoder.pkl"), theirs, strict=True):
        torch.save(module, tmp_path / name)
    script = "pipelines/convert_weights.py"
    sources = (tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "ours")
    back, again = tmp_path / "back", tmp_path / "again"
    for arguments in (sources, (tmp_path / "ours", back, "--to", "openai"), (back, again)):
        ran = run_script(script, *arguments)
        assert ran.returncode == 0, ran.stderr
    for name, module in zip(("encoder", "decoder"), theirs, strict=True):
        written = load_file(tmp_path / "back" / f"{name}.safetensors")
        assert written.keys() == module.state_dict().keys()
        assert all(torch.equal(written[key], tensor) for key, tensor in module.state_dict().items())
    ours, round_trip = (DiscreteVAE.from_pretrained(folder).state_dict() for folder in (sources[2], again))
    assert all(torch.equal(tensor, round_trip[key]) for key, tensor in ours.items())


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "encoder.pkl")
    (tmp_path / "decoder.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("encoder.pkl", "decoder.pkl"):
        with pytest.raises(UserError, match=r"coder.pkl is not an encoder.pkl or decoder.pkl"):
            load_openai_dvae(tmp_path / name, tmp_path / name)
    with pytest.raises(UserError, match="no file"):
        load_openai_dvae(Path("nowhere.pkl"), Path("nowhere.pkl"))
    assert not (tmp_path / "ran").exists()
