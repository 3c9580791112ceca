"""A run that is killed between any two changes on disk, or whose disk is full, goes on to what one leaves
that is not."""

import contextlib
import io
import itertools
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import ALONE

from mmvit.errors import UserError
from mmvit.streams.tally import Tally
from mmvit.training import OptimizerConfig, Recipe, RunFolder, Session, TrainConfig, disk, train
from mmvit.training.checkpoint import read_state
from mmvit.weights import write_weights

KILLED = 9
MOVES = ("os.rename", "exchange")
CHANGES = (*MOVES, "open", "os.mkdir", "os.rmdir", "os.remove")


class Model(nn.Linear):
    """Its loss depends on the position, the weights and chance."""

    def loss(self, batch):
        return self(torch.rand(2, 1000) + batch["number"]).square().mean(), {}

    def save_pretrained(self, folder: Path) -> None:
        write_weights(self.state_dict(), folder / "model.safetensors")


class Numbers:
    tally = Tally()

    def __init__(self):
        self.number = 0

    def __iter__(self):
        while True:
            self.number += 1
            yield {"number": torch.tensor(self.number)}

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def run_to(step: int, output: Path, resume: bool = True) -> None:
    """Trains to `step` of 4; every step is a line of metrics, every second one an evaluation, then a
    checkpoint."""
    settings = {"steps": 4, "batch_size": 2, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2}
    recipe = Recipe(
        task="any", output=output, train=TrainConfig(**settings), optimizer=OptimizerConfig(lr=1e-3)
    )
    run = RunFolder(output)
    run.open(resume)

    def evaluate(model: Model) -> dict[str, float]:
        return {"loss": model.weight.sum().item()}

    class Stop(Exception):
        pass

    def stop(model: Model, at: int) -> None:
        if at > step:
            raise Stop

    torch.manual_seed(0)
    try:
        train(Session(recipe, ALONE, run, resume), Model(1000, 1), Numbers(), evaluate, stop)
    except Stop:
        pass
    finally:
        run.close()


def in_fork(action: Callable[[], None]) -> int:
    """The exit status of a process that does `action`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            action()
        os._exit(0)
    finally:
        os._exit(1)


def die_before(number: int, changes: tuple[str, ...]) -> None:
    """Ends this process at once before number `number` of the `changes` it makes on disk."""
    numbers = itertools.count()

    def count(event: str, details: tuple) -> None:
        elsewhere = event == "open" and details[1] != "a"  # to read, or beside what it will replace
        if event in changes and not elsewhere and next(numbers) == number:
            os._exit(KILLED)

    exchange = disk.exchange
    disk.exchange = lambda *paths: (count("exchange", paths), exchange(*paths))[1]
    sys.addaudithook(count)


def content(run: Path) -> dict[str, object]:
    """All that a run leaves, without the time it took."""
    found: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in ("metrics.jsonl", "training.pt", "manifest.json")
    }
    for path in run.glob("checkpoints/*/training.pt"):
        state = read_state(path)
        state["progress"].pop("seconds")
        state["processes"][0]["random"]["torch"] = state["processes"][0]["random"]["torch"].tolist()
        found[path.parent.name] = state
    timing = ("seconds", "images_per_s")
    records = RunFolder(run).read_metrics()
    found["metrics"] = [{key: record[key] for key in record if key not in timing} for record in records]
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_run_killed_before_any_change_on_disk_resumes_to_the_same(tmp_path, monkeypatch, can_exchange):
    changes, every = (CHANGES, 2) if can_exchange else (MOVES, 1)  # for time; `make soak` kills at every line
    if not can_exchange:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    run_to(2, tmp_path / "half", resume=False)
    shutil.copytree(tmp_path / "half", tmp_path / "run")
    run_to(4, tmp_path / "run")
    expected = content(tmp_path / "run")
    for kills in itertools.count(0, every):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "half", tmp_path / "run")
        status = in_fork(lambda: (die_before(kills, changes), run_to(4, tmp_path / "run")))  # noqa: B023
        if status != KILLED:
            break
        if can_exchange:
            assert all((tmp_path / "run" / name / "model.safetensors").is_file() for name in ("best", "last"))
        run_to(4, tmp_path / "run")
        assert content(tmp_path / "run") == expected, kills
    assert status == 0
    assert kills > 15


def test_a_resume_makes_up_for_the_export_that_a_kill_prevented(tmp_path):
    run_to(2, tmp_path, resume=False)
    shutil.rmtree(tmp_path / "last")
    run_to(2, tmp_path)  # stops before its first checkpoint
    checkpoint = tmp_path / "checkpoints/step-00000002/model.safetensors"
    assert (tmp_path / "last/model.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(("limit", "name"), [(3000, "model.safetensors"), (6000, "moments.safetensors")])
def test_a_full_disk_names_the_file_and_leaves_the_checkpoint_before(tmp_path, limit, name):
    """The largest size of a file, set to `limit` bytes, has the same effect."""
    run_to(2, tmp_path, resume=False)
    before = sorted(tmp_path.rglob("*"))
    said = tmp_path.parent / "said"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            run_to(4, tmp_path)
        except UserError as error:
            said.write_text(str(error))

    assert in_fork(fill) == 0
    assert re.search(f"{name} cannot be written: .*File too large", said.read_text())
    assert sorted(tmp_path.rglob("*")) == before
    run_to(4, tmp_path)
    assert (tmp_path / "checkpoints/step-00000004").is_dir()
