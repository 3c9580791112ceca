"""Vision Transformers of other projects as our `Classifier`: Google's official .npz files and big_vision's,
timm's, and those of transformers 4 and 5; also ResNet hybrids of the official code and timm. The way back is
mmvit.interop.vit_export.

    model = load_vit("ViT-B_16.npz")

Numbers are moved, never changed. Four things are not in the weights and differ between projects: the GELU
(flax's default is the tanh form), the norms' epsilon (1e-6, in transformers 1e-12), the epsilons of a
hybrid's ResNet (timm's are not those of the official code), and the number of heads (which .npz files show by
their shapes). They come from the source's config.json, else from its code's defaults; `settings` override
both.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError, did_you_mean, refuse_damage
from mmvit.hub import outline
from mmvit.interop.files import read_config, read_tensors, refuse_misfits, refuse_spread
from mmvit.interop.vit_names import Naming, entries
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import stem_stride
from mmvit.weights import WEIGHTS, index_of

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published widths
UNNAMED = re.compile(r"LABEL_\d+|class \d+")  # placeholders for names
PREFIXES = ("opt/target/", "params/img/", "params/")
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
FLAT = re.compile(r"(^|/)gn_?\w*/(scale|bias)$")  # some files have them as (1, 1, 1, channels)
SETTINGS = ("num_heads", "mlp", "norm_eps", "stem_epsilons", "pooling", "image_size", "num_classes")
RESNETS = {  # a hybrid's first weight, and the names of its blocks
    "official": ("conv_root/kernel", r"block(\d+)/unit(\d+)/"),
    "timm": (
        "patch_embed.backbone.stem.conv.weight",
        r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.",
    ),
}
HEAD_PARTS = ("representation.weight", "representation.bias", "head.weight", "head.bias")

Weights = dict[str, Tensor]


def load_vit(path: str | Path, **settings: Any) -> Classifier:
    """The classifier in an .npz, .safetensors, .pth or .bin file, or in a folder with one of these and a
    config.json, in evaluation mode.

    Args:
        settings: what the files do not say: `num_heads`, `mlp` ("gelu" or "gelu_tanh"), `norm_eps`,
            `stem_epsilons` ("official" or "timm"), `pooling`, `image_size` if the grid is not square.
            `num_classes` replaces the head by a new one of zeros.

    Raises:
        UserError: if nothing can be read there, or weights are missing, unexpected or of another shape than a
            ViT's, by name.
    """
    path = Path(path)
    described: dict[str, Any] = {}
    file = path
    if path.is_dir():
        file = find_weights(path)
        if (path / "config.json").is_file():
            described = read_config(path / "config.json")
    with refuse_damage(path):
        weights = read_tensors(file)
        refuse_spread(weights, file)
        naming, weights = recognise(weights, file)
        return vit_from_weights(weights, naming, {**describe(described, path), **settings}, str(file))


def class_names(folder: str | Path) -> list[str] | None:
    """The names of the classes in the config.json of timm or transformers in `folder`; None if there are
    none, or only placeholders."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    config = read_config(path)
    if isinstance(names := config.get("label_names"), list):
        return [str(name) for name in names]
    labels = config.get("id2label")
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(len(labels)))):
        return None
    names = [str(labels[str(number)]) for number in range(len(labels))]
    return None if all(UNNAMED.fullmatch(name) for name in names) else names


