"""VQGAN: codes and pixels equal those of diffusers and transformers, from whose files its weights come."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.interop.vqgan import (
    load_vqgan,
    vqgan_from_chameleon,
    vqgan_from_diffusers,
    vqgan_from_janus,
    vqgan_to_chameleon,
    vqgan_to_diffusers,
    vqgan_to_janus,
)
from mmvit.interop.vqgan_export import save_vqgan
from mmvit.models.image_tokenizer import load_image_tokenizer
from mmvit.models.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    codebook_size=32,
    code_width=4,
    latent_width=6,
    stem_width=8,
    widths=(8, 16, 24),
    blocks_per_level=1,
    encoder_attention=(1,),
    decoder_attention=(2,),
    num_groups=4,
)
# Attention is at different levels in the encoder and the decoder: an exchange shows.
DIFFUSERS = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 1,
    "latent_channels": 6,
    "num_vq_embeddings": 64,
    "norm_num_groups": 4,
    "vq_embed_dim": 4,
}
TRANSFORMERS = {
    "embed_dim": 4,
    "num_embeddings": 64,
    "latent_channels": 6,
    "base_channels": 32,
    "channel_multiplier": [2, 1, 3],
    "num_res_blocks": 1,
}


# Weights that spread the encoder's vectors over many codes, and keep most pixels from being clamped.
GAINS = {
    "quant_conv.weight": 4,
    "to_code.weight": 4,
    "decoder.conv_out.weight": 0.4,
    "decoder.head.weight": 0.4,
}


def randomise(module: nn.Module) -> nn.Module:
    """Gives every parameter values of its own, so that a wrong name shows; codes of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embedding" in name or "codebook" in name:
            noise *= torch.rand(len(noise), 1, generator=generator) + 0.2
        elif parameter.ndim > 1:
            noise *= GAINS.get(name, 1) * parameter[0].numel() ** -0.5
        else:
            noise = name.endswith("weight") + 0.3 * noise
        parameter.copy_(noise)
    return module.eval().requires_grad_(False)


def pixels_of(batch: int, height: int = 16, width: int = 24) -> Tensor:
    """Patches of one colour each, so that codes differ, with noise."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(batch, 3, height // 4, width // 4, generator=generator)
    noise = torch.rand(batch, 3, height, width, generator=generator)
    return nn.functional.interpolate(colours, (height, width)) * 1.6 + noise * 0.4 - 1


def diffusers_model(**settings: Any) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.vq_model import VQModel

    return randomise(VQModel(**DIFFUSERS | settings))


def janus_model(**settings: Any) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEConfig

    return randomise(JanusVQVAE(JanusVQVAEConfig(**TRANSFORMERS | settings)))


def chameleon_model(**settings: Any) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE, ChameleonVQVAEConfig

    return randomise(ChameleonVQVAE(ChameleonVQVAEConfig(**TRANSFORMERS | settings)))


@pytest.fixture(scope="module")
def diffusers_vq() -> nn.Module:
    return diffusers_model()


@pytest.fixture(scope="module")
def janus_vq() -> nn.Module:
    return janus_model()


@pytest.fixture(scope="module")
def chameleon_vq() -> nn.Module:
    return chameleon_model(resolution=64, attn_resolutions=[32])


@pytest.fixture
def model() -> VQGAN:
    return randomise(VQGAN(SMALL))


def run_diffusers(theirs: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (batch, rows, columns), and the pixels that they are decoded to."""
    latents = theirs.encode(pixels).latents
    codes = theirs.quantize(latents)[2][2]
    return codes.view(len(pixels), *latents.shape[-2:]), theirs.decode(latents).sample


