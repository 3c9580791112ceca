"""VQ tokenizers of other projects as our `VQGAN`: diffusers' `VQModel`, transformers' `JanusVQVAE`
(LlamaGen's architecture) and `ChameleonVQVAE`. The way back is mmvit.interop.vqgan_export.

    model = load_vqgan("amused-256/vqvae", black=0)  # a folder with config.json and *.safetensors
    model.save_pretrained("amused-vqgan")

Pass what a source's config.json does not say as fields of `VQGANConfig`: `black=0` for weights that expect
pixels in [0, 1], as aMUSEd's do, and `cosine=True` to choose Janus's codes as its and LlamaGen's authors do
(transformers chooses them by Euclidean distance, although it decodes codes of length 1, too).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmvit.config import build_config
from mmvit.errors import UserError, refuse_damage
from mmvit.hub import outline
from mmvit.interop.files import read_config, refuse_misfits
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.weights import WEIGHTS, Weights, has_weights, read_weights

TRANSFORMERS_MODELS = ("janus", "chameleon")  # with a VQ model inside, or that alone as janus_vqgan
# Our names → theirs, applied in this order.
COMMON = (
    (r"coder\.stem\.", "coder.conv_in."),
    (r"coder\.head\.", "coder.conv_out."),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^codebook\.", "quantize.embedding."),
)
TRANSFORMERS = (
    *COMMON,
    (r"coder\.norm\.", "coder.norm_out."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample.conv."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up.\1.upsample.conv."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.skip\.", ".nin_shortcut."),
    (r"\.([qkv])(uery|ey|alue)\.", r".\1."),
    (r"\.out\.", ".proj_out."),
)
DIFFUSERS = (
    *COMMON,
    (r"coder\.norm\.", "coder.conv_norm_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
    (r"\.blocks\.", ".resnets."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.([qkv])(uery|ey|alue)\.", r".to_\1."),
    (r"\.out\.", ".to_out.0."),
)
# diffusers has renamed these; files with the old names are still common
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vqgan(folder: str | Path, **settings: Any) -> VQGAN:
    """The VQ tokenizer in a folder of diffusers or transformers, in evaluation mode.

    Only the tokenizer of a whole Janus or Chameleon is read, from however many files. Pickled weights are
    never read.

    Args:
        settings: fields of `VQGANConfig` that override config.json.

    Raises:
        UserError: if the folder lacks config.json or safetensors, or holds another model or settings that
            `VQGAN` does not have; and for weights that are missing, unexpected or of another shape, by name.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    readers = {
        "VQModel": vqgan_from_diffusers,
        "janus_vqgan": vqgan_from_janus,
        "janus": vqgan_from_janus,
        "chameleon_vqgan": vqgan_from_chameleon,
        "chameleon": vqgan_from_chameleon,
    }
    kind = config.get("_class_name", config.get("model_type"))
    if not isinstance(kind, str) or kind not in readers:
        what = kind or "nothing with _class_name or model_type"
        raise UserError(f"{folder / 'config.json'}: expected one of {', '.join(readers)}, got {what}")
    with refuse_damage(folder):
        return readers[kind](config, weights_in(folder), source=str(folder), **settings)


def holds_vqgan(path: Path) -> bool:
    """Whether a folder is of diffusers, or of Janus or Chameleon."""
    config = read_config(path / "config.json") if (path / "config.json").is_file() else {}
    return "_class_name" in config or str(config.get("model_type")).partition("_")[0] in TRANSFORMERS_MODELS


