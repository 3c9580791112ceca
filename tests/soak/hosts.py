"""Two hosts without a common disk train together, are parted, differ, and go on: as one run, bit for bit. On
one machine, the commands for two nodes in docs/, with scripts that stand in for Slurm.

    python tests/soak/hosts.py
    python tests/soak/hosts.py --only torchrun zero3

Needs root on Linux; DeepSpeed's hostfile needs pdsh, ssh and sshd, too. 12 minutes of one core.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from threading import Thread

import matplotlib
from network import DISK, ENVIRONMENT, Host, serve_ssh, two_hosts, why_not
from PIL import Image
from runs import COLOURS, CORE, KINDS, ROOT, Tally, difference, files_differ, write_images
from slurm import job_script, run_job

from mmvit.training.distributed import free_port

TIMEOUT = 15  # seconds, train.timeout
TO_TELL = 15  # seconds after it in which all ends have said so
TO_END = 60  # seconds for all processes to have ended, on a machine that is busy
PATIENCE = 300  # seconds until a run that should have ended counts as hanging
TRAIN = f"""
    [train]
    steps = 40
    batch_size = 8
    num_workers = 0
    log_every = 4
    evaluate_every = 20
    checkpoint_every = 4
    keep_checkpoints = 2
    precision = "fp32"
    ema_decay = 0
    timeout = {TIMEOUT}
    [optimizer]
    name = "adamw"
"""
CUT_AT = 8  # step
DEEPSPEED = ("deepspeed", "--hostfile", DISK / "hostfile", "--module")
TRAINS = ("mmvit", "train", DISK / "recipe.toml")
Programs = list[Popen]
Launch = Callable[..., Programs]


class Launched:
    """What was started on the hosts, and what it prints, with the time of each line."""

    def __init__(self, programs: Programs):
        self.programs = programs
        self.lines: list[list[tuple[float, str]]] = [[] for _ in programs]
        self.readers = [Thread(target=self.read, args=(n,), daemon=True) for n in range(len(programs))]
        for reader in self.readers:
            reader.start()

    def read(self, number: int) -> None:
        for line in self.programs[number].stdout:
            self.lines[number].append((time.monotonic(), line.rstrip()))

    def end(self, patience: float = PATIENCE) -> list[int] | None:
        """The exit codes; None if a program hangs."""
        until = time.monotonic() + patience
        try:
            codes = [program.wait(max(0.1, until - time.monotonic())) for program in self.programs]
        except TimeoutExpired:
            return None
        for reader in self.readers:
            reader.join()
        return codes

    def errors(self) -> list[tuple[float, str]]:
        return [(moment, line) for lines in self.lines for moment, line in lines if "error: " in line]

    def said(self) -> str:
        return "\n".join(line for lines in self.lines for _, line in lines)


def torchrun(hosts: list[Host], *settings: object, rendezvous: str = "static") -> Programs:
    """As in docs/clusters.md: one command on each host."""
    place = ("--master_addr", hosts[0].name, "--master_port", 29500)
    if rendezvous == "c10d":
        place = ("--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"{hosts[0].name}:29400")
    return [
        host.start(
            *("torchrun", "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, *place),
            *("-m", *TRAINS, *settings),
        )
        for rank, host in enumerate(hosts)
    ]


def hostfile(hosts: list[Host], *settings: object) -> Programs:
    """One command on the first host, which logs in to both."""
    alive = "-o ServerAliveInterval=5"  # or ssh would wait for a host that is cut off
    return [hosts[0].start(*DEEPSPEED, *TRAINS, *settings, PDSH_SSH_ARGS_APPEND=alive)]


def without_ssh(hosts: list[Host], *settings: object) -> Programs:
    """DeepSpeed's launcher on each host."""
    return [
        host.start(
            *(*DEEPSPEED, "--no_ssh", "--node_rank", rank, "--master_addr", hosts[0].name),
            *(*TRAINS, *settings),
        )
        for rank, host in enumerate(hosts)
    ]


