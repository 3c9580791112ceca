"""What it costs to share the cores: steps of a small model, alone and beside other programs.

    python benchmarks/busy_cores.py

PyTorch's threads (GNU OpenMP) spin while they wait for each other, by default for long. When another
program holds one of the cores, that time is lost at every operation. Compares settings of GOMP_SPINCOUNT
(turns before they sleep) and others, alone and beside two such programs, one with a single thread, as a
training run with its data worker would be. Median milliseconds per step; settings alternate. Three minutes
on 2 cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from mmvit.errors import run_script

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8, help="of a measurement (%(default)s)")
    parser.add_argument("--measure", action="store_true", help="once, in this process (for this script)")
    options = parser.parse_args()
    if options.measure:
        print(measure(options.seconds))
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for name, settings in SETTINGS.items():
            found.setdefault((name, False), []).append(
                float(start(settings, options.seconds).communicate()[0])
            )
        neighbours = start({}, 1e9), start({"OMP_NUM_THREADS": "1"}, 1e9)
        time.sleep(6)  # until they have imported torch
        for name, settings in SETTINGS.items():
            found.setdefault((name, True), []).append(
                float(start(settings, options.seconds).communicate()[0])
            )
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    print("| | alone, ms | beside other programs, ms |\n|---|---|---|")
    for name in SETTINGS:
        alone, beside = (statistics.median(found[name, busy]) for busy in (False, True))
        print(f"| {name} | {alone:.0f} | {beside:.0f} |")


def start(settings: dict[str, str], seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
    return subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)


def measure(seconds: float) -> float:
    """Median milliseconds of a training step of twelve MLPs of width 96 on 3,200 tokens, in bfloat16."""
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96)) for _ in range(12)
    )
    model, x, times = nn.Sequential(*blocks), torch.randn(64, 50, 96), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    run_script(main)
