"""LARS, layer-wise adaptive rates (1708.03888), as BYOL uses it (2006.07733)."""

from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose gradient of each matrix, decay included, is scaled to `trust` of its norm.

    Vectors (biases, scales of norms) use their gradients unscaled.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.9, trust: float = 1e-3):
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad + group["weight_decay"] * parameter
                if parameter.ndim > 1:
                    update *= trust_ratio(parameter, update, group["trust"])
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                velocity = state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.sub_(velocity, alpha=group["lr"])


def trust_ratio(parameter: Tensor, update: Tensor, trust: float) -> Tensor:
    """`trust` · ‖parameter‖ / ‖update‖; 1 if either is 0, so that zeros can grow."""
    norm, size = parameter.norm(), update.norm()
    return torch.where((norm > 0) & (size > 0), trust * norm / size, 1.0)
