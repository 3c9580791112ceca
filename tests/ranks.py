"""Runs a script in two processes as torchrun does, forked from one that has imported all: that spares seconds
of each. tests/test_docs.py uses the launchers themselves."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch

from mmvit.training.distributed import free_port

GRACE = 20  # seconds for a process to end by itself after another has failed
ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "deepspeed",
        "pytest",
        "mmvit.cli",
        "mmvit.recipes.launch",
        "mmvit.evaluation.accuracy",
        "kornia",
        "matplotlib.figure",
    ]
)


@dataclass
class Ended:
    """How the processes ended (1 if any failed, as torchrun does) and what both printed."""

    returncode: int
    stdout: str
    stderr: str


def start_two(script: str | Path, *arguments: object, timeout: float = 240) -> Ended:
    """Runs a script in two processes; when one fails, the other is told to stop."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        launched = [
            SERVER.Process(target=run_rank, args=(ROOT / script, arguments, rank, port, outputs))
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


def run_rank(script: Path, arguments: tuple, rank: int, port: int, outputs: list[Path]) -> None:
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as usual
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = [str(script), *map(str, arguments)]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
