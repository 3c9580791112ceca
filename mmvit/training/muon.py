"""Muon for matrices and convolution kernels, batched by shape and shared among processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmvit.training.distributed import choose_precision

STACK = 2**24  # elements of one stack at most: 34 MB in bfloat16


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), extended to convolution kernels and batched.

    Kernels count as matrices of (out channels, in channels · height · width), on the same memory. Matrices of
    one shape, or of its transpose, are orthogonalised as one stack, which halves the time for small layers.

    Of several processes, whose gradients must be the same, each orthogonalises its share of every stack and
    gets the others' from them; momentum is kept by all."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        self.kernels: list[tuple[nn.Parameter, nn.Parameter]] = []
        matrices = []
        for group in groups:
            kernels = [(kernel, as_matrix(kernel)) for kernel in group["params"] if kernel.ndim > 2]
            flat = [parameter for parameter in group["params"] if parameter.ndim == 2]
            matrices.append({**group, "params": [*flat, *(matrix for _, matrix in kernels)]})
            self.kernels += kernels
        super().__init__(matrices, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for kernel, matrix in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        moves = []
        for group in self.param_groups:
            stacks: dict[tuple, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    stacks.setdefault((*sorted(matrix.shape), matrix.device), []).append(matrix)
            for (rows, columns, _), matrices in stacks.items():
                at_once = max(1, STACK // (rows * columns))
                for first in range(0, len(matrices), at_once):
                    stack = matrices[first : first + at_once]
                    moves.append((stack, group, *self.directions(stack, group)))
        for stack, group, directions, arrival in moves:
            if arrival is not None:
                arrival.wait()
            move(stack, group, directions)

    def directions(
        self, matrices: Sequence[nn.Parameter], group: dict[str, Any]
    ) -> tuple[Tensor, dist.Work | None]:
        """The update directions of matrices of one shape, some of them transposed.

        Returns:
            (count, rows, columns) in bfloat16, no more rows than columns; complete once the other processes'
            part has arrived.
        """
        averages = [wide(self.momentum(matrix, group["momentum"])) for matrix in matrices]
        return begin_directions(averages, group["ns_coefficients"], group["ns_steps"], group["eps"])

    def momentum(self, matrix: nn.Parameter, share: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - share)
        return matrix.grad.lerp(average, share)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kernel, _ in self.kernels:
            kernel.grad = None


def begin_directions(
    averages: Sequence[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> tuple[Tensor, dist.Work | None]:
    """The orthogonalised `averages`, of one shape, which all processes have alike: each works out its share.

    Returns:
        (count, rows, columns) in bfloat16, complete once the other processes' part has arrived.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalise(torch.stack([*averages]), coefficients, steps, eps), None
    share = -(-len(averages) // world)
    first = dist.get_rank() * share
    own = averages[0].new_zeros(share, *averages[0].shape, dtype=torch.bfloat16)
    if mine := averages[first : first + share]:
        own[: len(mine)] = orthogonalise(torch.stack([*mine]), coefficients, steps, eps)
    everyone = own.new_empty(share * world, *own.shape[1:])
    as_bytes = (each.view(torch.uint8) for each in (everyone, own))  # which every backend can send
    arrival = dist.all_gather_into_tensor(*as_bytes, async_op=True)
    return everyone[: len(averages)], arrival


def move(matrices: Sequence[nn.Parameter], group: dict[str, Any], directions: Tensor) -> None:
    """Updates matrices of one shape, some of them transposed."""
    rate = rate_of(group["lr"], matrices[0].shape)
    for matrix, direction in zip(matrices, directions, strict=True):
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(direction if matrix.shape == direction.shape else direction.T, alpha=-rate)


def rate_of(lr: float, shape: Sequence[int]) -> float:
    """The factor of a direction that makes Muon's steps as large as AdamW's (2502.16982)."""
    return 0.2 * lr * max(shape) ** 0.5


def wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalise(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iteration (kellerjordan.github.io/posts/muon): singular values near 1.

    In bfloat16 where the hardware multiplies it; elsewhere float32 is several times faster than emulation.

    Args:
        matrices: (count, rows, columns), no more rows than columns.

    Returns:
        the same shape, in bfloat16.
    """
    a, b, c = coefficients
    x = matrices.to(choose_precision("auto", matrices.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.bfloat16()


def as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    matrix = nn.Parameter(kernel.detach().flatten(1))
    if matrix.data_ptr() != kernel.data_ptr():
        raise ValueError(
            f"a kernel of shape {tuple(kernel.shape)} and strides {kernel.stride()} cannot be seen as a "
            "matrix; keep its weights contiguous"
        )
    return matrix
