"""The optimizer: parameter groups, AdamW or Muon beside AdamW, and the learning rate at each step."""

import math
from typing import Any

import torch
from torch import nn

from mmvit.core.hidden import HiddenLayers
from mmvit.errors import UserError
from mmvit.training.config import OptimizerConfig

DECAYED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Optimizer:
    """One or two torch optimizers behind one face. The rate depends on the step alone: no scheduler."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int):
        self.config, self.total_steps = config, total_steps
        self.parts = build_optimizers(model, config)
        self.rate = 0.0
        self.peak_rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

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
        """Takes the moments from `state`; rates, decay and betas stay as they are configured now."""
        if state["name"] != self.config.name:
            raise UserError(
                f"the checkpoint was trained by {state['name']}, optimizer.name is now "
                f"{self.config.name}; set it back"
            )
        for part, saved in zip(self.parts, state["parts"], strict=True):
            settings = [
                {key: value for key, value in group.items() if key != "params"} for group in part.param_groups
            ]
            part.load_state_dict(saved)
            for group, own in zip(part.param_groups, settings, strict=True):
                group.update(own)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden layers' weights and AdamW over the rest."""
    decayed, plain, hidden = split_parameters(model)
    if config.name == "adamw":
        decayed, hidden = [*decayed, *hidden], []
    elif not hidden:
        raise UserError(
            f"optimizer.name = muon is for hidden layers, and {type(model).__name__} marks none "
            "(mmvit.core.hidden); use adamw"
        )
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(
        p.device.type in ("cpu", "cuda") for p in model.parameters()
    )  # 4 to 30 times faster than foreach and for
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=fused,
        )
    ]
    if hidden:
        lr = config.lr if config.muon_lr is None else config.muon_lr
        optimizers.append(
            Muon(hidden, lr=lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices alone, for convolution kernels too: as matrices
    of (out channels, in channels · height · width), on the same memory."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any):
        self.kernels = [
            (kernel, nn.Parameter(kernel.detach().flatten(1))) for kernel in parameters if kernel.ndim > 2
        ]
        for kernel, matrix in self.kernels:
            if matrix.data_ptr() != kernel.data_ptr():
                raise ValueError(
                    f"a kernel of shape {tuple(kernel.shape)} and strides {kernel.stride()} cannot be seen "
                    "as a matrix; keep its weights contiguous"
                )
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        super().__init__([*matrices, *(matrix for _, matrix in self.kernels)], **settings)

    def step(self, closure: None = None) -> None:
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kernel, _ in self.kernels:
            kernel.grad = None


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters in three lists, each in the model's order, none twice.

    Returns:
        those of no hidden layer that decay: weights of linear layers and convolutions;
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
