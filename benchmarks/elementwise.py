"""What a block costs besides matrix products, in bfloat16: dropout, rotation, activation, norm.

    python benchmarks/elementwise.py

Alternatives alternate in each repetition; medians of forward and backward. mmvit.core is written by them.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmvit.core.dropout import Dropout
from mmvit.core.norm import RMSNorm
from mmvit.core.positions import rotate

TOKENS, WIDTH, HEADS, HEAD_DIM, REPETITIONS = 64 * 80, 1024, 4, 64, 9


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16()
    heads = torch.randn(64, HEADS, 80, HEAD_DIM).bfloat16()
    angles = torch.rand(80, HEAD_DIM // 2)
    tables = (angles.cos(), angles.sin())
    weight, norm = torch.ones(WIDTH, dtype=torch.bfloat16), RMSNorm(WIDTH)
    groups = {
        "dropout 0.1": (
            hidden,
            {"F.dropout": lambda x: F.dropout(x, 0.1), "mmvit.core.dropout": Dropout(0.1)},
        ),
        "rotation": (
            heads,
            {
                "products, concatenation": lambda x: rotate_by_products(x, tables),
                "mmvit.core.positions": lambda x: rotate(x, tables),
            },
        ),
        "activation": (
            hidden,
            {
                "GELU, tanh form": lambda x: F.gelu(x, approximate="tanh"),
                "GELU, exact": F.gelu,
                "SiLU": F.silu,
            },
        ),
        "norm": (
            hidden,
            {
                "F.rms_norm": lambda x: F.rms_norm(x, (WIDTH,), weight),
                "mmvit.core.norm": norm,
                "F.layer_norm": lambda x: F.layer_norm(x, (WIDTH,), weight),
            },
        ),
    }
    table = Table(title=f"forward + backward, bfloat16, CPU with {torch.get_num_threads()} threads")
    for column in ("what", "how", "ms", "of the first"):
        table.add_column(column, justify="left" if column in ("what", "how") else "right")
    for name, (x, alternatives) in groups.items():
        times = measure(x, alternatives)
        first = next(iter(times.values()))
        for how, seconds in times.items():
            table.add_row(name, how, f"{1000 * seconds:.1f}", f"{seconds / first:.2f}")
    Console().print(table)


def rotate_by_products(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = (part.to(x.dtype) for part in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, first * sines + second * cosines], dim=-1)


def measure(x: Tensor, alternatives: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
    """Median seconds of each alternative; a first round warms up and is left out."""
    times: dict[str, list[float]] = {how: [] for how in alternatives}
    gradient = torch.randn_like(x)
    for repetition in range(REPETITIONS + 1):
        for how, function in alternatives.items():
            leaf = x.clone().requires_grad_(True)
            start = time.perf_counter()
            function(leaf).backward(gradient)
            if repetition:
                times[how].append(time.perf_counter() - start)
    return {how: statistics.median(seconds) for how, seconds in times.items()}


if __name__ == "__main__":
    main()
