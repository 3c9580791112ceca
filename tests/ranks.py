"""Runs a script or a function in a process of its own, or in two as torchrun does, forked from one that has
imported all: that spares seconds of each. tests/test_docs.py uses the launchers themselves."""

import atexit
import gc
import inspect
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Timer
from typing import TextIO

import torch

from mmvit.places import load_script
from mmvit.training import RunFolder
from mmvit.training.distributed import free_port

GRACE = 20  # seconds for a process to end by itself after another has failed
TO_END = 5  # seconds for a process to end those that it has started
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it all of torch.compile
        "pytest",
        "mmvit.cli",
        "mmvit.recipes.launch",
        "mmvit.evaluation.image_classifier",
        "mmvit.training.deepspeed_engine",
        "kornia",
        "matplotlib.figure",
    ]
)


@dataclass
class Ended:
    """How a process ended, or two of them (1 if any failed, as torchrun does), and all that was printed."""

    returncode: int
    stdout: str
    stderr: str


def start_two(script: str | Path, *arguments: object, timeout: float = 240) -> Ended:
    """Runs a script in two processes, in the environment of this one; when one fails, the other is told to
    stop."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        launched = [
            SERVER.Process(
                target=run_rank, args=(ROOT / script, arguments, rank, port, dict(os.environ), outputs)
            )
            for port in [free_port()]
            for rank in range(2)
        ]
        for process in launched:
            process.start()
        wait([process.sentinel for process in launched], timeout)
        is_well = all(process.exitcode == 0 for process in launched if process.exitcode is not None)
        for process in launched:
            process.join(timeout if is_well else GRACE)
            process.terminate()
        texts = [output.read_text(errors="replace") for output in outputs]
        return Ended(int(any(process.exitcode for process in launched)), *texts)


def run_rank(
    script: Path,
    arguments: tuple,
    rank: int,
    port: int,
    environment: dict[str, str],
    outputs: list[Path],
) -> None:
    print_to(*(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for output in outputs))
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    os.chdir(ROOT)
    run(script, arguments)


@dataclass
class Running:
    """A process, the leader of a group of its own, and what it prints, line by line."""

    process: BaseProcess
    lines: TextIO
    errors: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> Ended:
        """Waits for the end; `stdout` is what has not been read from `lines`."""
        stdout = self.lines.read()
        self.process.join()
        return Ended(self.process.exitcode, stdout, self.errors.read_text(errors="replace"))


def start_one(action: Callable | str | Path, *arguments: object, timeout: float = 60) -> Ended:
    """Runs a script, or a function of a module's top level, in a process; see `running`."""
    with running(action, *arguments, timeout=timeout) as one:
        return one.end()


@contextmanager
def running(action: Callable | str | Path, *arguments: object, timeout: float = 60) -> Iterator[Running]:
    """A process that runs a script or a function in the folder and environment of this one. It and what it
    has started are ended after `timeout` seconds, or at the end of the context."""
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = multiprocessing.Pipe(duplex=False)
        script, name = (inspect.getfile(action), action.__name__) if callable(action) else (action, None)
        errors = Path(folder, "stderr")
        errors.touch()
        process = SERVER.Process(
            target=run_one, args=(ROOT / script, name, arguments, dict(os.environ), writer, errors)
        )
        process.start()
        writer.close()

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which killpg cannot
            wait([process.sentinel], TO_END)
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = Timer(timeout, end)
        timer.start()
        try:
            with open(reader.fileno(), errors="replace", closefd=False) as lines:
                yield Running(process, lines, errors)
        finally:
            timer.cancel()
            end()
            process.join()
            reader.close()


def run_one(
    script: Path,
    name: str | None,
    arguments: tuple,
    environment: dict[str, str],
    stdout: Connection,
    errors: Path,
) -> None:
    os.setsid()
    print_to(stdout.fileno(), os.open(errors, os.O_WRONLY | os.O_APPEND))
    stdout.close()
    os.environ.clear()
    os.environ |= environment
    try:
        run(script, arguments, name)
    finally:
        atexit._run_exitfuncs()  # as at the end of Python, which multiprocessing leaves out


def print_to(*outputs: int) -> None:
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115


def run(script: Path, arguments: tuple, name: str | None = None) -> None:
    """Runs a script, or the function `name` of it: pytest's own name of a module is no name to import."""
    gc.freeze()  # or each collection would go through all that has been imported
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as usual
    torch.set_num_threads(1)
    RunFolder.draw_curves = lambda run: run.curves.touch()  # most of the time, as in conftest.py
    try:
        if name:
            getattr(load_script(str(script)), name)(*arguments)
        else:
            sys.argv = [str(script), *map(str, arguments)]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
