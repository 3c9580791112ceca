"""Stopping and going on: signals, checkpoints, an uninterrupted run's equal, and what is refused."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import running
from safetensors.torch import load_file
from torch import nn
from training_runs import ALONE, MODEL, Repeat, comparable_metrics, new_session, terminate_at, train_on_shards

from mmvit.config import read_toml
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier
from mmvit.recipes.start import StartConfig
from mmvit.streams.stream import WorkerKilled
from mmvit.training import RunFolder, train
from mmvit.training.checkpoint import (
    Checkpoints,
    checksum_of,
    problem_of,
    read_state,
    write_manifest,
    write_state,
)
from mmvit.training.engine import TorchEngine
from mmvit.training.interruption import Interruption
from mmvit.training.resume import (
    SEEDS_OF_A_STEP,
    Progress,
    changed_settings,
    check_same_model,
    find_checkpoint,
)
from mmvit.weights import read_weights, write_weights


def test_terminated_and_resumed_run_equals_an_uninterrupted_one(tmp_path, tiny_shards, assert_same_state):
    whole = new_session(tmp_path / "whole")
    train_on_shards(whole, tiny_shards)

    first = new_session(tmp_path / "cut")
    with pytest.raises(SystemExit) as stopped:
        train_on_shards(first, tiny_shards, terminate_at(7))
    assert stopped.value.code == 143
    assert [folder.name for folder in first.run.checkpoints.iterdir()] == ["step-00000007"]
    again = new_session(tmp_path / "cut", resume=True)
    train_on_shards(again, tiny_shards)

    final = "checkpoints/step-00000012"
    for name in ("model.safetensors", "average.safetensors", "moments.safetensors"):
        assert_same_state(load_file(whole.run.path / final / name), load_file(again.run.path / final / name))
    states = [read_state(session.run.path / final / "training.pt") for session in (whole, again)]
    assert_same_state(*states)
    assert comparable_metrics(whole.run) == comparable_metrics(again.run)
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert_same_state(load_file(whole.run.path / name), load_file(again.run.path / name))


def test_checkpoints_and_exports_in_many_files_are_resumed_alike(
    tmp_path, tiny_shards, assert_same_state, monkeypatch
):
    train_on_shards(new_session(tmp_path / "whole", steps=4), tiny_shards)
    for write in (write_weights, Classifier.save_pretrained):
        monkeypatch.setattr(write, "__defaults__", (None, 10_000))  # bytes of a file, not 5 GB
    with pytest.raises(SystemExit):
        train_on_shards(new_session(tmp_path / "cut", steps=4), tiny_shards, terminate_at(2))
    train_on_shards(new_session(tmp_path / "cut", resume=True, steps=4), tiny_shards)
    whole, cut = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    assert not [*cut.path.rglob("model.safetensors")]
    final = "step-00000004"
    for name in ("model.safetensors", "average.safetensors", "moments.safetensors"):
        one, many = (run.checkpoints / final / name for run in (whole, cut))
        assert_same_state(load_file(one), dict(read_weights(many)))
    one, many = (Classifier.from_pretrained(run.path).state_dict() for run in (whole, cut))
    assert_same_state(one, many)


def test_another_number_of_processes_draws_other_random_numbers_than_at_the_start(tmp_path, tiny_shards):
    first = new_session(tmp_path, steps=4)
    train_on_shards(first, tiny_shards)
    folder = first.run.checkpoints / "step-00000004"
    state = read_state(folder / "training.pt")
    write_state({**state, "processes": 2 * state["processes"]}, folder / "training.pt")
    write_manifest(folder, 4)
    seeds = []
    again = new_session(tmp_path, resume=True, steps=5)
    train_on_shards(again, tiny_shards, lambda number, batch: seeds.append(torch.initial_seed()))
    assert seeds == [1 + 4 * SEEDS_OF_A_STEP]


def test_a_step_that_a_killed_worker_cut_short_is_done_again(tmp_path, tiny_shards, assert_same_state):
    def killed(number: int, batch: dict) -> None:
        if number == 4:
            raise WorkerKilled("a data worker was killed")

    settings = {"steps": 4, "accumulation": 2}
    train_on_shards(new_session(tmp_path / "whole", **settings), tiny_shards)
    with pytest.raises(WorkerKilled):
        train_on_shards(new_session(tmp_path / "cut", **settings), tiny_shards, killed)
    assert [folder.name for folder in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000001"]
    train_on_shards(new_session(tmp_path / "cut", resume=True, **settings), tiny_shards)
    whole, cut = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    final = "step-00000004/model.safetensors"
    assert_same_state(load_file(whole.checkpoints / final), load_file(cut.checkpoints / final))
    assert comparable_metrics(whole) == comparable_metrics(cut)


def test_an_older_checkpoint_with_an_empty_parameter_goes_on(tmp_path, tiny_shards, assert_same_state):
    """Positions without prefix tokens used to have a `prefix_table` of no rows, in weights and optimizer,
    whose state was a pickle."""
    config = MODEL.model_copy(update={"pooling": "mean", "positions": "learned_2d"})

    def run(folder: str, steps: int, older: bool = False, **settings) -> Path:
        model = Classifier(config)
        if older:
            model.positions.prefix_table = nn.Parameter(torch.empty(0, 16))
        session = new_session(tmp_path / folder, model=config, steps=steps, **settings)
        with mock.patch.object(TorchEngine, "save", save_as_before if older else TorchEngine.save):
            train_on_shards(session, tiny_shards, model=model)
        return session.run.checkpoints / f"step-{steps:08d}"

    def save_as_before(engine: TorchEngine, folder: Path) -> None:
        write_weights(dict(engine.model.state_dict()), folder / "model.safetensors")
        write_weights(dict(engine.average.model.state_dict()), folder / "average.safetensors")
        write_state({"optimizer": engine.optimizer.state_dict()}, folder / "optimizer.pt")

    schedule = {"evaluate_every": 100, "log_every": 100, "clip_norm": 0}  # a norm sums in other places
    torch.manual_seed(0)
    older = run("cut", 4, older=True, **schedule)
    assert load_file(older / "model.safetensors")["positions.prefix_table"].shape == (0, 16)
    Classifier.from_pretrained(tmp_path / "cut" / "last")
    Classifier(config).load_state_dict(load_file(older / "model.safetensors"))
    again = run("cut", 8, resume=True, **schedule)
    torch.manual_seed(0)
    run("whole", 4, **schedule)
    whole = run("whole", 8, resume=True, **schedule)
    for name in ("model.safetensors", "average.safetensors"):
        assert "positions.prefix_table" not in load_file(again / name)
        assert_same_state(load_file(again / name), load_file(whole / name))
    names = [folder / "moments.safetensors" for folder in (again, whole)]
    assert_same_state(*map(load_file, names))


def test_a_dropped_tail_of_metrics_is_not_logged_twice(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", checkpoint_every=6, log_every=1)
    with pytest.raises(ZeroDivisionError):  # dies two steps after the checkpoint
        train_on_shards(session, tiny_shards, lambda n, batch: 1 // (n - 9))
    with session.run.metrics.open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # killed while it wrote a line
    train_on_shards(new_session(tmp_path / "run", resume=True, checkpoint_every=6, log_every=1), tiny_shards)
    steps = [record["step"] for record in session.run.read_metrics() if record["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_run_that_died_before_its_first_checkpoint_starts_over(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", log_every=1)
    with pytest.raises(ZeroDivisionError):
        train_on_shards(session, tiny_shards, lambda n, batch: 1 // (n - 3))
    train_on_shards(new_session(tmp_path / "run", resume=True, log_every=1), tiny_shards)
    steps = [record["step"] for record in session.run.read_metrics() if record["kind"] == "train"]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("left", ["last", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_over(tmp_path, tiny_shards, left):
    session = new_session(tmp_path / "run", steps=4, checkpoint_every=2, log_every=1)
    train_on_shards(session, tiny_shards)
    before = session.run.metrics.read_text()
    shutil.rmtree(session.run.checkpoints)
    if left == "metrics.jsonl":
        shutil.rmtree(session.run.last)
    expected = (
        r"nothing to resume: .*/run was trained to step 4, but there are no checkpoints in .*/checkpoints;"
    )
    with pytest.raises(UserError, match=expected):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)
    assert session.run.metrics.read_text() == before


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, tiny_shards, capsys):
    session, before = new_session(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train_on_shards(session, tiny_shards, terminate_at(3, signal.SIGINT))
    assert stopped.value.code == 130
    assert "SIGINT: saved at step 3; add --resume to the command to continue" in capsys.readouterr().out
    assert (session.run.last / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_leaves_at_once_but_a_launchers_echo_does_not(monkeypatch):
    seconds = iter([100.0, 100.1, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(SystemExit, match="130"):
            os.kill(os.getpid(), signal.SIGINT)


def train_and_count(output: Path, shards: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    session = new_session(output, steps=100_000, num_workers=2)
    train_on_shards(session, shards, lambda number, batch: print(number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_to_the_whole_process_group_saves(tmp_path, tiny_shards, number):
    """As a scheduler ends a job, or a terminal: the data workers get the signal, too."""
    with running(train_and_count, tmp_path / "run", tiny_shards) as process:
        for line in process.lines:
            if line.strip() == "20":
                os.killpg(process.pid, number)
        ended = process.end()
    assert ended.returncode == 128 + number, ended.stderr
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] >= 15


def test_a_warning_is_noted_though_the_launcher_was_kept_from_it():
    """A job of Slurm makes torchrun, and so what it starts, ignore SIGUSR1 (docs/clusters.md)."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interruption.signal == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.signal
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_left_to_train_still_completes_last(tmp_path, tiny_shards, assert_same_state):
    """A run killed after its last checkpoint has no last/ of it."""
    session = new_session(tmp_path / "run", steps=2)
    train_on_shards(session, tiny_shards)
    expected = load_file(session.run.last / "model.safetensors")
    shutil.rmtree(session.run.last)
    train_on_shards(new_session(tmp_path / "run", resume=True, steps=2), tiny_shards)
    assert_same_state(load_file(session.run.last / "model.safetensors"), expected)


