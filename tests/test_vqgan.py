"""VQGAN: codes and pixels equal those of diffusers and transformers, from whose files its weights come."""

import pytest
import torch
from torch import nn
from vqgan_models import (
    SMALL,
    assert_codes_equal,
    assert_encodings_equal,
    assert_pixels_equal,
    assert_weights_equal,
    chameleon_model,
    diffusers_model,
    janus_model,
    pixels_of,
    randomise,
    run_diffusers,
    run_janus,
)

from mmvit.errors import UserError
from mmvit.interop.vqgan import (
    vqgan_from_chameleon,
    vqgan_from_diffusers,
    vqgan_from_janus,
    vqgan_to_chameleon,
    vqgan_to_diffusers,
    vqgan_to_janus,
)
from mmvit.models.vqgan import VQGAN, VQGANConfig

# diffusers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mid_block_add_attention": False, "layers_per_block": 2, "vq_embed_dim": None},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 3, "up_block_types": ["AttnUpDecoderBlock2D"] * 3},
    ],
    ids=["attention here and there", "aMUSEd's", "attention everywhere"],
)
def test_codes_and_pixels_equal_those_of_diffusers(settings):
    theirs = diffusers_model(**settings)
    model = vqgan_from_diffusers(dict(theirs.config), theirs.state_dict())
    assert_encodings_equal(model, theirs, pixels_of(2))
    codes, decoded = run_diffusers(theirs, pixels_of(2))
    assert codes.shape == (2, 4, 6)
    assert_codes_equal(model.encode(pixels_of(2)), codes)
    assert_pixels_equal(model.decode(codes), decoded)


def test_weights_pixels_in_0_to_1_are_ours_in_minus_1_to_1(diffusers_vq):
    model = vqgan_from_diffusers(dict(diffusers_vq.config), diffusers_vq.state_dict(), black=0)
    codes, decoded = run_diffusers(diffusers_vq, (pixels_of(2) + 1) / 2)
    assert_codes_equal(model.encode(pixels_of(2)), codes)
    torch.testing.assert_close(model.decode(codes), (decoded * 2 - 1).clamp(-1, 1), atol=2e-4, rtol=0)


def test_weights_go_to_diffusers_and_back(diffusers_vq, vqgan):
    loaded = vqgan_from_diffusers(dict(diffusers_vq.config), diffusers_vq.state_dict())
    assert_weights_equal(vqgan_to_diffusers(loaded), diffusers_vq.state_dict())
    other = diffusers_model(num_vq_embeddings=32)
    other.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    other.load_state_dict(vqgan_to_diffusers(vqgan), strict=True)
    codes, decoded = run_diffusers(other, pixels_of(1))
    assert_codes_equal(vqgan.encode(pixels_of(1)), codes)
    assert_pixels_equal(vqgan.decode(codes), decoded)


