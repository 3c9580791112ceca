"""Small VQGANs of ours, of diffusers and of transformers, with weights that show every exchange, and
what is to be equal between them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def small_vqgan() -> VQGAN:
    return randomise(VQGAN(SMALL))


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
