"""VQGAN in folders: ours, and those of diffusers, Janus and Chameleon, written, recognised and converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vqgan_models import (
    DIFFUSERS,
    SMALL,
    TRANSFORMERS,
    assert_codes_equal,
    assert_pixels_equal,
    assert_weights_equal,
    diffusers_model,
    pixels_of,
    run_diffusers,
)

from mmvit.errors import UserError
from mmvit.hub import SHIPPED
from mmvit.interop.vqgan import (
    load_vqgan,
    vqgan_from_chameleon,
    vqgan_from_janus,
    vqgan_to_chameleon,
    vqgan_to_diffusers,
    vqgan_to_janus,
)
from mmvit.interop.vqgan_export import save_vqgan
from mmvit.models.registry import load_image_tokenizer
from mmvit.models.vqgan import VQGAN
from mmvit.weights import write_weights


@pytest.mark.parametrize("peer", ["diffusers_vq", "janus_vq", "chameleon_vq"])
def test_a_saved_folder_of_any_format_is_recognised(peer, request, tmp_path):
    theirs = request.getfixturevalue(peer)
    theirs.save_pretrained(tmp_path)
    model = load_vqgan(tmp_path)
    back = {"d": vqgan_to_diffusers, "j": vqgan_to_janus, "c": vqgan_to_chameleon}[peer[0]]
    assert_weights_equal(back(model), theirs.state_dict())
    assert not model.training


def test_diffusers_loads_the_folder_that_is_written(vqgan, tmp_path):
    folder = save_vqgan(vqgan, tmp_path, "diffusers")
    theirs = type(diffusers_model()).from_pretrained(folder).eval()
    assert_weights_equal(vqgan_to_diffusers(vqgan), theirs.state_dict())
    codes, decoded = run_diffusers(theirs, pixels_of(1))
    assert_codes_equal(vqgan.encode(pixels_of(1)), codes)
    assert_pixels_equal(vqgan.decode(codes), decoded)


def test_a_folder_of_diffusers_may_have_many_files(diffusers_vq, tmp_path):
    diffusers_vq.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert not [*(tmp_path / "theirs").glob("diffusion_pytorch_model.safetensors")]
    model = load_vqgan(tmp_path / "theirs")
    assert_weights_equal(vqgan_to_diffusers(model), diffusers_vq.state_dict())
    path = save_vqgan(model, tmp_path / "ours", "diffusers") / "diffusion_pytorch_model.safetensors"
    write_weights(load_file(path), path, max_file_size=20_000)
    assert not path.exists()
    theirs = type(diffusers_vq).from_pretrained(tmp_path / "ours")
    assert_weights_equal(theirs.state_dict(), diffusers_vq.state_dict())


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


def test_what_a_folder_cannot_tell_is_warned_of_or_refused(vqgan, tmp_path):
    black = VQGAN(SMALL.model_copy(update={"black": 0}))
    with pytest.warns(UserWarning, match="does not say black, which is 0 here and -1 there"):
        save_vqgan(black, tmp_path, "diffusers")
    for changes, words in (
        ({"widths": (8, 12)}, r"multiples of stem_width 8, got \[12\]"),
        ({"middle_attention": False}, "only together with that in the middle"),
    ):
        with pytest.raises(UserError, match=words):
            save_vqgan(VQGAN(SMALL.model_copy(update=changes)), tmp_path, "chameleon")


def test_the_script_converts_a_folder(diffusers_vq, tmp_path, run_script):
    diffusers_vq.save_pretrained(tmp_path / "theirs")
    script = "pipelines/convert_weights.py"
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
            "--to openai: expected an image tokenizer (dvae), got an image tokenizer (vqgan)",
        ),
        (
            (tmp_path / "ours", tmp_path / "x", "--set", "black=0"),
            "is an mmvit model, which says everything itself",
        ),
        (
            (tmp_path / "ours", tmp_path / "x", "--to", "timm"),
            "--to timm: expected a classifier, got an image",
        ),
        ((tmp_path / "ours", tmp_path / "x", "--to", "tim"), "'tim' is not one of"),
        ((tmp_path / "ours", tmp_path / "ours" / "config.json" / "x"), "cannot be written: Not a directory"),
        ((tmp_path / "ours",), "expected SOURCE OUT"),
        ((SHIPPED, tmp_path / "x"), "holds a generator; expected a ViT classifier or an image tokenizer"),
        ((tmp_path / "nowhere", tmp_path / "x"), "nowhere"),
        ((tmp_path / "theirs", tmp_path / "x", "--set", "blak=0"), "blak"),
        ((tmp_path / "a.pkl", tmp_path / "b.pkl", tmp_path / "x"), "no file"),
    ):
        ran = run_script(script, *arguments)
        assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
        assert words in ran.stderr
        assert not (tmp_path / "x").exists()


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


def test_settings_that_config_json_does_not_tell_are_given(vqgan, tmp_path):
    config = {"_class_name": "VQModel", **DIFFUSERS, "num_vq_embeddings": 32}
    config["down_block_types"] = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vqgan_to_diffusers(vqgan), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert load_vqgan(tmp_path).config == SMALL
    assert load_vqgan(tmp_path, black=0).config == SMALL.model_copy(update={"black": 0})
    with pytest.raises(UserError, match="unknown key blak: did you mean black"):
        load_vqgan(tmp_path, blak=0)


def test_folders_without_a_vq_tokenizer_are_refused(vqgan, tmp_path):
    with pytest.raises(UserError, match=r"no file .*config.json"):
        load_vqgan(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json: expected .*, got a list"),
        ("{}", "expected one of VQModel, janus_vqgan, .* got nothing with _class_name or model_type"),
        ('{"_class_name": "AutoencoderKL"}', "expected one of VQModel, .* got AutoencoderKL"),
        ('{"_class_name": "VQModel"}', r"holds no \*.safetensors; pickled weights .* are not read"),
    ):
        config.write_text(text)
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
        with pytest.raises(UserError, match=message):
            load_vqgan(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.safetensors is damaged or not a safetensors file"):
        load_vqgan(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(vqgan_to_diffusers(vqgan), tmp_path / name)
    with pytest.raises(UserError, match=r"b.safetensors and .*a.safetensors both hold decoder.conv_in.bias"):
        load_vqgan(tmp_path)