def vqgan_from_diffusers(
    config: dict[str, Any], weights: dict[str, Tensor], source: str = "diffusers' VQModel", **settings: Any
) -> VQGAN:
    """A `VQGAN` made from the config.json and state dict of a `VQModel`; raises as `load_vqgan` does."""
    config = without_nulls(config)
    widths = config.get("block_out_channels", (64,))
    down = config.get("down_block_types", ("DownEncoderBlock2D",))
    up = config.get("up_block_types", ("UpDecoderBlock2D",))
    refuse_others(
        {**config, "down_block_types": sorted({*down}), "up_block_types": sorted({*up})},
        {
            "in_channels": (3,),
            "out_channels": (3,),
            "act_fn": ("silu", "swish"),
            "norm_type": ("group",),
            "down_block_types": subsets("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": subsets("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
        source,
    )
    if not 0 < len(widths) == len(down) == len(up):
        raise UserError(
            f"{source}: {len(widths)} block_out_channels, but {len(down)} down_block_types and {len(up)} "
            "up_block_types: the config is damaged"
        )
    latent_width = config.get("latent_channels", 3)
    code_width = config.get("vq_embed_dim")
    values = {
        "codebook_size": config.get("num_vq_embeddings", 256),
        "code_width": latent_width if code_width is None else code_width,
        "latent_width": latent_width,
        "stem_width": widths[0],
        "widths": widths,
        "blocks_per_level": config.get("layers_per_block", 1),
        "encoder_attention": [place for place, kind in enumerate(down) if kind.startswith("Attn")],
        "decoder_attention": [place for place, kind in enumerate(reversed(up)) if kind.startswith("Attn")],
        "middle_attention": config.get("mid_block_add_attention", True),
        "num_groups": config.get("norm_num_groups", 32),
    }
    old = rf"(\.attentions\.\d+\.)({'|'.join(OLD_ATTENTION)})\."
    weights = {
        re.sub(old, lambda name: f"{name[1]}{OLD_ATTENTION[name[2]]}.", name): tensor
        for name, tensor in weights.items()
    }
    return build(values | settings, weights, vqgan_to_diffusers, source)


def vqgan_from_janus(
    config: dict[str, Any], weights: dict[str, Tensor], source: str = "Janus's VQ model", **settings: Any
) -> VQGAN:
    """A `VQGAN` made from the config.json (of Janus or its VQ model) and state dict of a `JanusVQVAE`; raises
    as `load_vqgan` does."""
    config = without_nulls(without_nulls(config).get("vq_config", config))
    refuse_others(config, {"in_channels": (3,), "out_channels": (3,), "double_latent": (False,)}, source)
    values = read_transformers(config, num_codes=16384, code_width=8)
    lowest = [len(values["widths"]) - 1]
    values |= {"encoder_attention": lowest, "decoder_attention": lowest, "unit_codes": True}
    return build(values | settings, weights, vqgan_to_janus, source)


def vqgan_from_chameleon(
    config: dict[str, Any], weights: dict[str, Tensor], source: str = "Chameleon's VQ model", **settings: Any
) -> VQGAN:
    """A `VQGAN` made from the config.json (of Chameleon or its VQ model) and state dict of a
    `ChameleonVQVAE`, which has no decoder; raises as `load_vqgan` does."""
    config = without_nulls(without_nulls(config).get("vq_config", config))
    refuse_others(config, {"in_channels": (3,), "double_latent": (False,)}, source)
    values = read_transformers(config, num_codes=8192, code_width=256)
    attention = config.get("attn_type", "vanilla") == "vanilla"
    resolutions = config.get("attn_resolutions") or () if attention else ()
    levels = range(len(values["widths"]))
    values |= {
        "encoder_attention": [n for n in levels if config.get("resolution", 512) >> n in resolutions],
        "decoder_attention": [],
        "middle_attention": attention,
        "decoder": False,
    }
    return build(values | settings, weights, vqgan_to_chameleon, source)


def vqgan_to_diffusers(model: VQGAN) -> dict[str, Tensor]:
    """The weights of `model` as the state dict of a `VQModel`, which has no place for `black`.

    Raises:
        UserError: if no `VQModel` computes what `model` does.
    """
    config = model.config
    expected = {"stem_width": config.widths[0], "decoder": True, "cosine": False, "unit_codes": False}
    refuse_unlike(config, expected, "diffusers' VQModel")
    return {rename(name, DIFFUSERS): tensor for name, tensor in model.state_dict().items()}


def vqgan_to_janus(model: VQGAN) -> dict[str, Tensor]:
    """The weights of `model` as the state dict of a `JanusVQVAE`, which has no place for `cosine`.

    Raises:
        UserError: if no `JanusVQVAE` computes what `model` does.
    """
    lowest = (len(model.config.widths) - 1,)
    expected = {
        "encoder_attention": lowest,
        "decoder_attention": lowest,
        "middle_attention": True,
        "num_groups": 32,
        "decoder": True,
        "unit_codes": True,
    }
    refuse_unlike(model.config, expected, "transformers' JanusVQVAE")
    return rename_to_transformers(model)


def vqgan_to_chameleon(model: VQGAN) -> dict[str, Tensor]:
    """The weights of `model` as the state dict of a `ChameleonVQVAE`.

    Raises:
        UserError: if no `ChameleonVQVAE` computes what `model` does.
    """
    refuse_unlike(
        model.config, {"num_groups": 32, "decoder": False, "cosine": False}, "transformers' ChameleonVQVAE"
    )
    return rename_to_transformers(model)


def read_transformers(config: dict[str, Any], num_codes: int, code_width: int) -> dict[str, Any]:
    """The settings that Janus and Chameleon share; a config.json may omit what equals the default."""
    width = config.get("base_channels", 128)
    return {
        "codebook_size": config.get("num_embeddings", num_codes),
        "code_width": config.get("embed_dim", code_width),
        "latent_width": config.get("latent_channels", 256),
        "stem_width": width,
        "widths": [width * times for times in config.get("channel_multiplier", (1, 1, 2, 2, 4))],
        "blocks_per_level": config.get("num_res_blocks", 2),
    }


def without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json without its nulls, which mean the default, or turn some things off."""
    off = {"mid_block_add_attention": False, "attn_type": "none"}
    filled = {key: off.get(key) if value is None else value for key, value in config.items()}
    return {key: value for key, value in filled.items() if value is not None}


def rename_to_transformers(model: VQGAN) -> dict[str, Tensor]:
    """Weights under transformers' names; its attention projects with 1x1 convolutions."""
    weights = {rename(name, TRANSFORMERS): tensor for name, tensor in model.state_dict().items()}
    convolution = re.compile(r"\.attn.*\.(q|k|v|proj_out)\.weight$")
    return {name: t[:, :, None, None] if convolution.search(name) else t for name, t in weights.items()}


def rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return name


def build(
    values: dict[str, Any],
    weights: dict[str, Tensor],
    to_theirs: Callable[[VQGAN], dict[str, Tensor]],
    source: str,
) -> VQGAN:
    """The model that `values` configure, in float32, with weights of the names and shapes that `to_theirs`
    gives."""
    config = build_config(VQGANConfig, values, source)
    expected_of = outline(lambda: VQGAN(config), 4 * len(weights), source)
    expected = {name: tensor.shape for name, tensor in to_theirs(expected_of).items()}
    refuse_misfits(expected, weights, f"{source}: the weights")
    model = VQGAN(config)
    ours = zip(model.state_dict().items(), expected, strict=True)  # in the same order
    model.load_state_dict({name: weights[theirs].reshape(tensor.shape) for (name, tensor), theirs in ours})
    return model.eval()


def refuse_others(config: dict[str, Any], allowed: dict[str, Sequence[Any]], source: str) -> None:
    """Raises UserError for settings of a source that `VQGAN` does not have; omitted ones are fine."""
    problems = [
        f"{key} = {config[key]!r} (expected {' or '.join(map(repr, values))})"
        for key, values in allowed.items()
        if key in config and config[key] not in values
    ]
    if problems:
        raise UserError(f"{source} has an architecture that VQGAN does not support: {'; '.join(problems)}")


def refuse_unlike(config: VQGANConfig, expected: dict[str, Any], target: str) -> None:
    """Raises UserError for settings of ours that differ from what `target` always has."""
    problems = [
        f"{key} = {getattr(config, key)}, expected {value}"
        for key, value in expected.items()
        if getattr(config, key) != value
    ]
    if problems:
        raise UserError(f"{target} does not compute what this model does: {'; '.join(problems)}")


def subsets(first: str, second: str) -> list[list[str]]:
    return [[first], [second], [first, second]]


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder's safetensors by name; of a larger model those under `vqmodel.`, without that
    prefix.

    If the file that a library reads by default is there, or its index, its variants (fp16) are ignored.
    """
    usual = [folder / name for name in ("diffusion_pytorch_model.safetensors", WEIGHTS)]
    files = [path for path in usual if has_weights(path)][:1]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors; pickled weights (.bin, .ckpt, .pt) are not read")
    places: dict[str, Weights] = {}
    for weights in map(read_weights, files):
        if twice := [name for name in weights if name in places]:
            both = f"{weights.source} and {places[twice[0]].source}"
            raise UserError(f"{both} both hold {twice[0]}: remove one of them")
        places |= dict.fromkeys(weights, weights)
    inner = {name: name.partition("vqmodel.")[2] for name in places if "vqmodel." in name}
    return {inner.get(name, name): places[name][name] for name in inner or places}
