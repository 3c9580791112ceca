"""Kills of runs, ranks and data workers, at random moments and at every line of saving and exporting."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runs import CHILD_ENDS, KINDS, MODES, Job, Tally, go_on

import mmvit

WATCHED = tuple(
    str(Path(mmvit.__file__).parent / name)
    for name in (
        "training/checkpoint.py",
        "training/disk.py",
        "training/resume.py",
        "training/run.py",
        "hub.py",
    )
)
REFUSED = [("joint", "zero3")]  # mmvit does not train these
ENDS_WITHIN = 30  # seconds, for the ranks beside a killed one


def at_random(data: Path, wholes: dict, kind: str, mode: str, number: int, rng: random.Random) -> Tally:
    """Kills all processes at once, up to three times in a run, and resumes."""
    tally, output = Tally(), data / "killed"
    whole, seconds = wholes[kind, mode]
    for _ in range(number):
        shutil.rmtree(output, ignore_errors=True)
        moments = []
        for _ in range(rng.randint(1, 3)):
            job = Job(data, kind, mode, output, *(("--resume",) if output.is_dir() else ()))
            moments.append(round(rng.uniform(0, seconds), 3))
            time.sleep(moments[-1])
            job.kill()
            job.wait()
        problem = go_on(whole, data, kind, mode, output)
        tally.check(problem and f"{kind}, {mode}, killed after {moments} s: {problem}")
    return tally


def at_lines(data: Path, wholes: dict, kind: str, mode: str, number: int, rng: random.Random) -> Tally:
    """Kills rank 0 where it is about to run one of the lines of saving and exporting; then the others."""
    tally, output, counted = Tally(), data / "cut", data / "lines"
    shutil.rmtree(output, ignore_errors=True)
    Job(data, kind, mode, output, before=lambda rank: rank or count_lines(counted)).wait()
    lines = int(counted.read_text())
    for line in sorted(rng.sample(range(1, lines + 1), min(number, lines))):
        shutil.rmtree(output, ignore_errors=True)
        job = Job(data, kind, mode, output, before=lambda rank: rank or die_at(line))  # noqa: B023
        os.waitpid(job.pids[0], 0)
        job.codes[job.pids[0]] = -signal.SIGKILL
        job.kill()
        job.wait()
        whole = wholes[kind, mode][0]
        problem = half_written(whole, output) or go_on(whole, data, kind, mode, output)
        tally.check(problem and f"{kind}, {mode}, killed at line {line} of {lines}: {problem}")
    return tally


def half_written(whole: Path, output: Path) -> str:
    """Which export of a killed run is there in part; "" if each is there as a whole or not at all."""
    for name in ("last", "best"):
        files = {path.name: path.stat().st_size for path in (output / name).glob("*")}
        expected = {path.name: path.stat().st_size for path in (whole / name).glob("*")}
        if (output / name).exists() and files != expected:
            return f"{name}/ has {files}, not {expected}"
    return ""


def count_lines(path: Path) -> None:
    passed = watch(lambda number, frame: None)
    CHILD_ENDS.append(lambda: path.write_text(str(passed[0])))


def die_at(line: int) -> None:
    def look(number: int, frame: object) -> None:
        if number == line:
            print("killed at", frame.f_code.co_filename, frame.f_lineno, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    watch(look)


def watch(look: Callable[[int, object], None]) -> list[int]:
    """Calls `look(number, frame)` at every line of the watched files; returns the count, which goes on."""
    passed = [0]

    def trace(frame, event, argument):
        if event == "call":
            return trace if frame.f_code.co_filename in WATCHED else None
        if event == "line":
            passed[0] += 1
            look(passed[0], frame)
        return trace

    sys.settrace(trace)
    return passed


def of_one(data: Path, wholes: dict, what: str, number: int, rng: random.Random) -> Tally:
    """Kills one of two `ranks`, or one of two data `workers`; the others must end by themselves."""
    tally, output = Tally(), data / "one"
    waits = ("--train.timeout", ENDS_WITHIN / 3)  # for a rank that is killed before the two have met
    mode, settings = ("ddp", waits) if what == "ranks" else ("alone", ("--train.num_workers", 2))
    kind = "classifier"
    whole, seconds = wholes[kind, mode]
    for _ in range(number):
        shutil.rmtree(output, ignore_errors=True)
        job = Job(data, kind, mode, output, *settings)
        moment = rng.uniform(0, 1.2 * seconds)
        time.sleep(moment)
        victims = job.pids if what == "ranks" else children(job.pids[0])
        if victims:
            victim = rng.choice(victims)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if job.wait(ENDS_WITHIN) is None:
            tally.check(
                f"one of the {what} killed after {moment:.3f} s: the others still run {ENDS_WITHIN} s later"
            )
            continue
        problem = go_on(whole, data, kind, mode, output, *settings)
        tally.check(problem and f"one of the {what} killed after {moment:.3f} s: {problem}")
    return tally


def children(pid: int) -> list[int]:
    try:
        return [int(own) for own in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def whole_runs(data: Path) -> dict[tuple[str, str], tuple[Path, float]]:
    """An uninterrupted run of each kind in each mode, and the seconds it took."""
    found = {}
    for kind in KINDS:
        for mode in MODES:
            if (kind, mode) in REFUSED:
                continue
            job = Job(data, kind, mode, data / f"{kind}-{mode}", "--train.keep_checkpoints", 3)
            if any(job.wait() or [1]):
                raise SystemExit(f"a {kind} under {mode} does not train: {job.said()}")
            found[kind, mode] = data / f"{kind}-{mode}", job.seconds
    return found
