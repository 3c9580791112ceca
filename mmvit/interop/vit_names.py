"""The names and layouts of a ViT's or hybrid's weights in the files of other projects: one table per naming.

A table lists for every weight of our `Classifier` which of their weights hold the same numbers, and how they
are laid out there. It works in both directions and only moves numbers: a round trip is equal bit for bit
(big_vision's [CLS] has no position, so it is added to the token first).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.models.classifier import ClassifierConfig
from mmvit.models.resnet import stem_places

Naming = Literal["official", "big_vision", "timm", "transformers4", "transformers5"]


class Layout(NamedTuple):
    """`read` turns their weights into one of ours, `write` one of ours into theirs."""

    read: Callable[[Sequence[Tensor], ClassifierConfig], Tensor]
    write: Callable[[Tensor, ClassifierConfig], Sequence[Tensor]]


class Entry(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    layout: Layout


def heads(config: ClassifierConfig) -> tuple[int, int]:
    return config.core.num_heads, config.core.head_dim


def patch(config: ClassifierConfig) -> tuple[int, int, int]:
    """The channels, rows and columns that become one token."""
    if config.stem == "resnet":
        return stem_places(config.patch_size, config.stem_width, config.stem_blocks)
    return config.channels, config.patch_size, config.patch_size


def read_patch_table(theirs: Sequence[Tensor], config: ClassifierConfig) -> Tensor:
    return F.pad(theirs[0][0], (0, 0, 1, 0)) if config.has_class_token else theirs[0][0]


def write_patch_table(ours: Tensor, config: ClassifierConfig) -> list[Tensor]:
    if not config.has_class_token:
        return [ours[None]]
    if ours[0].any():
        raise ValueError("add the class token's position to the token first")
    return [ours[None, 1:]]


AS_IS = Layout(lambda theirs, _: theirs[0], lambda ours, _: [ours])
# ours (places, width); theirs has a batch dimension in front, and PATCH_TABLE lacks the class token
TABLE = Layout(lambda theirs, _: theirs[0][0], lambda ours, _: [ours[None]])
PATCH_TABLE = Layout(read_patch_table, write_patch_table)
# ours (width, channels · rows · columns); theirs (width, channels, rows, columns)
PATCHES = Layout(lambda theirs, _: theirs[0].flatten(1), lambda ours, c: [ours.unflatten(1, patch(c))])
THREE = Layout(lambda theirs, _: torch.cat(tuple(theirs)), lambda ours, _: ours.chunk(3))
# In flax dense kernels are (in, out), convolutions (rows, columns, in, out), and heads a separate axis.
KERNEL = Layout(lambda theirs, _: theirs[0].T, lambda ours, _: [ours.T])
CONV_KERNEL = Layout(
    lambda theirs, _: theirs[0].permute(3, 2, 0, 1), lambda ours, _: [ours.permute(2, 3, 1, 0)]
)
PATCH_KERNEL = Layout(
    lambda theirs, _: theirs[0].permute(3, 2, 0, 1).flatten(1),
    lambda ours, c: [ours.unflatten(1, patch(c)).permute(2, 3, 1, 0)],
)
THREE_KERNELS = Layout(
    lambda theirs, _: torch.cat([kernel.flatten(1).T for kernel in theirs]),
    lambda ours, c: [part.T.unflatten(1, heads(c)) for part in ours.chunk(3)],
)
THREE_BIASES = Layout(
    lambda theirs, _: torch.cat([bias.flatten() for bias in theirs]),
    lambda ours, c: [part.unflatten(0, heads(c)) for part in ours.chunk(3)],
)
OUT_KERNEL = Layout(
    lambda theirs, _: theirs[0].flatten(0, 1).T, lambda ours, c: [ours.T.unflatten(0, heads(c))]
)


def entries(naming: Naming, config: ClassifierConfig, with_head: bool = True) -> list[Entry]:
    """The table of a model, without its head if `with_head` is False."""
    table = {
        "official": official,
        "big_vision": big_vision,
        "timm": timm,
        "transformers4": transformers4,
        "transformers5": transformers5,
    }[naming]
    return [entry for entry in table(config) if with_head or not entry.ours.startswith("head.")]


def official(config: ClassifierConfig) -> Iterator[Entry]:
    """google-research/vision_transformer's .npz."""
    if config.has_class_token:
        yield Entry("cls_token", ("cls",), AS_IS)
    yield Entry("positions.table", ("Transformer/posembed_input/pos_embedding",), TABLE)
    yield from flax(config, attention="MultiHeadDotProductAttention_1", mlp="MlpBlock_3", norm2="LayerNorm_2")


