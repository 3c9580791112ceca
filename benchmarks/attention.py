"""Which attention kernel trains and decodes faster here, the fused one or plain products? Prints a table.

    python benchmarks/attention.py

`mmvit.core.attention.PLAIN_UP_TO` comes from it. Kernels alternate within each repetition; medians of
forward and backward.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from mmvit.core.attention import attend

LENGTHS, HEADS, HEAD_DIM, TOKENS = (64, 128, 256, 512, 1024), 6, 64, 16384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"attention, forward + backward, bfloat16, {TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, {name}"
    )
    for column in ("tokens in a sequence", "plain, ms", "fused, ms", "fused / plain"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        times = measure(length, device, options.repetitions)
        plain, fused = (1000 * statistics.median(times[kernel]) for kernel in ("plain", "sdpa"))
        table.add_row(str(length), f"{plain:.1f}", f"{fused:.1f}", f"{fused / plain:.2f}")
    Console().print(table)


def measure(length: int, device: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition, by kernel; a first one warms up and is left out."""
    torch.manual_seed(0)
    shape = (TOKENS // length, HEADS, length, HEAD_DIM)
    query, key, value = (
        torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn(shape, dtype=torch.bfloat16, device=device)
    times: dict[str, list[float]] = {"plain": [], "sdpa": []}
    for repetition in range(repetitions + 1):
        for kernel, seconds in times.items():
            start = time.perf_counter()
            attend(query, key, value, None, is_causal=True, kernel=kernel).backward(gradient)
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition:
                seconds.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
