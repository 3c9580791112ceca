"""Damage to what a run has written, disks that are full or read-only, and two runs in one folder."""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

from runs import Job, Tally, go_on, metrics, told

NEWEST = "checkpoints/step-00000004"


def of_files(data: Path, wholes: dict, mode: str, what: str, number: int, rng: random.Random) -> Tally:
    """Flips a bit (`flips`) of a file of the newest checkpoint, or cuts it short (`cuts`), and resumes: from
    the checkpoint before it, to the end of an uninterrupted run."""
    tally, output, kind = Tally(), data / "damaged", "classifier"
    whole = wholes[kind, mode][0]
    for _ in range(number):
        take_back(whole, output)
        files = sorted(path for path in (output / NEWEST).rglob("*") if path.is_file())
        file = rng.choice([path for path in files if path.stat().st_size])
        content = bytearray(file.read_bytes())
        place = rng.randrange(len(content))
        if what == "flips":
            content[place] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        elif rng.random() < 0.2:
            file.unlink()
        else:
            os.truncate(file, place)
        problem = go_on(whole, data, kind, mode, output)
        tally.check(problem and f"{mode}, {what} at byte {place} of {file.relative_to(output)}: {problem}")
    return tally


def take_back(whole: Path, output: Path) -> None:
    """Makes `output` a copy of `whole` as it was after step 4, but for what was written later beside it."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints/step-00000006")


def of_metrics(data: Path, wholes: dict, number: int, rng: random.Random) -> Tally:
    """Noise in metrics.jsonl: the run goes on, and what is written from then on is right."""
    tally, output, kind = Tally(), data / "noise", "classifier"
    whole = wholes[kind, "alone"][0]
    for _ in range(number):
        take_back(whole, output)
        path = output / "metrics.jsonl"
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        path.write_bytes(content)
        job = Job(data, kind, "alone", output, "--resume")
        if (codes := job.wait()) != [0]:
            tally.check(f"noise at byte {place} of metrics.jsonl: ended with {codes}: {job.said()[-600:]}")
            continue
        last = [[line for line in metrics(run) if line["step"] > 4] for run in (whole, output)]
        tally.check(
            "" if last[0] == last[1] else f"noise at byte {place} of metrics.jsonl: later lines differ"
        )
    return tally


def of_disks(data: Path, wholes: dict, number: int, rng: random.Random) -> Tally:
    """A disk that is full at any point, or read-only: told in one line; the run goes on when it has space."""
    tally, kind = Tally(), "classifier"
    whole, disk = wholes[kind, "alone"][0], data / "disk"
    disk.mkdir(exist_ok=True)
    needed = sum(4096 + path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for turn in range(number):
        size = rng.randrange(8192, needed)
        if not mount(disk, size):
            print("this user may not mount file systems: disks are left out", flush=True)
            break
        try:
            output = disk / "run"
            if turn % 4:
                job = Job(data, kind, "alone", output)
                where = f"a full disk of {size} bytes"
                codes = job.wait()
                problem = "" if codes == [0] else told(job)
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            else:
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                take_back(whole, output)
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
                where, problem = "a read-only disk", told(Job(data, kind, "alone", output, "--resume"))
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            problem = problem or go_on(whole, data, kind, "alone", output)
            tally.check(problem and f"{where}: {problem}")
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    return tally


def mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


def of_company(data: Path, wholes: dict, number: int, rng: random.Random) -> Tally:
    """A second run in the folder of a first, at any moment: one is refused, and the other one is whole."""
    tally, output, kind = Tally(), data / "shared", "classifier"
    whole, seconds = wholes[kind, "alone"]
    for turn in range(number):
        shutil.rmtree(output, ignore_errors=True)
        first = Job(data, kind, "alone", output)
        moment = rng.uniform(0, seconds)
        time.sleep(moment)
        second = Job(data, kind, "alone", output, *(("--resume",) if turn % 2 else ()))
        ended = [first.wait(), second.wait()]
        said = first.said() + second.said()
        if ended[0] is None or ended[1] is None or "Traceback" in said or [0] not in ended:
            problem = f"they ended with {ended}: {said[-600:]}"
        else:
            problem = go_on(whole, data, kind, "alone", output)
        tally.check(problem and f"a second run after {moment:.3f} s: {problem}")
    return tally