def find_weights(folder: Path) -> Path:
    if index_of(folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    for pattern in ("*.safetensors", "*.npz", "pytorch_model.bin", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise UserError(f"{folder} has {len(found)} files {pattern}; pass one of them")
        if found:
            return found[0]
    raise UserError(f"{folder} holds no weights: no *.safetensors, *.npz, pytorch_model.bin or *.pth")


def recognise(weights: Weights, source: Path | str = "the weights") -> tuple[Naming, Weights]:
    """The naming that these weights follow, and the weights with prefixes removed. Weights beside a prefix
    (an optimizer's state, a text tower) are not part of the model."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    if "embedding/kernel" in weights:
        weights = {name: t.flatten() if FLAT.search(name) else t for name, t in apart(weights).items()}
        return ("big_vision" if "pos_embedding" in weights else "official"), weights
    if "patch_embed.proj.weight" in weights:
        return "timm", weights
    inner = "embeddings.patch_embeddings.projection.weight"
    if inner in weights:
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    if f"vit.{inner}" in weights:
        old = any(name.startswith("vit.encoder.layer.") for name in weights)
        return ("transformers4" if old else "transformers5"), weights
    raise UserError(
        f"{source} holds no ViT with known names: no embedding/kernel (official, big_vision), "
        f"patch_embed.proj.weight (timm) or vit.{inner} (transformers); it begins with "
        f"{', '.join(sorted(weights)[:3])}"
    )


def apart(weights: Weights) -> Weights:
    """The weights with one array per block, which big_vision's scanned models stack into one for all."""
    stacked = "Transformer/encoderblock/"
    found = {name: tensor for name, tensor in weights.items() if not name.startswith(stacked)}
    for name in weights.keys() - found.keys():
        rest = name.removeprefix(stacked)
        found |= {f"Transformer/encoderblock_{n}/{rest}": part for n, part in enumerate(weights[name])}
    return found


def describe(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The facts in a config.json of transformers or timm as `settings` of `load_vit`."""
    if "architecture" in config:
        arguments = config.get("model_args") or {}
        known = {"num_heads": arguments.get("num_heads"), "image_size": arguments.get("img_size")}
        if arguments.get("global_pool", config.get("global_pool")) == "avg":
            known["pooling"] = "mean"
        if gelu := arguments.get("act_layer"):
            if gelu not in GELUS:
                raise UserError(
                    f"{source / 'config.json'}: act_layer {gelu!r}: expected one of {', '.join(GELUS)}"
                )
            known["mlp"] = GELUS[gelu]
        trained = config.get("pretrained_cfg") or {}
        for name in ("mean", "std"):
            if any(value != 0.5 for value in trained.get(name) or ()):
                warnings.warn(
                    f"{source / 'config.json'}: this model expects pixels normalised by {name} "
                    f"{list(trained[name])}; classifiers here read [-1, 1], which is 0.5: convert pixels",
                    stacklevel=3,
                )
        return {key: tuple(v) if isinstance(v, list) else v for key, v in known.items() if v is not None}
    if not config:
        return {}
    if config.get("model_type") != "vit":
        kind = config.get("model_type", "something without model_type")
        raise UserError(
            f"{source / 'config.json'}: expected a vit of transformers or an architecture of timm, got {kind}"
        )
    if (activation := config.get("hidden_act", "gelu")) not in GELUS:
        raise UserError(
            f"{source / 'config.json'}: hidden_act {activation!r}: expected one of {', '.join(GELUS)}"
        )
    if not config.get("qkv_bias", True):
        raise UserError(
            f"{source / 'config.json'}: qkv_bias is false, which this classifier does not support"
        )
    size = config.get("image_size", 224)
    return {
        "num_heads": config.get("num_attention_heads", 12),
        "image_size": tuple(size) if isinstance(size, list) else size,
        "mlp": GELUS[activation],
        "norm_eps": config.get("layer_norm_eps", 1e-12),
    }


def vit_from_weights(
    weights: Weights, naming: Naming, settings: Mapping[str, Any] | None = None, source: str = "the weights"
) -> Classifier:
    """A `Classifier` with another project's weights; raises as `load_vit` does."""
    config, with_head = infer_config(weights, naming, dict(settings or {}), source)
    if not with_head:
        heads = {name for part in HEAD_PARTS for name in names_of(naming, part)}
        weights = {name: tensor for name, tensor in weights.items() if name not in heads}
    own = outline(lambda: Classifier(config), 4 * len(weights), source).state_dict()
    table = entries(naming, config, with_head)
    expected = {
        name: tensor.shape
        for entry in table
        for name, tensor in zip(
            entry.theirs,
            entry.layout.write(torch.zeros(()).expand(own[entry.ours].shape), config),
            strict=True,
        )
    }
    refuse_misfits(expected, weights, f"{source}: the weights of a ViT as {naming} names them")
    model = Classifier(config)
    own = model.state_dict()
    for entry in table:
        parts = [weights[name].float() for name in entry.theirs]
        own[entry.ours].copy_(entry.layout.read(parts, config))  # shares its memory with the model
    return model.eval()


def infer_config(
    weights: Weights, naming: Naming, settings: dict[str, Any], source: str
) -> tuple[ClassifierConfig, bool]:
    """The configuration that follows from the weights' shapes and `settings`, and whether the head is
    kept."""
    if unknown := settings.keys() - SETTINGS:
        raise UserError(f"unknown setting {min(unknown)}{did_you_mean(min(unknown), SETTINGS)}")

    def shape(part: str, dimensions: int) -> tuple[int, ...]:
        (name, *_) = names_of(naming, part)
        if name not in weights:
            raise UserError(f"{source}: {name} is missing, so this is not a ViT with learnt positions")
        if weights[name].ndim != dimensions:
            raise UserError(
                f"{source}: {name}: expected {dimensions} dimensions, got {tuple(weights[name].shape)}"
            )
        return tuple(weights[name].shape)

    has_head = names_of(naming, "head.weight")[0] in weights
    with_head = "num_classes" not in settings
    if with_head and not has_head:
        raise UserError(f"{source} has no head: set num_classes for a new one of zeros")
    is_flax = naming in ("official", "big_vision")
    kernel = shape("stem.proj.weight", 4)
    side, channels, width = (
        (kernel[0], kernel[2], kernel[3]) if is_flax else (kernel[2], kernel[1], kernel[0])
    )
    stem = infer_resnet(weights, naming, side, source) or {"patch_size": side, "channels": channels}
    patch = stem["patch_size"]
    if "stem" in stem:
        stem["stem_epsilons"] = settings.get("stem_epsilons", naming)
    token = names_of(naming, "cls_token")[0] in weights
    norm_after_pooling = "fc_norm.weight" in weights
    pooling = settings.get("pooling", "mean" if norm_after_pooling or not token else "cls")
    if pooling == "mean" and token:
        pooling = "mean_beside_cls"
    places = shape("positions.table", 3)[1] - (token and naming != "big_vision")
    if not token and naming != "big_vision" and fits(places - 1, patch, settings.get("image_size")):
        name = names_of(naming, "cls_token")[0]
        raise UserError(f"{source}: {name} is missing, but positions have a place for it")
    core = {
        "width": width,
        "depth": count_blocks(weights, naming),
        "num_heads": count_heads(weights, naming, width, settings, source),
        "mlp_ratio": shape("core.blocks.0.mlp.up.weight", 2)[1 if is_flax else 0] / width,
        "mlp": settings.get("mlp", "gelu_tanh" if is_flax else "gelu"),
        "norm_eps": settings.get("norm_eps", 1e-12 if naming.startswith("transformers") else 1e-6),
    }
    values = {
        "image_size": image_size(places, patch, settings.get("image_size"), source),
        **stem,
        "num_classes": settings.get("num_classes") or shape("head.weight", 2)[1 if is_flax else 0],
        "pooling": pooling,
        "norm_after_pooling": norm_after_pooling,
        "core": core,
    }
    representation = names_of(naming, "representation.weight")[0]
    if with_head and representation in weights:
        values["representation_width"] = shape("representation.weight", 2)[1 if is_flax else 0]
    return build_config(ClassifierConfig, values, source), with_head


def infer_resnet(weights: Weights, naming: Naming, side: int, source: str) -> dict[str, Any]:
    """The stem of a hybrid whose patches are squares of `side` places, as settings; empty for a plain ViT."""
    root, block = RESNETS.get(naming, ("", ""))
    if root not in weights:
        return {}
    blocks = {(int(m[1]), int(m[2])) for m in (re.match(block, name) for name in weights) if m}
    stages = Counter(stage for stage, _ in blocks)
    if not stages:
        raise UserError(f"{source} has a ResNet's root without stages, which is not supported")
    depths = tuple(stages[stage] for stage in sorted(stages))
    kernel = weights[root].shape
    channels, width = (kernel[2], kernel[3]) if naming == "official" else (kernel[1], kernel[0])
    return {
        "stem": "resnet",
        "stem_blocks": depths,
        "stem_width": width,
        "patch_size": side * stem_stride(depths),
        "channels": channels,
    }


def names_of(naming: Naming, part: str) -> tuple[str, ...]:
    """The names that `naming` gives one of our weights, in a model with all parts and one block."""
    config = ClassifierConfig(representation_width=1, core=TransformerConfig(depth=1))
    return next(entry.theirs for entry in entries(naming, config) if entry.ours == part)


def count_blocks(weights: Weights, naming: Naming) -> int:
    prefix = names_of(naming, "core.blocks.0.norm1.weight")[0].partition("0")[0]
    numbers = [re.match(r"\d+", name.removeprefix(prefix)) for name in weights if name.startswith(prefix)]
    return 1 + max((int(number[0]) for number in numbers if number), default=0)


def count_heads(weights: Weights, naming: Naming, width: int, settings: dict[str, Any], source: str) -> int:
    query = names_of(naming, "core.blocks.0.attention.qkv.weight")[0]
    if naming in ("official", "big_vision") and query in weights and weights[query].ndim == 3:
        return weights[query].shape[1]
    if heads := settings.get("num_heads") or HEADS.get(width):
        return heads
    raise UserError(f"{source}: the number of heads is unknown for width {width}: set num_heads")


def fits(places: int, patch: int, given: int | tuple[int, int] | None) -> bool:
    """Whether so many patches make an image of the size `given`, or a square one if it is None."""
    if given is None:
        return places > 0 and math.isqrt(places) ** 2 == places
    height, width = (given, given) if isinstance(given, int) else given
    return (height // patch) * (width // patch) == places


def image_size(
    places: int, patch: int, given: int | tuple[int, int] | None, source: str
) -> int | tuple[int, int]:
    """The size of images that have `places` patches."""
    if given is not None:
        if not fits(places, patch, given):
            height, width = (given, given) if isinstance(given, int) else given
            raise UserError(
                f"{source} has positions for {places} patches of {patch} pixels; image_size {height}x{width} "
                f"has {(height // patch) * (width // patch)}"
            )
        return given
    if not fits(places, patch, None):
        raise UserError(f"{source} has positions for {places} patches, which is not a square: set image_size")
    return math.isqrt(places) * patch
