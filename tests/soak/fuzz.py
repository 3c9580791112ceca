"""A fuzzer: damages valid samples, shards, folders of images and folders of models, and reads them.

    python tests/soak/fuzz.py --number 1000 --seed 0            # each of the four kinds in its share
    python tests/soak/fuzz.py --what models --only 12 --seed 0  # input 12 again, with its traceback

Every input must end in a `UserError`, a counted bad sample, or a value; within 20 seconds of CPU time and
1 GiB of memory; with delivered + skipped = read; and with no file but its own. A seed repeats the inputs
exactly. Those that did harm are written to a folder.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inputs import Files, Kind, kinds, put

from mmvit.errors import UserError

MOST_SECONDS = 20  # of CPU time for an input
MOST_WAITING = 120  # seconds without an answer, for one that waits for something
MOST_MEMORY = 2**30
MOST_ADDRESSES = 2**33  # far beyond that: memory that is asked for and not used does no harm
INPUTS_A_PROCESS = 1000
SHARES = {"samples": 0.8, "shards": 0.15, "sources": 0.01, "models": 0.04}


def fuzz(what: str, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """Reads `number` damaged inputs of the kind `what`: how many were `tried`, how many `held`, and
    `failures`, each as text with the place of its input, in `folder`."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    kind, failures, first = kinds(folder)[what], [], 0
    kind.build(random.Random(0))  # what is valid is made once, here
    before = listing(folder)
    while first < number:
        last = min(number, first + INPUTS_A_PROCESS)
        for done, failure in answers(kind, what, range(first, last), seed, folder):
            first = done + 1
            if failure:
                place = folder / "failures" / f"{what}-{seed}-{done}"
                kept = save(kind, what, done, seed, place)
                failures.append(f"{what} {done} of seed {seed} ({place}{kept}): {failure}")
    if left := listing(folder) - before:
        failures.append(f"{what} of seed {seed}: files were written outside: {sorted(left)[:5]}")
    return {"tried": number, "held": number - len(failures), "failures": failures}


def answers(
    kind: Kind, what: str, numbers: range, seed: int, folder: Path
) -> Iterator[tuple[int, str | None]]:
    """(number, failure or None) of each input, up to one that ends its process."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(kind, what, numbers, seed, folder, theirs))
    process.start()
    theirs.close()
    try:
        for number in numbers:
            if not mine.poll(MOST_WAITING):
                yield number, f"no answer within {MOST_WAITING} seconds"
                return
            try:
                yield number, mine.recv()
            except EOFError:
                process.join()
                ended = signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode
                why = f" (more than {MOST_SECONDS} seconds)" if ended == "SIGPROF" else ""
                yield number, f"its process ended: {ended}{why}"
                return
    finally:
        process.kill()
        process.join()
        mine.close()


def work(kind: Kind, what: str, numbers: range, seed: int, folder: Path, answer: Any) -> None:
    """Runs in a process of its own, which may be killed."""
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_ADDRESSES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends even what is busy in C
    with tempfile.TemporaryDirectory(dir=folder, prefix="case-") as place:
        os.chdir(place)
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            answer.send(try_input(kind, what, number, seed, Path(place) / str(number)))
    os._exit(0)


def try_input(kind: Kind, what: str, number: int, seed: int, place: Path) -> str | None:
    """What harm an input does; None if none."""
    before = memory()
    try:
        read(kind, what, number, seed, place)
    except UserError:
        pass
    except BaseException as error:
        raised = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in raised if "/mmvit/" in frame.filename or "/pipelines/" in frame.filename]
        where = (ours or raised)[-1]
        return f"{type(error).__name__}: {error!s:.150} ({Path(where.filename).name}:{where.lineno})"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if (more := memory() - before) > MOST_MEMORY:
        return f"took {more / 2**20:,.0f} MiB"
    return None


def read(kind: Kind, what: str, number: int, seed: int, place: Path) -> None:
    files, rng = damaged(kind, what, number, seed)
    if not kind.in_memory:
        in_folder = place if what == "shards" else place / "source"
        put(files, in_folder)
        before = listing(place.parent)
    with contextlib.redirect_stdout(io.StringIO()):
        kind.read(files, place, rng)
    if not kind.in_memory and (left := listing(place.parent) - before):
        raise AssertionError(f"files were written outside: {sorted(left)[:5]}")


def damaged(kind: Kind, what: str, number: int, seed: int) -> tuple[Files, random.Random]:
    rng = random.Random(f"{seed} {what} {number}")
    return kind.build(rng), rng


def save(kind: Kind, what: str, number: int, seed: int, place: Path) -> str:
    shutil.rmtree(place, ignore_errors=True)
    try:
        put(damaged(kind, what, number, seed)[0], place)
    except (OSError, ValueError) as error:
        return f", not saved: {error}"
    return ""


def listing(folder: Path) -> set[str]:
    """What lies in a folder, and beside it."""
    return {name for name in os.listdir(folder) if not name.startswith(("case-", "cache", "failures"))}


def memory() -> int:
    """The most memory that this process has had since the last call, in bytes."""
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    with contextlib.suppress(OSError):  # else it is the most since the start, which only grows
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--number", type=int, default=1000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", choices=SHARES, help="one kind alone")
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--folder", type=Path, help="where the inputs that did harm are kept")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON for soak.py")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"seed {options.seed}, in {folder}")
    if options.only is not None:
        what = options.what or "samples"
        read(kinds(folder)[what], what, options.only, options.seed, folder / "only" / "input")
        return
    tallies = {}
    for what, share in SHARES.items():
        if options.what not in (None, what):
            continue
        number = options.number if options.what else round(options.number * share)
        began = time.monotonic()
        tallies[what] = found = fuzz(what, number, options.seed, folder)
        print(
            f"{what}: {found['held']:,} of {found['tried']:,} held, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    harm = [failure for found in tallies.values() for failure in found["failures"]]
    print("\n".join(harm))
    if options.json:
        print(json.dumps(tallies))
    sys.exit(bool(harm))


if __name__ == "__main__":
    main()
