"""Starting from trained weights: fine-tuning a classifier on other images and classes (2010.11929, section
3.2), training a generator further, and taking another model's core."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvit.config import Config, build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.hub import CONFIG, read_core
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.weights import load_weights

ResizeMode = Literal["official", "timm", "transformers"]

# settings that may differ from those of the model whose weights are taken
MAY_DIFFER = {
    ClassifierConfig: {
        "image_size", "num_classes", "representation_width", "label_smoothing", "patch_dropout",
    },
    GeneratorConfig: {
        "caption_dropout", "code_noise", "label_smoothing", "image_loss_weight", "text_loss_weight",
    },
    TransformerConfig: {
        "dropout", "stochastic_depth", "attention_kernel", "activation_checkpointing",
        "activation_checkpointing_every", "layer_scale",
    },
}  # fmt: skip


def fine_tuned(source: Classifier, config: ClassifierConfig, resize: ResizeMode = "official") -> Classifier:
    """A `Classifier` of `config` with the weights of `source`, a head of zeros, and positions resized to its
    own grid.

    Raises:
        UserError: as `check_fine_tuned`.
    """
    check_fine_tuned(source.config, config)
    model = Classifier(config)
    own, weights = model.state_dict(), source.state_dict()
    grids = source.config.grid, config.grid
    for name, tensor in weights.items():
        last = name.rpartition(".")[2]
        if "positions." in name and last == "table" and config.positions == "learned_1d":
            weights[name] = resize_table(tensor, model.num_prefix, *grids, resize)
        elif "positions." in name and last in ("row_table", "column_table"):
            size = config.grid[0 if last == "row_table" else 1]
            weights[name] = resize_table(tensor, 0, (len(tensor), 1), (size, 1), resize)
    for name, tensor in own.items():
        if not name.startswith("head."):
            tensor.copy_(weights[name])  # shares its memory with the model
    return model


def check_fine_tuned(before: ClassifierConfig, config: ClassifierConfig) -> None:
    """Raises UserError when `config` differs from that of trained weights in settings that determine them."""
    if config.representation_width:
        raise UserError("a fine-tuned classifier has one linear head: remove model.representation_width")
    refuse_differences(before, config)
    if config.positions == "relative_1d" and before.grid != config.grid:
        raise UserError(
            f"relative_1d positions of {before.grid} patches cannot be resized to {config.grid}: keep "
            "image_size"
        )


def describe_changes(source: ClassifierConfig, config: ClassifierConfig) -> str:
    """A user-readable list of what `fine_tuned` changes in trained weights."""
    changes = ["a new head of zeros"]
    if source.num_classes != config.num_classes:
        changes[0] += f" for {config.num_classes} classes instead of {source.num_classes}"
    if source.grid != config.grid and config.positions.startswith("learned"):
        grids = ["x".join(map(str, grid)) for grid in (source.grid, config.grid)]
        changes.append(f"positions of {grids[0]} patches resized to {grids[1]}")
    return ", ".join(changes)


def continued(source: GeneratorTransformer, config: GeneratorConfig) -> GeneratorTransformer:
    """A generator of `config` with all the weights of `source`. One of raster order may go on in any order,
    with a new mask token.

    Raises:
        UserError: as `check_continued`.
    """
    check_continued(source.config, config)
    model = GeneratorTransformer(config)
    model.load_state_dict({**model.state_dict(), **source.state_dict()})
    return model


def check_continued(before: GeneratorConfig, config: GeneratorConfig) -> None:
    """Raises UserError when `config` differs from that of trained weights in settings that determine them."""
    if bool(config.text_loss_weight) != bool(before.text_loss_weight):
        raise UserError(
            "the trained weights are of another model: they have text_loss_weight = "
            f"{before.text_loss_weight}, the recipe {config.text_loss_weight}, and only a generator "
            "whose weight is not 0 has a head for captions"
        )
    if (before.order, config.order) == ("raster", "any"):
        before = before.model_copy(update={"order": "any", "attention": config.attention})
    refuse_differences(before, config)


def refuse_differences(source: Config, config: Config) -> None:
    if problems := [*differences(source, config), *differences(source.core, config.core, "core.")]:
        raise UserError(
            f"the trained weights are of another model: {'; '.join(problems)}; set the same in the recipe, "
            "or remove these keys from [model]"
        )


def differences(source: Config, config: Config, prefix: str = "") -> list[str]:
    """The settings in which `config` differs from `source` and may not, without those of its core."""
    ours, theirs = config.model_dump(exclude={"core"}), source.model_dump(exclude={"core"})
    problems = [
        f"they have {prefix}{name} = {theirs[name]!r}, the recipe {ours[name]!r}"
        for name in ours
        if name not in MAY_DIFFER[type(config)] and ours[name] != theirs[name]
    ]
    if isinstance(config, TransformerConfig) and (config.layer_scale is None) != (source.layer_scale is None):
        problems.append(f"{prefix}layer_scale on one side only")
    return problems


def take_core(model: nn.Module, source: str) -> None:
    """Gives `model`, a classifier or generator, the core of the model in `source`: a run folder, an exported
    model or a Hub repository.

    Raises:
        UserError: when there is no core, or it differs in settings that determine its weights.
    """
    folder, described, weights = read_core(source)
    if not isinstance(own := getattr(model.config, "core", None), TransformerConfig):
        raise UserError(
            f"a model of kind {model.config.kind!r} has no core, so it cannot take that of {folder}"
        )
    theirs = build_config(TransformerConfig, described, source=str(folder / CONFIG))
    if problems := differences(theirs, own, "core."):
        raise UserError(f"the core of {folder} does not fit: {'; '.join(problems)}")
    load_weights(model.core, weights, weights.source)


def resize_table(
    table: Tensor, prefix: int, grid: tuple[int, int], new_grid: tuple[int, int], mode: ResizeMode
) -> Tensor:
    """Learnt positions (prefix + rows · columns, width) interpolated to another grid; those of the prefix
    stay.

    Args:
        mode: whose interpolation: `official` is bilinear with aligned corners, `timm` bicubic with
        antialiasing,
            `transformers` bicubic without.
    """
    if grid == new_grid:
        return table
    square = table[prefix:].float().unflatten(0, grid).permute(2, 0, 1)[None]  # (1, width, rows, columns)
    if mode == "official":
        square = F.interpolate(square, new_grid, mode="bilinear", align_corners=True)
    else:
        square = F.interpolate(square, new_grid, mode="bicubic", antialias=mode == "timm")
    return torch.cat([table[:prefix], square[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)])


def stay_in_evaluation(module: nn.Module, inputs: tuple) -> None:
    """A hook before a module's `forward` that undoes any `train()`."""
    module.eval()


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Excludes `parts`, such as `stem` and `core.blocks.0`, from training: their parameters and the
    statistics of their batch norms stay.

    Raises:
        UserError: for a part that `model` does not have, or when nothing is left to train.
    """
    for part in parts:
        found = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not found:
            tops = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters())
            core = getattr(model, "core", None)
            blocks = f", core.blocks.0 to core.blocks.{len(core.blocks) - 1}" if core is not None else ""
            raise UserError(
                f"unknown part {part!r} in start.freeze; the model's parts are {', '.join(tops)}{blocks}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
        for name, module in model.named_modules():
            if f"{name}.".startswith(f"{part}.") and isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(stay_in_evaluation)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"start.freeze = {', '.join(parts)} leaves nothing to train")