def big_vision(config: ClassifierConfig) -> Iterator[Entry]:
    """google-research/big_vision's .npz: only patches have positions."""
    if config.has_class_token:
        yield Entry("cls_token", ("cls",), AS_IS)
    yield Entry("positions.table", ("pos_embedding",), PATCH_TABLE)
    yield from flax(config, attention="MultiHeadDotProductAttention_0", mlp="MlpBlock_0", norm2="LayerNorm_1")


def flax(config: ClassifierConfig, attention: str, mlp: str, norm2: str) -> Iterator[Entry]:
    if config.stem == "resnet":
        yield Entry("stem.root.weight", ("conv_root/kernel",), CONV_KERNEL)
        yield from flax_norm("stem.norm", "gn_root")
        for stage, unit, ours in units(config):
            theirs = f"block{stage + 1}/unit{unit + 1}"
            for n in (1, 2, 3):
                yield Entry(f"{ours}.conv{n}.weight", (f"{theirs}/conv{n}/kernel",), CONV_KERNEL)
                yield from flax_norm(f"{ours}.norm{n}", f"{theirs}/gn{n}")
            if not unit:
                yield Entry(f"{ours}.shortcut.0.weight", (f"{theirs}/conv_proj/kernel",), CONV_KERNEL)
                yield from flax_norm(f"{ours}.shortcut.1", f"{theirs}/gn_proj")
    yield Entry("stem.proj.weight", ("embedding/kernel",), PATCH_KERNEL)
    yield Entry("stem.proj.bias", ("embedding/bias",), AS_IS)
    for layer in range(config.core.depth):
        ours, theirs = f"core.blocks.{layer}", f"Transformer/encoderblock_{layer}"
        yield from flax_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        projections = [f"{theirs}/{attention}/{name}" for name in ("query", "key", "value")]
        kernels, biases = (tuple(f"{p}/{kind}" for p in projections) for kind in ("kernel", "bias"))
        yield Entry(f"{ours}.attention.qkv.weight", kernels, THREE_KERNELS)
        yield Entry(f"{ours}.attention.qkv.bias", biases, THREE_BIASES)
        yield Entry(f"{ours}.attention.out.weight", (f"{theirs}/{attention}/out/kernel",), OUT_KERNEL)
        yield Entry(f"{ours}.attention.out.bias", (f"{theirs}/{attention}/out/bias",), AS_IS)
        yield from flax_norm(f"{ours}.norm2", f"{theirs}/{norm2}")
        yield from flax_dense(f"{ours}.mlp.up", f"{theirs}/{mlp}/Dense_0")
        yield from flax_dense(f"{ours}.mlp.down", f"{theirs}/{mlp}/Dense_1")
    yield from flax_norm("core.norm", "Transformer/encoder_norm")
    if config.representation_width:
        yield from flax_dense("representation", "pre_logits")
    yield from flax_dense("head", "head")


def units(config: ClassifierConfig) -> Iterator[tuple[int, int, str]]:
    """Of a hybrid's ResNet: stage, place in the stage, and our name, of every block. The first of each stage
    has a shortcut with weights."""
    for stage, depth in enumerate(config.stem_blocks):
        for unit in range(depth):
            yield stage, unit, f"stem.stages.{stage}.{unit}"


def flax_norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (f"{theirs}/scale",), AS_IS)
    yield Entry(f"{ours}.bias", (f"{theirs}/bias",), AS_IS)


def flax_dense(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (f"{theirs}/kernel",), KERNEL)
    yield Entry(f"{ours}.bias", (f"{theirs}/bias",), AS_IS)