def test_a_finished_run_takes_other_settings_but_no_fewer_steps(tmp_path, tiny_shards, capsys):
    session = new_session(tmp_path / "run", steps=2)
    train_on_shards(session, tiny_shards)

    def resumed(**settings) -> dict:
        train_on_shards(new_session(tmp_path / "run", resume=True, **settings), tiny_shards)
        return read_toml(session.run.path / "config.toml")["train"]

    assert resumed(steps=2, select="last")["select"] == "last"
    capsys.readouterr()
    assert resumed(steps=1, select="accuracy")["steps"] == 2
    (said,) = capsys.readouterr().out.splitlines()
    assert "already at step 2 and train.steps is 1: nothing left to train; raise train.steps" in said
    assert "config.toml keeps the settings of its training" in said


def test_damaged_checkpoint_is_named(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    folder = tmp_path / "run/checkpoints/step-00000002"
    whole = (folder / "moments.safetensors").read_bytes()
    (folder / "moments.safetensors").write_bytes(whole[:-100])
    with pytest.raises(
        UserError,
        match=r"step-00000002 is damaged: moments\.safetensors has \d+ bytes, not \d+; there is no other",
    ):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)


@pytest.mark.parametrize(
    "name", ["average.safetensors", "moments.safetensors", "optimizer.json", "training.pt"]
)
def test_a_flipped_bit_costs_the_newest_checkpoint_and_no_more(
    tmp_path, tiny_shards, assert_same_state, capsys, name
):
    train_on_shards(new_session(tmp_path / "run", steps=4, checkpoint_every=2), tiny_shards)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    path = tmp_path / "run/checkpoints/step-00000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    train_on_shards(new_session(tmp_path / "run", steps=4, checkpoint_every=2, resume=True), tiny_shards)
    said = capsys.readouterr().out
    assert f"warning: the checkpoint {path.parent} is damaged: the content of {name} has changed" in said
    assert "going on from step-00000002" in said
    state = "checkpoints/step-00000004/training.pt"
    assert_same_state(read_state(tmp_path / "run" / state), read_state(tmp_path / "whole" / state))
    for each in ("model.safetensors", "average.safetensors"):
        one, other = (load_file(tmp_path / run / Path(state).with_name(each)) for run in ("run", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_where_all_checkpoints_are_damaged_each_is_named_and_a_way_on(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, ALONE)
    for step in (10, 12):
        folder = checkpoints.save(step, lambda folder: (folder / "model.bin").write_bytes(b"whole"))
        (folder / "model.bin").unlink()
    (last := tmp_path / "last").mkdir()
    weights = rf" from the weights in last/ \(--start.model {last}\)"
    for start, way_on in ((StartConfig(), weights), (None, "")):
        session = mock.Mock(processes=ALONE, run=mock.Mock(last=last), recipe=mock.Mock(start=start))
        with pytest.raises(
            UserError, match=rf"step-00000012 is damaged: .*step-00000010 is .* new run{way_on}$"
        ):
            find_checkpoint(session, checkpoints)


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    def write(folder: Path) -> None:
        (folder / "model.bin").write_bytes(b"whole")

    for step in (10, 20, 30):
        Checkpoints(tmp_path, 3, ALONE).save(step, write)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}/model.bin").write_bytes(b"harmed")
    fewer = Checkpoints(tmp_path, 2, ALONE)
    assert fewer.latest()[0].name == "step-00000010"
    fewer.save(15, write)
    assert fewer.latest()[0].name == "step-00000015"
    for step in (20, 30, 40):
        fewer.save(step, write)
    assert [folder.name for folder in fewer.complete()] == ["step-00000030", "step-00000040"]


def test_a_checkpoint_that_cannot_be_read_is_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    for step in (1, 2):
        folder = checkpoints.save(step, lambda folder: (folder / "model.bin").write_bytes(b"whole"))
    with mock.patch(
        "mmvit.training.checkpoint.checksum_of",
        side_effect=[OSError(5, "I/O error"), checksum_of(folder / "model.bin")],
    ):
        found, [problem] = checkpoints.latest()
    assert found.name == "step-00000001"
    assert problem.endswith("a file cannot be read (I/O error)")


def test_no_change_of_a_manifest_goes_unnoticed(tmp_path):
    folder = Checkpoints(tmp_path, 2, ALONE).save(7, lambda folder: (folder / "model.bin").write_bytes(b"w"))
    path = folder / "manifest.json"
    whole = path.read_bytes()
    assert problem_of(folder) == ""
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert json_of(path) == json.loads(whole) or "manifest.json" in problem_of(folder), path.read_text()
    path.write_bytes(whole)
    folder.rename(tmp_path / "step-00000009")
    assert "manifest.json has changed" in problem_of(tmp_path / "step-00000009")


def json_of(path: Path) -> object:
    """None if it is none."""
    with contextlib.suppress(ValueError):
        return json.loads(path.read_text())


@pytest.mark.parametrize("text", ["{}", "[]", '{"bytes": 5}'])
def test_a_manifest_without_sizes_is_a_damaged_checkpoint(tmp_path, text):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002/manifest.json").write_text(text)
    folder, [problem] = Checkpoints(tmp_path, 2, ALONE).latest()
    assert folder is None
    assert problem.endswith("step-00000002 is damaged: manifest.json lists no files")


def test_manifests_of_earlier_versions_are_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    folder = checkpoints.save(7, lambda folder: (folder / "model.bin").write_bytes(b"whole"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for gone in (["version", "own_sha256"], ["sha256"]):
        for key in gone:
            del manifest[key]
        path.write_text(json.dumps(manifest))
        assert checkpoints.latest() == (folder, [])


@pytest.mark.parametrize("state", [{}, [1], {"progress": {"gone": 1}, "processes": [{}]}])
def test_a_training_state_without_its_parts_is_a_damaged_checkpoint(tmp_path, tiny_shards, state):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    folder = tmp_path / "run/checkpoints/step-00000002"
    torch.save(state, folder / "training.pt")
    write_manifest(folder, 2)
    with pytest.raises(UserError, match=r"is damaged: training\.pt does not hold the state of a run"):
        train_on_shards(new_session(tmp_path / "run", resume=True, steps=4), tiny_shards)


def test_best_starts_anew_when_another_metric_chooses_it(tmp_path):
    def run(**settings) -> RunFolder:
        session = new_session(tmp_path / "run", **settings)
        train(session, Classifier(MODEL), Repeat(), lambda model: {"accuracy": 0.9, "loss": 1.5})
        return session.run

    first = run(steps=1, select="accuracy")
    before = (first.best / "model.safetensors").read_bytes()
    again = run(steps=2, select="loss", resume=True)  # 1.5 is no better than 0.9 of another metric
    assert (again.best / "model.safetensors").read_bytes() != before


def test_best_by_an_error_is_the_lowest(tmp_path):
    errors = iter((0.3, 0.4))
    session = new_session(tmp_path / "run", steps=2, evaluate_every=1, select="l1")
    progress = train(session, Classifier(MODEL), Repeat(), lambda model: {"l1": next(errors)})
    assert progress.best == 0.3


def test_best_of_a_checkpoint_without_the_name_of_its_metric_is_kept():
    progress = Progress(best=0.5)
    assert not progress.improves("accuracy", 0.4, "max")
    assert progress.improves("accuracy", 0.6, "max")


def test_changed_architecture_is_refused_by_key(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    deeper = MODEL.model_copy(update={"core": MODEL.core.model_copy(update={"depth": 3})})
    with pytest.raises(UserError, match=r"holds another model: model\.core\.depth was 2 and is now 3"):
        train_on_shards(new_session(tmp_path / "run", resume=True, model=deeper), tiny_shards)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", steps=2, select="loss")
    train_on_shards(session, tiny_shards)
    path = session.run.checkpoints / "step-00000002" / "recipe.json"
    recipe = json.loads(path.read_text())
    del recipe["model"]["pooling"], recipe["train"]["compile"]
    recipe["train"]["select"] = None  # the default, which recipes then left out
    path.write_text(json.dumps(recipe))
    assert changed_settings(path.parent, session.recipe) == {}
    recipe["model"]["gone"], recipe["optimizer"]["schedule"] = 1, "stairs"
    path.write_text(json.dumps(recipe))
    assert [*changed_settings(path.parent, session.recipe)] == ["optimizer.schedule", "model.gone"]
    with pytest.raises(UserError, match=r"holds another model: .*model\.gone was 1 and is now None"):
        check_same_model(path.parent, session.recipe)


def test_average_cannot_be_added_on_resume(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2, ema_decay=0), tiny_shards)
    with pytest.raises(UserError, match=r"no averaged weights, because train\.ema_decay was 0"):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)