def prepare(hosts: list[Host]) -> None:
    """Gives each host a copy of the data, the recipe, and what DeepSpeed's launcher reads."""
    text = KINDS["classifier"].format(data=f"{DISK}/data", root=ROOT, core=CORE) + TRAIN
    for host in hosts:
        write_images(host.disk / "data" / "images")
        (host.disk / "recipe.toml").write_text("\n".join(line.strip() for line in text.splitlines()))
        (host.disk / "hostfile").write_text("".join(f"{each.name} slots=1\n" for each in hosts))
        own = [f"{name}={DISK}/{folder}" for name, folder in (("HOME", "home"), ("TMPDIR", "tmp"))]
        own += [f"XDG_CACHE_HOME={DISK}/cache", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
        (host.disk / "home" / ".deepspeed_env").write_text("\n".join(own) + "\n")
        shutil.copytree(matplotlib.get_cachedir(), host.disk / "cache" / "matplotlib")  # fonts, for curves


def trained(hosts: list[Host], launch: Launch, *settings: object) -> str:
    """What went wrong with a run that should reach its end; "" if nothing."""
    launched = Launched(launch(hosts, *settings))
    codes = launched.end()
    if codes is None or any(codes):
        return f"ended with {codes}: {launched.said()[-3000:]}"
    return left_behind(hosts, time.monotonic() + 10)


def left_behind(hosts: list[Host], until: float = 0) -> str:
    """Processes that are still there at the time `until`, which ends them, and what a run has written on the
    host that has not rank 0."""
    while any(host.processes() for host in hosts) and time.monotonic() < until:
        time.sleep(0.5)
    if running := {host.name: found for host in hosts if (found := host.processes())}:
        for host in hosts:
            host.kill_all()
        return f"there still runs {running}"
    written = [str(path.relative_to(hosts[-1].disk)) for path in (hosts[-1].disk / "work").rglob("*")]
    return f"{hosts[-1].name} has {written}" if len(hosts) > 1 and written else ""


def parted(hosts: list[Host], victim: Host, launch: Launch, output: str, *settings: object) -> str:
    """Pulls the cable out of one host in the middle of a run, and says what is wrong with its end."""
    reached = hosts[0].disk / "work" / output / "checkpoints" / f"step-{CUT_AT:08d}"
    launched = Launched(launch(hosts, "--output", output, *settings))
    until = time.monotonic() + PATIENCE
    while not reached.exists():
        if time.monotonic() > until or any(program.poll() is not None for program in launched.programs):
            return f"does not come to step {CUT_AT}: {launched.said()[-3000:]}"
        time.sleep(0.02)
    victim.cut()
    began = time.monotonic()
    try:
        codes = launched.end(TO_END)
        orphans = left_behind(hosts, began + TO_END)
        ended = time.monotonic() - began
    finally:
        victim.mend()
    told = {line: moment - began for moment, line in launched.errors()}
    print(
        *(f"  after {moment:.0f} s: {line}" for line, moment in told.items()),
        f"  ended after {ended:.0f} s",
        sep="\n",
    )
    if codes is None or 0 in codes:
        return f"cut off from the other host, ended with {codes}: {launched.said()[-3000:]}"
    wrong = [line for line in told if not re.search(r"rank 1 (\(process|has lost rank 0)", line)]
    if wrong or len(told) not in (1, 2) or max(told.values()) > TIMEOUT + TO_TELL:
        return f"says {told}: {launched.said()[-3000:]}"
    return orphans


def refused(hosts: list[Host], expected: str, *settings: object) -> str:
    """What is wrong with how a run that must not start says so."""
    launched = Launched(torchrun(hosts, *settings))
    codes, errors = launched.end(), [line for _, line in launched.errors()]
    if codes is None or 0 in codes or len(errors) != 1 or not re.search(expected, errors[0]):
        return f"ended with {codes}, expected {expected}: {errors or launched.said()[-3000:]}"
    print(f"  {errors[0]}")
    return left_behind(hosts[:1], time.monotonic() + 10)


def with_torchrun(hosts: list[Host]) -> Iterator[tuple[str, str]]:
    """What was tried, and what went wrong with it."""
    first, second = hosts
    work = first.disk / "work"
    yield "trains", trained(hosts, torchrun, "--output", "whole")

    def by_c10d(*arguments: object) -> Programs:  # whose torchrun would hang on a host that is cut off
        return torchrun(*arguments, rendezvous="c10d")

    for victim, launch in ((second, by_c10d), (first, torchrun)):
        yield f"{victim.name} is cut off", parted(hosts, victim, torchrun, f"cut-{victim.name}")
        problem = trained(hosts, launch, "--output", f"cut-{victim.name}", "--resume")
        yield "goes on", problem or difference(work / "whole", work / f"cut-{victim.name}")


def refusals(hosts: list[Host]) -> Iterator[tuple[str, str]]:
    first, second = hosts
    run, theirs = ("--output", "run"), second.disk / "work" / "run" / "checkpoints"
    yield "trains", trained(hosts, torchrun, *run, "--train.steps", 8)
    ours = first.disk / "work" / "run" / "checkpoints" / "step-00000008"
    go_on = (*run, "--resume")
    shutil.copytree(ours, theirs / "step-00000004")
    seen = r"rank 1 on host-b in /srv/work/run/checkpoints has"
    yield "older checkpoints", refused(hosts, f"{seen} step-00000004, and rank 0", *go_on)
    (theirs / "step-00000004").rename(theirs / ours.name)
    (theirs / ours.name / "manifest.json").write_text("{}")
    yield "another checkpoint", refused(hosts, f"{seen} a {ours.name} of content", *go_on)
    shutil.rmtree(theirs.parent)
    (lost := second.disk / "data" / "images" / "train-000004.tar").rename(second.disk / "kept")
    yield (
        "a shard less",
        refused(hosts, r"data\.train is 4 shards.* for rank 1 on host-b, and 5 shards", *go_on),
    )
    (second.disk / "kept").rename(lost)
    recipe = second.disk / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text.replace("[model]", "[model]\npooling = 'mean'"))
    yield (
        "another recipe",
        refused(hosts, r"model\.pooling is mean for rank 1 on host-b, and \w+ for", *go_on),
    )
    recipe.write_text(text)
    script = second.disk / "checkout" / "mmvit" / "core" / "norm.py"
    code = script.read_text()
    script.write_text(f"{code}\n")
    yield "another mmvit", refused(hosts, r"the content of mmvit is \w+ for rank 1 on host-b, and", *go_on)
    script.write_text(code)
    yield "goes on", trained(hosts, torchrun, *go_on)