def test_old_names_of_diffusers_attention_are_read(diffusers_vq):
    renamed = {}
    for name, tensor in diffusers_vq.state_dict().items():
        for ours, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{ours}.", f".{old}.")
        renamed[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in renamed
    loaded = vqgan_from_diffusers(dict(diffusers_vq.config), renamed)
    assert_weights_equal(vqgan_to_diffusers(loaded), diffusers_vq.state_dict())


# transformers


@pytest.mark.parametrize("settings", [{}, {"channel_multiplier": [1, 2], "num_res_blocks": 2}])
def test_codes_and_pixels_equal_those_of_janus(settings):
    theirs = janus_model(**settings)
    model = vqgan_from_janus(theirs.config.to_dict(), theirs.state_dict())
    assert_encodings_equal(model, theirs, pixels_of(2))
    codes, decoded = run_janus(theirs, pixels_of(2))
    assert_codes_equal(model.encode(pixels_of(2)), codes)
    assert_pixels_equal(model.decode(codes), decoded)


def test_weights_go_to_janus_and_back(janus_vq):
    loaded = vqgan_from_janus(janus_vq.config.to_dict(), janus_vq.state_dict())
    assert_weights_equal(vqgan_to_janus(loaded), janus_vq.state_dict())
    model = randomise(VQGAN(loaded.config.model_copy(update={"codebook_size": 32})))
    other = janus_model(num_embeddings=32)
    other.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    other.load_state_dict(vqgan_to_janus(model), strict=True)
    codes, decoded = run_janus(other, pixels_of(1))
    assert_codes_equal(model.encode(pixels_of(1)), codes)
    assert_pixels_equal(model.decode(codes), decoded)


def test_codes_by_angle_are_those_nearest_among_vectors_of_length_1(janus_vq):
    model = vqgan_from_janus(janus_vq.config.to_dict(), janus_vq.state_dict(), cosine=True)
    latents = janus_vq.quant_conv(janus_vq.encoder(pixels_of(2))).permute(0, 2, 3, 1)
    unit, codes = (nn.functional.normalize(x, dim=-1) for x in (latents, janus_vq.quantize.embedding.weight))
    expected = (unit[..., None, :] - codes).square().sum(-1).argmin(-1)
    assert_codes_equal(model.encode(pixels_of(2)), expected)
    assert (run_janus(janus_vq, pixels_of(2))[0] != expected).any()


@pytest.mark.parametrize(
    "settings",
    [{"resolution": 64, "attn_resolutions": [32]}, {"attn_resolutions": [512], "attn_type": "no"}, {}],
    ids=["attention at a level", "no attention", "attention in the middle"],
)
def test_codes_equal_those_of_chameleon(settings):
    theirs = chameleon_model(**settings)
    model = vqgan_from_chameleon(theirs.config.to_dict(), theirs.state_dict())
    assert_encodings_equal(model, theirs, pixels_of(2))
    codes = theirs.encode(pixels_of(2)).image_tokens.view(2, 4, 6)
    assert_codes_equal(model.encode(pixels_of(2)), codes)
    with pytest.raises(UserError, match="can only encode: its weights came without a decoder"):
        model.decode(codes)


def test_weights_go_to_chameleon_and_back(chameleon_vq):
    loaded = vqgan_from_chameleon(chameleon_vq.config.to_dict(), chameleon_vq.state_dict())
    assert_weights_equal(vqgan_to_chameleon(loaded), chameleon_vq.state_dict())
    model = randomise(VQGAN(loaded.config.model_copy(update={"codebook_size": 32})))
    other = chameleon_model(num_embeddings=32, resolution=64, attn_resolutions=[32])
    other.load_state_dict(vqgan_to_chameleon(model), strict=True)
    assert_codes_equal(model.encode(pixels_of(1)).flatten(), other.encode(pixels_of(1)).image_tokens)


# Weights that do not fit


@pytest.mark.parametrize(
    ("peer", "reader", "name"),
    [
        ("diffusers_vq", vqgan_from_diffusers, "decoder.up_blocks.0.attentions.1.to_out.0.weight"),
        ("janus_vq", vqgan_from_janus, "decoder.up.1.upsample.conv.weight"),
        ("chameleon_vq", vqgan_from_chameleon, "encoder.down.1.attn.0.proj_out.weight"),
    ],
)
def test_missing_unexpected_and_misshapen_weights_are_named(peer, reader, name, request):
    theirs = request.getfixturevalue(peer)
    config, weights = (
        dict(theirs.config.to_dict() if peer != "diffusers_vq" else theirs.config),
        theirs.state_dict(),
    )
    with pytest.raises(UserError, match=f"^here: the weights do not fit: {name} is missing$"):
        reader(config, {key: weights[key] for key in weights if key != name}, source="here")
    with pytest.raises(UserError, match=r"do not fit: encoder\.extra\.weight is unexpected$"):
        reader(config, {**weights, "encoder.extra.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight is \(65, 4\), expected \(64, 4\)$"):
        reader(config, {**weights, "quantize.embedding.weight": torch.ones(65, 4)})
    with pytest.raises(UserError, match=r"is missing; .* and \d+ more$"):
        reader(config, {})


@pytest.mark.parametrize(
    ("reader", "config", "message"),
    [
        (vqgan_from_diffusers, {"norm_type": "spatial"}, r"norm_type = 'spatial' \(expected 'group'\)"),
        (vqgan_from_diffusers, {"act_fn": "gelu"}, "act_fn = 'gelu'"),
        (vqgan_from_diffusers, {"in_channels": 1}, "in_channels = 1"),
        (vqgan_from_diffusers, {"up_block_types": ["UpBlock2D"]}, r"up_block_types = \['UpBlock2D'\]"),
        (
            vqgan_from_diffusers,
            {"block_out_channels": [8, 16]},
            "2 block_out_channels, but 1 down_block_types",
        ),
        (
            vqgan_from_diffusers,
            {"block_out_channels": [40]},
            r"widths must be multiples of num_groups 32, got \[40, 40\]",
        ),
        (vqgan_from_diffusers, {"latent_channels": "x"}, 'code_width = "x"'),
        (vqgan_from_janus, {"vq_config": {"double_latent": True}}, "double_latent = True"),
        (vqgan_from_chameleon, {"in_channels": 4}, "in_channels = 4"),
    ],
)
def test_settings_that_vqgan_does_not_have_are_refused(reader, config, message):
    with pytest.raises(UserError, match=message):
        reader(config, {})


def test_what_is_null_in_a_config_has_the_default(diffusers_vq, chameleon_vq):
    config = {**diffusers_vq.config, "norm_type": None, "act_fn": None}
    assert vqgan_from_diffusers(config, diffusers_vq.state_dict()).config.middle_attention
    with pytest.raises(UserError, match=r"mid_block.attentions.* is unexpected"):
        vqgan_from_diffusers({**config, "mid_block_add_attention": None}, diffusers_vq.state_dict())
    config = {**chameleon_vq.config.to_dict(), "double_latent": None, "vq_config": None}
    assert vqgan_from_chameleon(config, chameleon_vq.state_dict()).config.middle_attention
    config["channel_multiplier"] = None
    with pytest.raises(UserError, match="weights do not fit"):  # of (1, 1, 2, 2, 4)
        vqgan_from_chameleon(config, chameleon_vq.state_dict())


def test_a_model_goes_only_to_formats_that_compute_the_same(vqgan):
    with pytest.raises(UserError, match=r"VQModel does not compute .* unit_codes = True, expected False"):
        vqgan_to_diffusers(VQGAN(SMALL.model_copy(update={"unit_codes": True})))
    with pytest.raises(UserError, match=r"JanusVQVAE does .* encoder_attention = \(1,\), expected \(2,\)"):
        vqgan_to_janus(vqgan)
    with pytest.raises(UserError, match=r"ChameleonVQVAE does .* decoder = True, expected False"):
        vqgan_to_chameleon(vqgan)


# Our own


def test_saved_and_loaded_it_gives_the_same_codes_and_pixels(vqgan, tmp_path):
    again = VQGAN.from_pretrained(vqgan.save_pretrained(tmp_path))
    assert again.config == SMALL
    codes = vqgan.encode(pixels_of(2))
    assert torch.equal(again.encode(pixels_of(2)), codes)
    assert torch.equal(again.decode(codes), vqgan.decode(codes))


def test_it_has_the_face_of_an_image_tokenizer(vqgan):
    assert (vqgan.factor, vqgan.codebook_size, vqgan.grid(16, 24)) == (4, 32, (4, 6))
    assert vqgan.code_vectors().shape == (32, 4)
    codes = vqgan.encode(pixels_of(1).double())
    assert codes.dtype == torch.int64
    assert codes.shape == (1, 4, 6)
    decoded = vqgan.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    assert decoded.shape == (1, 3, 8, 20)
    assert decoded.dtype == torch.float32
    unit = VQGAN(SMALL.model_copy(update={"unit_codes": True}))
    torch.testing.assert_close(unit.code_vectors().norm(dim=1), torch.ones(32))


def test_codes_do_not_depend_on_autocast(vqgan):
    pixels = pixels_of(4, 64, 64)  # 1024 codes; in bfloat16, 16 of them would be others
    with torch.autocast("cpu", torch.bfloat16):
        codes = vqgan.encode(pixels)
        assert vqgan.decode(codes).dtype == torch.float32
    assert torch.equal(codes, vqgan.encode(pixels))


def test_decoded_pixels_are_clamped(vqgan):
    vqgan.decoder.head.weight *= 100
    decoded = vqgan.decode(vqgan.encode(pixels_of(1)))
    assert (decoded.min(), decoded.max()) == (-1, 1)


def test_wrong_sizes_codes_and_settings_are_refused(vqgan):
    with pytest.raises(UserError, match="18x24 pixels cannot be cut into patches of 4x4"):
        vqgan.encode(torch.zeros(1, 3, 18, 24))
    with pytest.raises(UserError, match=r"codes from 0 to 32 do not fit .* codes 0 to 31"):
        vqgan.decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(ValueError, match=r"attention levels must be 0 to 2, got \[3\]"):
        VQGANConfig(**{**SMALL.model_dump(), "decoder_attention": (0, 3)})
