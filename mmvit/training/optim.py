"""The optimizer: parameter groups; AdamW, Muon with AdamW, SGD or LARS; the learning rate schedule."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmvit.core.hidden import HiddenLayers
from mmvit.errors import UserError
from mmvit.training.config import OptimizerConfig
from mmvit.training.flat_muon import FlatMuon
from mmvit.training.lars import Lars
from mmvit.training.muon import Muon

DECAYED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

# of the parameters that belong to one layer: the number of the first such layer, where 1 is the first block
LAYERS = {r"core\.blocks\.(\d+)\.": 1, r"layer_positions\.(\d+)\.": 2, r"relative\.tables\.(\d+)$": 1}
# of those that come after the last block
ABOVE = r"(core\.norm|representation|head|image_head|text_head)\."
PART = r"(?:classifier\.|generator\.)?"  # in front of either, in a model of both (mmvit.models.joint)


class Optimizer:
    """One or two torch optimizers behind one interface, with rates that depend on the step alone.

    Args:
        flat: one optimizer, for flat parts of parameters (`mmvit.training.shards`).
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int, flat: bool = False):
        self.config, self.total_steps = config, total_steps
        self.parts = build_optimizers(model, config, flat)
        self.rate = 0.0
        self.peak_rates = [[group["lr"] for group in part.param_groups] for part in self.parts]
        for part in self.parts:
            part.register_load_state_dict_pre_hook(lambda _, state: without_empty_parameters(state))

    def set_rate(self, step: int) -> None:
        """Sets the learning rates for optimizer step `step`, from 1; `rate` is AdamW's."""
        scale = rate_scale(step, self.total_steps, self.config)
        for part, peaks in zip(self.parts, self.peak_rates, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
        self.rate = self.config.lr * scale

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.config.name, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the moments from `state`; rates, decay and betas stay as configured now."""
        if state["name"] != self.config.name:
            raise UserError(
                f"the checkpoint was trained with {state['name']}, but optimizer.name is now "
                f"{self.config.name}: set it back"
            )
        parts = [without_empty_parameters(part) for part in state["parts"]]
        sizes = [[len(group["params"]) for group in part.state_dict()["param_groups"]] for part in self.parts]
        if sizes != [[len(group["params"]) for group in part["param_groups"]] for part in parts]:
            raise UserError(
                "the checkpoint has other trainable parameters or parameter groups: set "
                "start.freeze and optimizer.layer_decay back to what config.toml says, or start a new run "
                "with --start.model"
            )
        for part, saved in zip(self.parts, parts, strict=True):
            with settings_kept(part):
                part.load_state_dict(saved)


@contextmanager
def settings_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which loading a state leaves rates, decay and betas as configured now."""
    settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def without_empty_parameters(state: dict[str, Any]) -> dict[str, Any]:
    """A torch optimizer's state without empty parameters, which models used to have."""
    empty = {
        number
        for number, moments in state["state"].items()
        if any(isinstance(moment, Tensor) and not moment.numel() for moment in moments.values())
    }
    groups = [
        {**group, "params": [number for number in group["params"] if number not in empty]}
        for group in state["param_groups"]
    ]
    return {
        "state": {number: moments for number, moments in state["state"].items() if number not in empty},
        "param_groups": groups,
    }


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, flat: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW, SGD or LARS for everything; or Muon for the hidden layers' weights and AdamW for the rest."""
    decayed, plain, hidden = split_parameters(model)
    if config.name != "muon":
        decayed, hidden = [*decayed, *hidden], []
    elif not hidden:
        is_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        marks_none = f"{type(model).__name__} marks none (mmvit.core.hidden)"
        why = "all of them are frozen" if is_frozen else marks_none
        raise UserError(f"optimizer.name muon trains hidden layers, and {why}; use --optimizer.name adamw")
    scales = layer_scales(model, config.layer_decay)
    decaying = by_rate(decayed, scales, config.lr, config.weight_decay)
    others = by_rate(plain, scales, config.lr, 0.0)
    groups = decaying + others
    if config.name == "lars":
        return [Lars(groups, config.lr, config.momentum, config.trust)]
    fused = all(
        p.device.type in ("cpu", "cuda") for p in model.parameters()
    )  # 4 to 30 times faster than foreach and for
    if config.name == "sgd":
        return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)]
    lr = config.lr if config.muon_lr is None else config.muon_lr
    if hidden and flat:
        turned = [{**group, "muon": True} for group in by_rate(hidden, scales, lr, config.weight_decay)]
        return [FlatMuon([*groups, *turned], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    ]
    if hidden:
        groups = by_rate(hidden, scales, lr, config.weight_decay)
        optimizers.append(Muon(groups, lr=lr))
    return optimizers


def by_rate(
    parameters: list[nn.Parameter], scales: dict[int, float], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """`parameters` grouped by learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(scales[id(parameter)], []).append(parameter)
    return [
        {"params": group, "lr": lr * scale, "weight_decay": weight_decay}
        for scale, group in sorted(groups.items())
    ]


def layer_scales(model: nn.Module, decay: float) -> dict[int, float]:
    """Every parameter's learning rate relative to the head's: a factor `decay` for each layer below it.

    The lowest layer is everything before the core's blocks (BEiT, 2106.08254, appendix). A block's own
    positions learn at its rate.
    """
    if decay == 1:
        return {id(parameter): 1.0 for parameter in model.parameters()}
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    numbers = {
        name: int(match[1]) + first
        for pattern, first in LAYERS.items()
        for name in names
        if (match := re.match(PART + pattern, name))
    }
    if not numbers:
        raise UserError(
            f"optimizer.layer_decay needs a core of blocks, and {type(model).__name__} has none; set it to 1"
        )
    top = max(numbers.values()) + 1
    return {
        number: decay ** (top - numbers.get(name, top if re.match(PART + ABOVE, name) else 0))
        for name, number in names.items()
    }


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters in three lists, each in the model's order, none twice.

    Returns:
        weights of linear layers and convolutions outside the hidden layers, which decay;
        those that do not: biases, norms, embeddings, positions;
        the weights of `HiddenLayers`' linear layers and convolutions, which decay and suit Muon.
    """
    in_hidden = {
        id(layer.weight)
        for module in model.modules()
        if isinstance(module, HiddenLayers)
        for layer in module.modules()
        if isinstance(layer, DECAYED)
    }
    decays = {id(layer.weight) for layer in model.modules() if isinstance(layer, DECAYED)}
    decays -= {
        id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)
    }  # tied to a head
    decayed, plain, hidden = [], [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = hidden if id(parameter) in in_hidden else decayed if id(parameter) in decays else plain
            own.append(parameter)
    return decayed, plain, hidden


def rate_scale(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate at optimizer step `step` (1 to `total_steps`) as a share of its peak."""
    warmup = min(config.warmup_steps, total_steps)
    if step <= warmup:
        return step / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining
