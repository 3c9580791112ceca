"""Stands in for Slurm: runs the job script of docs/clusters.md, with srun, scontrol and scancel as scripts
that take this machine for two nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STANDS_IN = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do
            SLURM_NODEID=$node SLURM_PROCID=$node "$@" & echo $! >> tasks
        done
        code=0
        for task in $(cat tasks); do wait $task || code=$?; done
        rm tasks
        exit $code
    """,
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then
            printf '127.0.0.1\\nnode2\\n'
        else
            echo "$@" >> scontrol.txt
        fi
    """,
    "scancel": """
        [ "$*" = "--signal=USR1 4711" ] || exit 1
        signal() { for child in $(cat /proc/$1/task/*/children); do signal $child; done; kill -USR1 $1; }
        for task in $(cat tasks); do signal $task; done
    """,
}


def job_script() -> str:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    return re.search(r"```text\n(#!/bin/bash\n.*?)```", page, re.DOTALL)[1]


def run_job(
    folder: Path, script: str, at: Callable[[], bool] | None = None, **environment: str
) -> tuple[int, str]:
    """The exit code and output of a job in `folder`; Slurm warns it once `at()` is true."""
    for name, text in STANDS_IN.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    variables |= {
        "SLURM_GPUS_ON_NODE": "1",
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (folder / "output.txt").open("w+") as output:
        job = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env={**os.environ, **variables, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while at and job.poll() is None:
            if at():
                job.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.02)
        code = job.wait(timeout=300)
        output.seek(0)
        return code, output.read()
