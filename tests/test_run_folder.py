"""Run folders and checkpoints: written whole or not at all, and read without running code."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from pydantic import Field

from mmvit.config import Config, build_config, read_toml
from mmvit.errors import UserError
from mmvit.training import Processes, Recipe, RunFolder, disk, open_session
from mmvit.training.checkpoint import read_state

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))


def test_a_run_folder_in_use_is_refused_with_the_process_that_holds_it(tmp_path):
    """New and resumed runs alike; a lock ends with its process, however that dies."""
    holding = """
import sys, time
from pathlib import Path
from mmvit.training import RunFolder
RunFolder(Path(sys.argv[1])).open(resume=False)
print("open", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", holding, tmp_path / "run"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"open\n"
    host = re.escape(socket.gethostname())
    try:
        for resume in (False, True):
            with pytest.raises(
                UserError,
                match=rf"run is in use by process {holder.pid} on {host} since 20\d\d.* \(-c .*run\)",
            ):
                RunFolder(tmp_path / "run").open(resume)
    finally:
        holder.kill()
        holder.communicate()
    run = RunFolder(tmp_path / "run")
    run.open(resume=False)  # the lock that is left does not count as content
    run.discard()
    assert not run.path.exists()


def test_where_there_are_no_locks_the_word_of_a_dead_process_counts_on_its_host_alone(tmp_path):
    def refuse_to_lock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    dead = subprocess.Popen(["true"])
    dead.wait()
    run, lock = RunFolder(tmp_path), tmp_path / ".lock"
    lock.write_text("torn")
    owner = {"process": dead.pid, "host": socket.gethostname(), "since": "then", "command": "mmvit train"}
    with mock.patch.object(fcntl, "lockf", refuse_to_lock):
        run.open(resume=False)
        run.close()
        lock.write_text(json.dumps(owner))
        run.open(resume=False)
        run.close()
        for other in ({"process": os.getppid()}, {"host": "node7"}):
            lock.write_text(json.dumps(owner | other))
            with pytest.raises(
                UserError, match=r"in use by process .* \(mmvit train\).*If that has ended, remove"
            ):
                run.open(resume=False)


def test_a_session_leaves_no_lock(tmp_path):
    with open_session(Recipe(task="any", output=tmp_path / "run")) as session:
        assert json.loads((session.run.path / ".lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_disk_that_flushes_no_folders_and_exchanges_none_will_do(tmp_path):
    run = RunFolder(tmp_path)
    flush = mock.patch.object(os, "fsync", side_effect=OSError(errno.EINVAL, "Invalid argument"))
    with flush, mock.patch.object(disk, "exchange", return_value=False):
        for text in ("old", "new"):
            run.export(run.last, lambda folder: (folder.mkdir(), (folder / "model").write_text(text)))  # noqa: B023
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert (run.last / "model").read_text() == "new"


def test_lines_of_metrics_that_are_no_records_are_left_out(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(
        b'{"kind": "train", "step": 1}\n5\n{"step"\n\xff\n{"kind": "train"}\n{"kind": "train", "step": 2}\n'
    )
    assert [record["step"] for record in run.read_metrics()] == [1, 2]


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        RunFolder(tmp_path / "file").open(resume=False)
    with pytest.raises(UserError, match="not valid UTF-8"):
        RunFolder(Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))).open(resume=False)


def test_state_files_cannot_run_code(tmp_path):
    torch.save({"optimizer": subprocess.Popen}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="cannot be read") as refused:
        read_state(tmp_path / "optimizer.pt")
    assert "Weights only" not in str(refused.value)


def test_config_toml_holds_every_kind_of_value(tmp_path):
    class Inner(Config):
        names: dict[str, int] = Field({"plain": 1, "not plain": 2})
        pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
        text: str = 'a "quoted" \\ line\nand é'
        nothing: int | None = None
        small: float = 1e-30

    class Outer(Recipe):
        task: str = "outer"
        inner: Inner = Inner()

    recipe = Outer(output=tmp_path / "run")
    run = RunFolder(recipe.output)
    run.open(resume=False)
    run.write_config(recipe)
    assert build_config(Outer, read_toml(recipe.output / "config.toml"), "run") == recipe


def test_a_full_disk_names_the_file_and_leaves_none_half_written(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.open(resume=False)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"config\.toml cannot be written: No space left"):
        run.write_config(Recipe(task="any", output=run.path))
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left"):
        run.rewind(0)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left"):
        run.write_metrics({"step": 1})
    monkeypatch.undo()
    assert not {path.name for path in run.path.iterdir()} - {".lock"}
