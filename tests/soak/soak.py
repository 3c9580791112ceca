"""Does harm to mmvit for half an hour, and prints one table of what was tried and what was held.

    make soak
    python tests/soak/soak.py --share 0.1 --seed 1 --only kills disks

Runs are killed, their files damaged, their disks filled; samples, shards and folders of models are mutated.
A run is held if, once resumed, it ends as an uninterrupted one, bit for bit; bad input, if it is counted or
refused in one line. Two hosts without a shared disk are parted and must go on (`hosts.py`; needs root).
`--share` takes that share of all other tries. The code is 1 if anything was not held.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import damage
import hosts
import kills
from runs import KINDS, Tally, prepare

FUZZED = 100_000
NAMES = {"ddp": "DDP", "zero2": "ZeRO 2", "zero3": "ZeRO 3"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["kills", "damage", "disks", "company", "hosts", "fuzz"])
    options = parser.parse_args()
    began = time.monotonic()
    fuzzer = start_fuzzer(options) if "fuzz" in options.only else None
    tallies: dict[str, Tally] = {}
    if {*options.only} - {"fuzz", "hosts"}:
        with tempfile.TemporaryDirectory(prefix="mmvit-soak-") as folder:
            data = Path(folder)
            prepare(data)
            wholes = kills.whole_runs(data)
            for name, number, harm in harms(data, wholes, random.Random(options.seed), options.only):
                found = harm(max(1, round(number * options.share)))
                print(f"{name}: {found.tried} tried, {len(found.failures)} not held", flush=True)
                before = tallies.get(name, Tally())
                tallies[name] = Tally(before.tried + found.tried, before.failures + found.failures)
    if "hosts" in options.only:
        tallies |= hosts.soak()
    if fuzzer:
        tallies |= fuzzed(fuzzer)
    print(f"\n| harm | tried | held |\n|---|---|---|\n{rows(tallies)}")
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes, seed {options.seed}")
    sys.exit(any(tally.failures for tally in tallies.values()))


def harms(
    data: Path, wholes: dict, rng: random.Random, only: list[str]
) -> list[tuple[str, int, Callable[[int], Tally]]]:
    """Each harm with how often it is done and what does it."""
    every: list[tuple[str, str, int, Callable[[int], Tally]]] = []

    def add(group: str, name: str, number: int, harm: Callable[..., Tally], *arguments: str) -> None:
        every.append((group, name, number, lambda number: harm(data, wholes, *arguments, number, rng)))

    for mode, number in {"alone": 40, "ddp": 10, "zero2": 4, "zero3": 4}.items():
        where = "one process" if mode == "alone" else f"two processes under {NAMES[mode]}"
        for kind in KINDS:
            if (kind, mode) not in kills.REFUSED:
                lines = 2 * number if mode == "alone" else number
                add("kills", f"{where} killed at random moments", number, kills.at_random, kind, mode)
                add("kills", f"{where} killed at a line of saving", lines, kills.at_lines, kind, mode)
    every.sort(key=lambda harm: "line" in harm[1])
    add("kills", "one of two ranks killed", 10, kills.of_one, "ranks")
    add("kills", "one of two data workers killed", 20, kills.of_one, "workers")
    for what, name in {"flips": "a flipped bit in", "cuts": "a cut or lost file of"}.items():
        add("damage", f"{name} the newest checkpoint", 150, damage.of_files, "alone", what)
        add("damage", f"{name} the newest checkpoint under ZeRO 2", 5, damage.of_files, "zero2", what)
    add("damage", "noise in metrics.jsonl", 40, damage.of_metrics)
    add("disks", "a disk that is full or read-only", 60, damage.of_disks)
    add("company", "two runs in one folder", 30, damage.of_company)
    return [(name, number, harm) for group, name, number, harm in every if group in only]


def start_fuzzer(options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--json"]
    command += ["--number", str(max(100, round(FUZZED * options.share))), "--seed", str(options.seed)]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)


def fuzzed(fuzzer: subprocess.Popen[str]) -> dict[str, Tally]:
    """The tallies that the fuzzer prints as its last line."""
    lines = fuzzer.communicate()[0].splitlines()
    found = json.loads(lines[-1])
    for failure in [failure for own in found.values() for failure in own["failures"]]:
        print(f"NOT HELD: {failure}", flush=True)
    return {f"mutated {name}": Tally(own["tried"], own["failures"]) for name, own in found.items()}


def rows(tallies: dict[str, Tally]) -> str:
    return "\n".join(
        f"| {name} | {tally.tried:,} | {tally.tried - len(tally.failures):,} |"
        for name, tally in tallies.items()
    )


if __name__ == "__main__":
    main()
