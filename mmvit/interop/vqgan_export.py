"""Our VQ tokenizers as folders that other projects load: the way back of mmvit.interop.vqgan.

save_vqgan(model, "for-diffusers", "diffusers")  # VQModel.from_pretrained("for-diffusers")
"""

import warnings
from pathlib import Path
from typing import Any, Literal

from mmvit.errors import UserError
from mmvit.files import write_json
from mmvit.interop.vqgan import vqgan_to_chameleon, vqgan_to_diffusers, vqgan_to_janus
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.weights import write_weights

VQGANFormat = Literal["diffusers", "janus", "chameleon"]
RESOLUTION = 512  # of images; Chameleon's config names the levels with attention by theirs


def save_vqgan(model: VQGAN, folder: str | Path, format: VQGANFormat) -> Path:
    """Writes config.json and safetensors to `folder`, for `from_pretrained` of diffusers' `VQModel` or
    transformers' `JanusVQVAE` or `ChameleonVQVAE`.

    Raises:
        UserError: if the other project's class does not compute what `model` does.
    """
    folder = Path(folder)
    if format == "diffusers":
        config, weights = diffusers_config(model.config), vqgan_to_diffusers(model)
    elif format == "janus":
        config, weights = janus_config(model.config), vqgan_to_janus(model)
    else:
        config, weights = chameleon_config(model.config), vqgan_to_chameleon(model)
    for name, value, theirs in (("black", model.config.black, -1), ("cosine", model.config.cosine, False)):
        if value != theirs:
            warnings.warn(
                f"a folder of {format} does not say {name}, which is {value} here and {theirs} there: set it "
                "when loading",
                stacklevel=2,
            )
    folder.mkdir(parents=True, exist_ok=True)
    name = "diffusion_pytorch_model.safetensors" if format == "diffusers" else "model.safetensors"
    write_weights(weights, folder / name)
    write_json(config, folder / "config.json")
    return folder


def diffusers_config(config: VQGANConfig) -> dict[str, Any]:
    levels = range(len(config.widths))
    down = [f"{'Attn' * (n in config.encoder_attention)}DownEncoderBlock2D" for n in levels]
    up = [f"{'Attn' * (n in config.decoder_attention)}UpDecoderBlock2D" for n in reversed(levels)]
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "norm_type": "group",
        "block_out_channels": config.widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_width,
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.code_width,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": config.middle_attention,
    }


def transformers_config(config: VQGANConfig) -> dict[str, Any]:
    if uneven := [width for width in config.widths if width % config.stem_width]:
        raise UserError(
            f"transformers' widths must be multiples of stem_width {config.stem_width}, got {uneven}"
        )
    return {
        "embed_dim": config.code_width,
        "num_embeddings": config.codebook_size,
        "double_latent": False,
        "latent_channels": config.latent_width,
        "in_channels": 3,
        "base_channels": config.stem_width,
        "channel_multiplier": [width // config.stem_width for width in config.widths],
        "num_res_blocks": config.blocks_per_level,
    }


def janus_config(config: VQGANConfig) -> dict[str, Any]:
    own = {"model_type": "janus_vqgan", "architectures": ["JanusVQVAE"], "out_channels": 3}
    return {**own, **transformers_config(config)}


def chameleon_config(config: VQGANConfig) -> dict[str, Any]:
    if config.encoder_attention and not config.middle_attention:
        raise UserError(
            "Chameleon has attention at levels only together with that in the middle (middle_attention)"
        )
    return {
        "model_type": "chameleon_vqgan",
        "architectures": ["ChameleonVQVAE"],
        "resolution": RESOLUTION,
        "attn_resolutions": [RESOLUTION >> level for level in config.encoder_attention],
        "attn_type": "vanilla" if config.middle_attention else "none",
        **transformers_config(config),
    }