def with_deepspeed(hosts: list[Host], mode: str) -> Iterator[tuple[str, str]]:
    work, zero = hosts[0].disk / "work", ("--deepspeed", mode)
    yield "trains", trained(hosts, hostfile, "--output", f"{mode}-whole", *zero)
    yield "host-b is cut off", parted(hosts, hosts[1], hostfile, f"{mode}-cut", *zero)
    problem = trained(hosts, without_ssh, "--output", f"{mode}-cut", *zero, "--resume")
    yield "goes on", problem or difference(work / f"{mode}-whole", work / f"{mode}-cut")


def packing(folder: Path) -> Iterator[tuple[str, str]]:
    """The commands of docs/many-gpus.md for two nodes, here on one machine, make what one process makes."""
    for number, (name, colour) in enumerate([*COLOURS.items()] * 10):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 30), colour).save(folder / "photos" / name / f"{number}.png")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}

    def started(*words: str) -> Popen[str]:
        return Popen(words, cwd=folder, env=environment, stdout=PIPE, stderr=STDOUT, text=True)

    page = (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")
    for line in re.findall(r"^torchrun --nnodes 2 --node_rank 0 (.*)", page, re.MULTILINE):
        line = line.replace("node1", "127.0.0.1").replace("29500", str(free_port()))
        options, command = line.replace("s3://bucket/photos", "data/photos").split(" -m mmvit ")
        *words, made = command.replace("shards ", "shards --samples-per-shard 6 ").split()
        nodes = [("torchrun", "--nnodes", "2", "--node_rank", node, *options.split(), "-m") for node in "01"]
        launched = Launched([started(*node, "mmvit", *words, made) for node in nodes])
        codes = launched.end() or [1]
        alone = started("mmvit", *words, f"{made}-alone")
        said = launched.said() + alone.communicate()[0]
        is_well = not any((*codes, alone.returncode))
        yield command, files_differ(folder / made, folder / f"{made}-alone") if is_well else said


def with_slurm(folder: Path) -> Iterator[tuple[str, str]]:
    """The job script of docs/clusters.md, on this machine."""
    write_images(folder / "images")
    text = KINDS["classifier"].format(data=folder, root=ROOT, core=CORE) + TRAIN
    (folder / "recipe.toml").write_text("\n".join(line.strip() for line in text.splitlines()))
    environment = {name: ENVIRONMENT[name] for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    environment["PYTHONPATH"] = str(ROOT)

    def job(name: str, at: Callable[[], bool] | None = None) -> str:
        script = job_script().replace("fashion_mnist", "recipe.toml").replace("runs/fashion", name)
        code, output = run_job(folder, script, at, **environment)
        queued = (folder / "scontrol.txt").exists()
        saved = "SIGUSR1: saved at step" in output
        is_well = (code != 0) == queued == saved == bool(at)
        return "" if is_well else f"ends with {code}: {output[-3000:]}"

    yield "a job of Slurm", job("whole")
    reached = folder / "cut" / "checkpoints" / f"step-{CUT_AT:08d}"
    yield "is warned, saves and is queued again", job("cut", reached.exists)
    (folder / "scontrol.txt").unlink(missing_ok=True)
    yield "goes on", job("cut") or difference(folder / "whole", folder / "cut")


def tries(parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The part, what was tried, and what went wrong with it; says aloud what this machine cannot try."""
    for part in [part for part in parts if part in ALONE]:
        with tempfile.TemporaryDirectory(prefix="mmvit-nodes-") as folder:
            yield from ((f"two nodes, {part}", *each) for each in ALONE[part](Path(folder)))
    parts = [part for part in parts if part in PARTS]
    if not parts:
        return
    if reason := why_not():
        print(f"SKIPPED: two hosts, {', '.join(parts)}: {reason}", flush=True)
        return
    if missing := [name for name in ("pdsh", "ssh", "sshd") if not shutil.which(name)]:
        parts = [part for part in parts if part not in ("zero2", "zero3")]
        print(f"SKIPPED: two hosts, zero2 and zero3: no {', '.join(missing)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mmvit-hosts-") as folder, two_hosts(Path(folder)) as hosts:
        prepare(hosts)
        if not missing:
            serve_ssh(hosts)
        for part in parts:
            found = PARTS[part](hosts)
            yield from ((f"two hosts, {part}", *each) for each in found)


ALONE = {"packing": packing, "slurm": with_slurm}  # on this machine
PARTS = {
    "torchrun": with_torchrun,
    "refusals": refusals,
    "zero2": partial(with_deepspeed, mode="zero2"),
    "zero3": partial(with_deepspeed, mode="zero3"),
}


EVERY = [*ALONE, *PARTS]


def soak(parts: Sequence[str] = EVERY) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for part, name, problem in tries(parts):
        print(f"{part}: {name}", flush=True)
        tallies.setdefault(part, Tally()).check(problem and f"{part}, {name}: {problem}")
    return tallies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=EVERY, choices=EVERY)
    found = soak(parser.parse_args().only)
    sys.exit(not found or any(tally.failures for tally in found.values()))
