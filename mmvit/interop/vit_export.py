"""Our plain ViT classifiers and hybrids in the formats of other projects: the way back of mmvit.interop.vit.

save_vit(model, "ViT-B_16.npz", "official")
save_vit(model, "vit-b16", "transformers5", ["cat", "dog"])
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmvit.errors import UserError
from mmvit.files import whole_file, write_json
from mmvit.interop.vit_names import Naming, entries
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import stem_places
from mmvit.weights import MAX_FILE_SIZE, WEIGHTS, write_weights

POOLINGS = {
    "official": ("cls", "mean"),
    "big_vision": ("cls", "mean"),
    "timm": ("cls", "mean", "mean_beside_cls"),
    "transformers4": ("cls",),
    "transformers5": ("cls",),
}
TIMM = "vit_base_patch16_224"  # all of whose sizes can be changed in timm
TIMM_HYBRIDS = {  # whose sizes can be changed in timm, except the ResNet's
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
}
HYBRID_WIDTH = 64  # of the first stage of timm's ResNets


def vit_to_weights(model: Classifier, naming: Naming) -> dict[str, Tensor]:
    """The weights of `model` under another project's names and in its layout.

    Raises:
        UserError: for a model with parts that the other project's ViT does not have.
    """
    config = model.config
    refuse_parts(config, naming)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if naming == "big_vision" and config.has_class_token:  # whose token has no position of its own
        table = state["positions.table"].clone()
        state["cls_token"] = state["cls_token"] + table[0]
        table[0] = 0
        state["positions.table"] = table
    weights = {}
    for entry in entries(naming, config):
        parts = entry.layout.write(state[entry.ours], config)
        weights |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    return weights


def refuse_parts(config: ClassifierConfig, naming: Naming) -> None:
    core = config.core
    found = {
        "stem": not has_stem(config, naming),
        "positions": config.positions != "learned_1d",
        "registers": config.registers > 0,
        "positions_at": config.positions_at != "stem",
        "core.norm": core.norm != "layernorm",
        "core.mlp": core.mlp == "swiglu",
        "core.bias": not core.bias,
        "core.qk_norm": core.qk_norm,
        "core.layer_scale": core.layer_scale is not None,
        "norm_after_pooling": config.norm_after_pooling and naming != "timm",
        "representation_width": config.representation_width and naming not in ("official", "big_vision"),
        "pooling": config.pooling not in POOLINGS[naming],
    }
    if foreign := [name for name, is_foreign in found.items() if is_foreign]:
        values = {**config.model_dump(), **{f"core.{key}": v for key, v in core.model_dump().items()}}
        said = ", ".join(f"{name} = {values[name]!r}" for name in foreign)
        raise UserError(
            f"the ViT of {naming} has nothing like {said}: this classifier cannot be exported to it"
        )
    if naming not in ("transformers4", "transformers5"):
        wants = {"core.norm_eps": (core.norm_eps, 1e-6)}
        if config.stem == "resnet":
            wants["stem_epsilons"] = (config.stem_epsilons, naming)
        if naming != "timm":
            wants["core.mlp"] = (core.mlp, "gelu_tanh")
        for name, (value, default) in wants.items():
            if value != default:
                warnings.warn(
                    f"files of {naming} do not say {name}, which is {value} here and {default} by default "
                    f"there: set it when loading them (mmvit convert --set {name.split('.')[-1]}={value})",
                    stacklevel=3,
                )


def has_stem(config: ClassifierConfig, naming: Naming) -> bool:
    if config.stem == "resnet" and naming == "timm":
        _, *side = stem_places(config.patch_size, config.stem_width, config.stem_blocks)
        known = config.stem_blocks in TIMM_HYBRIDS and config.stem_width == HYBRID_WIDTH
        return known and side == [1, 1]
    return config.stem == "patch" or (config.stem == "resnet" and naming == "official")


def save_vit(
    model: Classifier, path: str | Path, naming: Naming, classes: Sequence[str] | None = None
) -> Path:
    """Writes `model` for another project: an .npz for the official code and big_vision; for timm
    (`create_model("local-dir:FOLDER", pretrained=True)`) and transformers
    (`ViTForImageClassification.from_pretrained`) a folder with model.safetensors and config.json, for the
    latter also preprocessor_config.json (`AutoImageProcessor.from_pretrained`).

    Args:
        classes: their names by number, which timm's and transformers' files keep.

    Raises:
        UserError: as `vit_to_weights` does, and for a file instead of a folder or the reverse.
    """
    path, weights = Path(path), vit_to_weights(model, naming)
    if naming in ("official", "big_vision"):
        if path.suffix != ".npz":
            raise UserError(f"{naming} reads an .npz file, got {path}")
        prefix = "params/" if naming == "big_vision" else ""
        with whole_file(path) as partial:
            np.savez(partial, **{prefix + name: tensor.numpy() for name, tensor in weights.items()})
        return path
    if path.suffix in (".npz", ".safetensors", ".pth"):
        raise UserError(f"{naming} reads a folder; {path} is named like a file")
    path.mkdir(parents=True, exist_ok=True)
    most = math.inf if naming == "timm" else MAX_FILE_SIZE  # timm reads no index
    write_weights(weights, path / WEIGHTS, max_file_size=most)
    if naming == "timm":
        names = {} if classes is None else {"label_names": list(classes)}
        write_json({**timm_config(model.config), **names}, path / "config.json")
    else:
        write_json(transformers_config(model.config, classes), path / "config.json")
        write_json(image_processor(model.config), path / "preprocessor_config.json")
    return path


def timm_config(config: ClassifierConfig) -> dict[str, Any]:
    core, pool = config.core, "token" if config.pooling == "cls" else "avg"
    is_hybrid = config.stem == "resnet"
    first = "backbone.stem.conv" if is_hybrid else "proj"
    return {
        "architecture": TIMM_HYBRIDS[config.stem_blocks] if is_hybrid else TIMM,
        "num_classes": config.num_classes,
        "global_pool": pool,
        "model_args": {
            "img_size": config.height_width,
            **({} if is_hybrid else {"patch_size": config.patch_size}),
            "in_chans": config.channels,
            "embed_dim": core.width,
            "depth": core.depth,
            "num_heads": core.num_heads,
            "mlp_ratio": core.mlp_ratio,
            "class_token": config.has_class_token,
            "global_pool": pool,
            "fc_norm": config.norm_after_pooling,
            "act_layer": core.mlp,
        },
        "pretrained_cfg": {
            "num_classes": config.num_classes,
            "input_size": (config.channels, *config.height_width),
            "fixed_input_size": True,
            "first_conv": f"patch_embed.{first}",
            "classifier": "head",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }


def image_processor(config: ClassifierConfig) -> dict[str, Any]:
    """Settings of transformers' ViTImageProcessor that give the pixels we train with."""
    rows, columns = config.height_width
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": rows, "width": columns},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.channels,
        "image_std": [0.5] * config.channels,
    }


def transformers_config(config: ClassifierConfig, classes: Sequence[str] | None = None) -> dict[str, Any]:
    core = config.core
    names = [f"class {number}" for number in range(config.num_classes)] if classes is None else classes
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": core.width,
        "num_hidden_layers": core.depth,
        "num_attention_heads": core.num_heads,
        "intermediate_size": core.mlp_width,
        "hidden_act": "gelu" if core.mlp == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": core.norm_eps,
        "hidden_dropout_prob": core.dropout,
        "attention_probs_dropout_prob": 0.0,
        "image_size": config.image_size if isinstance(config.image_size, int) else list(config.image_size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
