"""The job script in docs/clusters.md starts torchrun on every node of Slurm, lets it save in time, resumes,
and queues itself again."""

import os
from pathlib import Path

import pytest
from slurm import job_script, run_job

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs bash")
NO_NODE = """#!/bin/bash
grep -q "SigIgn:.*[2367abef]..$" /proc/$$/status && ignores=USR1  # bit 10
echo "$SLURM_NODEID $ignores: $*" >> torchrun.txt
"""
UNTIL_WARNED = """#!/usr/bin/env python3
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
open(f"trains-{os.environ['SLURM_NODEID']}", "w").close()
signal.pause()
"""


def with_torchrun(folder: Path, text: str) -> Path:
    (folder / "torchrun").write_text(text)
    (folder / "torchrun").chmod(0o755)
    return folder


def test_a_job_starts_torchrun_on_each_node_and_resumes_what_is_there(tmp_path):
    for resume in ("", " --resume"):
        code, output = run_job(with_torchrun(tmp_path, NO_NODE), job_script())
        assert code == 0, output
        for node, line in enumerate(sorted((tmp_path / "torchrun.txt").read_text().splitlines())):
            assert line == (
                f"{node} USR1: --nnodes 2 --node_rank {node} --nproc_per_node 1 --master_addr 127.0.0.1 "
                f"--master_port 24711 -m mmvit train fashion_mnist --output runs/fashion{resume}"
            )
        (tmp_path / "torchrun.txt").unlink()
        (tmp_path / "runs" / "fashion").mkdir(parents=True, exist_ok=True)
    assert not (tmp_path / "scontrol.txt").exists()


def test_a_job_whose_time_is_up_is_queued_again(tmp_path):
    with_torchrun(tmp_path, UNTIL_WARNED)
    code, output = run_job(tmp_path, job_script(), lambda: len([*tmp_path.glob("trains-*")]) == 2)
    assert code == 1, output
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    with_torchrun(tmp_path, f"#!/bin/bash\nexit $(({code} * SLURM_NODEID))")
    assert run_job(tmp_path, job_script())[0] == code
    assert not (tmp_path / "scontrol.txt").exists()