def run_janus(theirs: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    encoded = theirs.encode(pixels)
    rows, columns = encoded.last_hidden_state.shape[-2:]
    theirs.quantize.quant_state_dims = [rows, columns]  # which it would take to be square
    codes = encoded.image_tokens.view(len(pixels), rows, columns)
    return codes, theirs.decode(codes.flatten(1))


def assert_codes_equal(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 2


def assert_encodings_equal(model: VQGAN, theirs: nn.Module, pixels: Tensor) -> None:
    """What the codes are chosen by: it shows differences that are too small to change a code."""
    encoded = theirs.quant_conv(theirs.encoder(pixels))
    torch.testing.assert_close(model.to_code(model.encoder(pixels)), encoded, atol=2e-5, rtol=0)


def assert_pixels_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.clamp(-1, 1), atol=1e-4, rtol=0)
    assert theirs.std() > 0.1
    assert (theirs.abs() < 1).float().mean() > 0.5  # a clamp hides little


def assert_weights_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


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


def test_weights_go_to_diffusers_and_back(diffusers_vq, model):
    loaded = vqgan_from_diffusers(dict(diffusers_vq.config), diffusers_vq.state_dict())
    assert_weights_equal(vqgan_to_diffusers(loaded), diffusers_vq.state_dict())
    other = diffusers_model(num_vq_embeddings=32)
    other.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    other.load_state_dict(vqgan_to_diffusers(model), strict=True)
    codes, decoded = run_diffusers(other, pixels_of(1))
    assert_codes_equal(model.encode(pixels_of(1)), codes)
    assert_pixels_equal(model.decode(codes), decoded)


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
    with pytest.raises(UserError, match="can only encode, its weights came without a decoder"):
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
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight is \(65, 4\) instead of \(64, 4\)$"):
        reader(config, {**weights, "quantize.embedding.weight": torch.ones(65, 4)})
    with pytest.raises(UserError, match=r"is missing; .* and \d+ more$"):
        reader(config, {})


@pytest.mark.parametrize(
    ("reader", "config", "message"),
    [
        (vqgan_from_diffusers, {"norm_type": "spatial"}, r"norm_type = 'spatial' \(of 'group'\)"),
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
            r"widths \[40, 40\] are no multiples of num_groups",
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


def test_a_model_goes_only_to_formats_that_compute_the_same(model):
    with pytest.raises(UserError, match=r"VQModel does not compute .* unit_codes = True instead of False"):
        vqgan_to_diffusers(VQGAN(SMALL.model_copy(update={"unit_codes": True})))
    with pytest.raises(UserError, match=r"JanusVQVAE does .* encoder_attention = \(1,\) instead of \(2,\)"):
        vqgan_to_janus(model)
    with pytest.raises(UserError, match=r"ChameleonVQVAE does .* decoder = True instead of False"):
        vqgan_to_chameleon(model)


# Folders


@pytest.mark.parametrize("peer", ["diffusers_vq", "janus_vq", "chameleon_vq"])
def test_a_saved_folder_of_any_format_is_recognised(peer, request, tmp_path):
    theirs = request.getfixturevalue(peer)
    theirs.save_pretrained(tmp_path)
    model = load_vqgan(tmp_path)
    back = {"d": vqgan_to_diffusers, "j": vqgan_to_janus, "c": vqgan_to_chameleon}[peer[0]]
    assert_weights_equal(back(model), theirs.state_dict())
    assert not model.training


def test_diffusers_loads_the_folder_that_is_written(model, tmp_path):
    folder = save_vqgan(model, tmp_path, "diffusers")
    theirs = type(diffusers_model()).from_pretrained(folder).eval()
    assert_weights_equal(vqgan_to_diffusers(model), theirs.state_dict())
    codes, decoded = run_diffusers(theirs, pixels_of(1))
    assert_codes_equal(model.encode(pixels_of(1)), codes)
    assert_pixels_equal(model.decode(codes), decoded)


@pytest.mark.parametrize("name", ["janus", "chameleon"])
def test_transformers_loads_the_folder_that_is_written(name, request, tmp_path):
    peer = request.getfixturevalue(f"{name}_vq")
    read = {"janus": vqgan_from_janus, "chameleon": vqgan_from_chameleon}[name]
    model = read(peer.config.to_dict(), peer.state_dict())
    folder = save_vqgan(model, tmp_path, name)
    theirs = type(peer).from_pretrained(folder).eval()
    assert_weights_equal(theirs.state_dict(), peer.state_dict())
    assert_codes_equal(
        model.encode(pixels_of(1)).flatten(), theirs.encode(pixels_of(1)).image_tokens.flatten()
    )
    assert load_vqgan(folder).config == model.config


def test_what_a_folder_cannot_tell_is_warned_of_or_refused(model, tmp_path):
    black = VQGAN(SMALL.model_copy(update={"black": 0}))
    with pytest.warns(UserWarning, match="does not tell black, which is 0 here and -1 there"):
        save_vqgan(black, tmp_path, "diffusers")
    for changes, words in (
        ({"widths": (8, 12)}, r"multiples of stem_width 8, not \[12\]"),
        ({"middle_attention": False}, "only beside that in the middle"),
    ):
        with pytest.raises(UserError, match=words):
            save_vqgan(VQGAN(SMALL.model_copy(update=changes)), tmp_path, "chameleon")


def test_the_script_converts_a_folder(diffusers_vq, tmp_path, run_script):
    diffusers_vq.save_pretrained(tmp_path / "theirs")
    script = "tokenizers/convert_image_tokenizer.py"
    ran = run_script(script, tmp_path / "theirs", tmp_path / "ours", "--set", "black=0")
    assert ran.returncode == 0, ran.stderr
    ours = load_image_tokenizer(tmp_path / "ours")
    expected = load_vqgan(tmp_path / "theirs", black=0)
    assert_codes_equal(ours.encode(pixels_of(1)), expected.encode(pixels_of(1)))
    ran = run_script(script, tmp_path / "ours", tmp_path / "back", "--to", "diffusers")
    assert ran.returncode == 0, ran.stderr
    back = load_vqgan(tmp_path / "back", black=0)
    assert back.config == expected.config
    assert_weights_equal(back.state_dict(), expected.state_dict())
    for arguments, words in (
        (
            (tmp_path / "ours", tmp_path / "x", "--to", "openai"),
            "--to openai is for a dvae, and this is a vqgan",
        ),
        ((tmp_path / "ours", tmp_path / "x", "--set", "black=0"), "is ours and tells everything"),
        ((tmp_path / "nowhere", tmp_path / "x"), "nowhere"),
        ((tmp_path / "theirs", tmp_path / "x", "--set", "blak=0"), "blak"),
        ((tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "x"), "there is no file"),
    ):
        ran = run_script(script, *arguments)
        assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
        assert words in ran.stderr


def test_the_tokenizer_is_found_inside_a_whole_janus(tmp_path):
    pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusConfig, JanusForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    whole = JanusForConditionalGeneration(
        JanusConfig(
            text_config={**text, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": 32},
            vision_config={**vision, "projection_dim": 16},
            vq_config={**TRANSFORMERS, "projection_dim": 16, "image_token_embed_dim": 16},
        )
    )
    whole.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_weights_equal(vqgan_to_janus(load_vqgan(tmp_path)), whole.model.vqmodel.state_dict())


def test_the_tokenizer_is_found_inside_a_whole_chameleon(chameleon_vq, tmp_path):
    inside = {f"model.vqmodel.{name}": tensor for name, tensor in chameleon_vq.state_dict().items()}
    save_file({**inside, "lm_head.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00001.safetensors")
    config = {"model_type": "chameleon", "vq_config": chameleon_vq.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_weights_equal(vqgan_to_chameleon(load_vqgan(tmp_path)), chameleon_vq.state_dict())


def test_settings_that_config_json_does_not_tell_are_given(model, tmp_path):
    config = {"_class_name": "VQModel", **DIFFUSERS, "num_vq_embeddings": 32}
    config["down_block_types"] = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vqgan_to_diffusers(model), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert load_vqgan(tmp_path).config == SMALL
    assert load_vqgan(tmp_path, black=0).config == SMALL.model_copy(update={"black": 0})
    with pytest.raises(UserError, match="unknown key blak: did you mean black"):
        load_vqgan(tmp_path, blak=0)


def test_folders_without_a_vq_tokenizer_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*config.json"):
        load_vqgan(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a list"),
        ("{}", "describes nothing that has _class_name or model_type, not one of VQModel, janus_vqgan"),
        ('{"_class_name": "AutoencoderKL"}', "describes AutoencoderKL, not one of VQModel"),
        ('{"_class_name": "VQModel"}', r"holds no \*.safetensors; pickled weights .* are not read"),
    ):
        config.write_text(text)
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
        with pytest.raises(UserError, match=message):
            load_vqgan(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.safetensors is damaged or no safetensors file"):
        load_vqgan(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(vqgan_to_diffusers(model), tmp_path / name)
    with pytest.raises(UserError, match=r"b.safetensors and .*a.safetensors both hold decoder.conv_in.bias"):
        load_vqgan(tmp_path)


# Our own


def test_saved_and_loaded_it_gives_the_same_codes_and_pixels(model, tmp_path):
    again = VQGAN.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == SMALL
    codes = model.encode(pixels_of(2))
    assert torch.equal(again.encode(pixels_of(2)), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))


def test_it_has_the_face_of_an_image_tokenizer(model):
    assert (model.factor, model.codebook_size, model.grid(16, 24)) == (4, 32, (4, 6))
    assert model.code_vectors().shape == (32, 4)
    codes = model.encode(pixels_of(1).double())
    assert codes.dtype == torch.int64
    assert codes.shape == (1, 4, 6)
    decoded = model.decode(torch.zeros(1, 2, 5, dtype=torch.long))
    assert decoded.shape == (1, 3, 8, 20)
    assert decoded.dtype == torch.float32
    unit = VQGAN(SMALL.model_copy(update={"unit_codes": True}))
    torch.testing.assert_close(unit.code_vectors().norm(dim=1), torch.ones(32))


def test_codes_do_not_depend_on_autocast(model):
    pixels = pixels_of(4, 64, 64)  # 1024 codes; in bfloat16, 16 of them would be others
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(pixels)
        assert model.decode(codes).dtype == torch.float32
    assert torch.equal(codes, model.encode(pixels))


def test_decoded_pixels_are_clamped(model):
    model.decoder.head.weight *= 100
    decoded = model.decode(model.encode(pixels_of(1)))
    assert (decoded.min(), decoded.max()) == (-1, 1)


def test_wrong_sizes_codes_and_settings_are_refused(model):
    with pytest.raises(UserError, match="18x24 pixels cannot be cut into patches of 4x4"):
        model.encode(torch.zeros(1, 3, 18, 24))
    with pytest.raises(UserError, match=r"codes from 0 to 32 do not fit .* codes 0 to 31"):
        model.decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(ValueError, match=r"attention at levels \[3\], but there are 3, from 0"):
        VQGANConfig(**{**SMALL.model_dump(), "decoder_attention": (0, 3)})