def timm(config: ClassifierConfig) -> Iterator[Entry]:
    """timm's `VisionTransformer`, and its hybrids."""
    if config.has_class_token:
        yield Entry("cls_token", ("cls_token",), AS_IS)
    yield Entry("positions.table", ("pos_embed",), TABLE)
    if config.stem == "resnet":
        body = "patch_embed.backbone"
        yield Entry("stem.root.weight", (f"{body}.stem.conv.weight",), AS_IS)
        yield from same("stem.norm", f"{body}.stem.norm")
        for stage, unit, ours in units(config):
            theirs = f"{body}.stages.{stage}.blocks.{unit}"
            for n in (1, 2, 3):
                yield Entry(f"{ours}.conv{n}.weight", (f"{theirs}.conv{n}.weight",), AS_IS)
                yield from same(f"{ours}.norm{n}", f"{theirs}.norm{n}")
            if not unit:
                yield Entry(f"{ours}.shortcut.0.weight", (f"{theirs}.downsample.conv.weight",), AS_IS)
                yield from same(f"{ours}.shortcut.1", f"{theirs}.downsample.norm")
    yield Entry("stem.proj.weight", ("patch_embed.proj.weight",), PATCHES)
    yield Entry("stem.proj.bias", ("patch_embed.proj.bias",), AS_IS)
    for layer in range(config.core.depth):
        ours, theirs = f"core.blocks.{layer}", f"blocks.{layer}"
        yield from same(f"{ours}.norm1", f"{theirs}.norm1")
        yield from same(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")
        yield from same(f"{ours}.attention.out", f"{theirs}.attn.proj")
        yield from same(f"{ours}.norm2", f"{theirs}.norm2")
        yield from same(f"{ours}.mlp.up", f"{theirs}.mlp.fc1")
        yield from same(f"{ours}.mlp.down", f"{theirs}.mlp.fc2")
    yield from same("core.norm", "fc_norm" if config.norm_after_pooling else "norm")
    if config.representation_width:
        yield from same("representation", "pre_logits.fc")  # of timm before 0.6
    yield from same("head", "head")


def transformers4(config: ClassifierConfig) -> Iterator[Entry]:
    """`ViTForImageClassification` of transformers up to 4, whose files are the ones on the Hub."""
    return transformers(
        config,
        block="encoder.layer",
        projections=[f"attention.attention.{name}" for name in ("query", "key", "value")],
        out="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
    )


def transformers5(config: ClassifierConfig) -> Iterator[Entry]:
    """`ViTForImageClassification` of transformers 5."""
    return transformers(
        config,
        block="layers",
        projections=[f"attention.{name}_proj" for name in "qkv"],
        out="attention.o_proj",
        up="mlp.fc1",
        down="mlp.fc2",
    )


def transformers(
    config: ClassifierConfig, block: str, projections: list[str], out: str, up: str, down: str
) -> Iterator[Entry]:
    yield Entry("cls_token", ("vit.embeddings.cls_token",), AS_IS)
    yield Entry("positions.table", ("vit.embeddings.position_embeddings",), TABLE)
    patches = "vit.embeddings.patch_embeddings.projection"
    yield Entry("stem.proj.weight", (f"{patches}.weight",), PATCHES)
    yield Entry("stem.proj.bias", (f"{patches}.bias",), AS_IS)
    for layer in range(config.core.depth):
        ours, theirs = f"core.blocks.{layer}", f"vit.{block}.{layer}"
        yield from same(f"{ours}.norm1", f"{theirs}.layernorm_before")
        for kind in ("weight", "bias"):
            names = tuple(f"{theirs}.{projection}.{kind}" for projection in projections)
            yield Entry(f"{ours}.attention.qkv.{kind}", names, THREE)
        yield from same(f"{ours}.attention.out", f"{theirs}.{out}")
        yield from same(f"{ours}.norm2", f"{theirs}.layernorm_after")
        yield from same(f"{ours}.mlp.up", f"{theirs}.{up}")
        yield from same(f"{ours}.mlp.down", f"{theirs}.{down}")
    yield from same("core.norm", "vit.layernorm")
    if config.representation_width:
        yield from same("representation", "vit.pooler.dense")
    yield from same("head", "classifier")


def same(ours: str, theirs: str) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), AS_IS)
