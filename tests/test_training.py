"""Training: resuming, accumulation, checkpoints, signals and the messages for the user's mistakes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mmvit.config import build_config, read_toml
from mmvit.core.transformer import TransformerConfig
from mmvit.data.samples import ClassifierSample
from mmvit.data.stream import ShardStream
from mmvit.data.tally import Tally
from mmvit.errors import UserError
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.hub import read_weights
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.training import (
    OptimizerConfig,
    Processes,
    Recipe,
    RunFolder,
    Session,
    TrainConfig,
    open_session,
    train,
)
from mmvit.training.checkpoint import Checkpoints, read_state
from mmvit.training.distributed import choose_device
from mmvit.training.interruption import Interruption
from mmvit.training.resume import Progress, changed_settings, check_same_model

DRAW_CURVES = RunFolder.draw_curves  # before conftest.py replaces it
ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
MODEL = ClassifierConfig(
    image_size=16,
    patch_size=8,
    num_classes=4,
    core=TransformerConfig(width=16, depth=2, num_heads=2, dropout=0.2),
)
SETTINGS = {
    "steps": 12,
    "batch_size": 8,
    "log_every": 5,
    "evaluate_every": 4,
    "checkpoint_every": 100,
    "ema_decay": 0.9,
    "precision": "fp32",
    "num_workers": 1,
    "select": "accuracy",
}


class ClassifierRecipe(Recipe):
    task: str = "classifier"
    model: ClassifierConfig = MODEL


def new_session(output: Path, resume: bool = False, model: ClassifierConfig = MODEL, **settings) -> Session:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2)
    recipe = ClassifierRecipe(
        output=output, model=model, train=TrainConfig(**SETTINGS | settings), optimizer=optimizer
    )
    run = RunFolder(output)
    run.open(resume)
    torch.manual_seed(recipe.train.seed)
    return Session(recipe, ALONE, run, resume)


def train_on_shards(
    session: Session,
    shards: Path,
    at_batch: Callable[[int, dict], None] = lambda n, batch: None,
    model: nn.Module | None = None,
) -> None:
    """Trains `model`, or a new one, on real shards; `at_batch(number, batch)` may meddle with every batch."""
    decode = ClassifierSample((16, 16), 4)
    train_config = session.recipe.train

    class Meddled(ShardStream):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), start=1):
                at_batch(number, batch)
                yield batch

    stream = Meddled(
        f"{shards}/train-*.tar",
        decode,
        session.micro_batch_size,
        num_workers=train_config.num_workers,
        shuffle_buffer=20,
    )
    held_out = ShardStream(f"{shards}/held-out-*.tar", decode, 8, repeat=False, shuffle_buffer=0)

    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)  # what an evaluation draws must not show in training
        return classification_metrics(model, held_out)

    model = model or Classifier(session.recipe.model)
    train(session, model, stream, evaluate)


def terminate_at(batch_number: int, number: int = signal.SIGTERM) -> Callable[[int, dict], None]:
    return lambda n, batch: os.kill(os.getpid(), number) if n == batch_number else None


def comparable_metrics(run: RunFolder) -> list[dict]:
    timing = ("seconds", "images_per_s")
    return [
        {key: value for key, value in record.items() if key not in timing} for record in run.read_metrics()
    ]


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
    for name in ("model.safetensors", "average.safetensors"):
        assert_same_state(
            read_weights(whole.run.path / final / name), read_weights(again.run.path / final / name)
        )
    for name in ("optimizer.pt", "training.pt"):
        assert_same_state(
            read_state(whole.run.path / final / name), read_state(again.run.path / final / name)
        )
    assert comparable_metrics(whole.run) == comparable_metrics(again.run)
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert_same_state(read_weights(whole.run.path / name), read_weights(again.run.path / name))


def test_an_older_checkpoint_with_an_empty_parameter_goes_on(tmp_path, tiny_shards, assert_same_state):
    """Positions without prefix tokens used to have a `prefix_table` of no rows, in weights and optimizer."""
    config = MODEL.model_copy(update={"pooling": "mean", "positions": "learned_2d"})

    def run(folder: str, steps: int, older: bool = False, **settings) -> Path:
        model = Classifier(config)
        if older:
            model.positions.prefix_table = nn.Parameter(torch.empty(0, 16))
        session = new_session(tmp_path / folder, model=config, steps=steps, **settings)
        train_on_shards(session, tiny_shards, model=model)
        return session.run.checkpoints / f"step-{steps:08d}"

    schedule = {"evaluate_every": 100, "log_every": 100, "clip_norm": 0}  # a norm sums in other places
    torch.manual_seed(0)
    older = run("cut", 4, older=True, **schedule)
    assert read_weights(older / "model.safetensors")["positions.prefix_table"].shape == (0, 16)
    Classifier.from_pretrained(tmp_path / "cut" / "last")
    Classifier(config).load_state_dict(read_weights(older / "model.safetensors"))
    again = run("cut", 8, resume=True, **schedule)
    torch.manual_seed(0)
    run("whole", 4, **schedule)
    whole = run("whole", 8, resume=True, **schedule)
    for name in ("model.safetensors", "average.safetensors"):
        assert "positions.prefix_table" not in read_weights(again / name)
        assert_same_state(read_weights(again / name), read_weights(whole / name))
    assert_same_state(read_state(again / "optimizer.pt"), read_state(whole / "optimizer.pt"))


def test_evaluation_leaves_no_trace_in_training(tmp_path, tiny_shards):
    records = []
    for evaluate_every in (4, 100):
        session = new_session(tmp_path / str(evaluate_every), evaluate_every=evaluate_every)
        train_on_shards(session, tiny_shards)
        records.append([record for record in comparable_metrics(session.run) if record["kind"] == "train"])
    assert records[0] == records[1]


def test_a_metric_that_begins_later_is_averaged_over_its_own_passes():
    progress = Progress(sums={"loss": 6.0}, summed=2)  # as an older checkpoint has it
    progress.add({"loss": torch.tensor(3.0)})
    progress.add({"loss": 3.0, "discriminator": 5.0})
    progress.add({"loss": 3.0, "discriminator": 7.0})
    assert progress.take_means() == {"loss": 3.0, "discriminator": 6.0}
    progress.add({"loss": 1.0})
    assert progress.take_means() == {"loss": 1.0}


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_process_group_saves(tmp_path, tiny_shards, number):
    """As a scheduler ends a job, or a terminal: the data workers get the signal, too."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import test_training as tests\n"
        "session = tests.new_session(Path(sys.argv[2]), steps=100_000, num_workers=2)\n"
        "tests.train_on_shards(session, Path(sys.argv[3]), lambda n, batch: print(n, flush=True))\n"
    )
    folder = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, script, folder, tmp_path / "run", tiny_shards],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.strip() == "20":
            os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] >= 15


def test_run_folder_is_complete_and_its_models_load(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", checkpoint_every=5, keep_checkpoints=2)
    train_on_shards(session, tiny_shards)
    run = session.run
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-00000010", "step-00000012"]
    assert build_config(ClassifierRecipe, read_toml(run.path / "config.toml"), "run") == session.recipe
    assert run.curves.is_file()
    DRAW_CURVES(run)
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    held_out = [record for record in run.read_metrics() if record["kind"] == "held_out"]
    assert [record["step"] for record in held_out] == [4, 8, 12]
    best = Classifier.from_pretrained(run.path)
    decode = ClassifierSample((16, 16), 4)
    found = classification_metrics(
        best, ShardStream(f"{tiny_shards}/held-out-*.tar", decode, 8, repeat=False)
    )
    assert found["accuracy"] == max(record["accuracy"] for record in held_out)


def test_nothing_left_to_train_still_completes_last(tmp_path, tiny_shards, assert_same_state):
    """A run killed after its last checkpoint has no last/ of it."""
    session = new_session(tmp_path / "run", steps=2)
    train_on_shards(session, tiny_shards)
    expected = read_weights(session.run.last / "model.safetensors")
    shutil.rmtree(session.run.last)
    train_on_shards(new_session(tmp_path / "run", resume=True, steps=2), tiny_shards)
    assert_same_state(read_weights(session.run.last / "model.safetensors"), expected)


def test_a_finished_run_takes_other_settings_but_no_fewer_steps(tmp_path, tiny_shards, capsys):
    session = new_session(tmp_path / "run", steps=2)
    train_on_shards(session, tiny_shards)

    def resumed(**settings) -> dict:
        train_on_shards(new_session(tmp_path / "run", resume=True, **settings), tiny_shards)
        return read_toml(session.run.path / "config.toml")["train"]

    assert resumed(steps=2, select="last")["select"] == "last"
    capsys.readouterr()
    assert resumed(steps=1, select="accuracy")["steps"] == 2
    said = capsys.readouterr().out
    assert "the run is already at step 2 of 1; " in said
    assert "nothing left to train" in said
    assert "config.toml keeps the settings of its training" in said


def test_damaged_checkpoint_is_named(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    folder = tmp_path / "run/checkpoints/step-00000002"
    whole = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(whole[:-100])
    with pytest.raises(
        UserError, match=r"step-00000002 is damaged: optimizer\.pt has \d+ bytes, not \d+; delete that folder"
    ):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)
    (folder / "optimizer.pt").write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=r"optimizer\.pt cannot be read"):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)


@pytest.mark.parametrize("text", ["{}", "[]", '{"bytes": 5}'])
def test_a_manifest_without_sizes_is_a_damaged_checkpoint(tmp_path, text):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002/manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"step-00000002 is damaged: manifest\.json lists no files"):
        Checkpoints(tmp_path, 2, ALONE).latest()


@pytest.mark.parametrize("state", [{}, [1], {"progress": {"gone": 1}, "processes": [{}]}])
def test_a_training_state_without_its_parts_is_a_damaged_checkpoint(tmp_path, tiny_shards, state):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    folder = tmp_path / "run/checkpoints/step-00000002"
    torch.save(state, folder / "training.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["bytes"]["training.pt"] = (folder / "training.pt").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is damaged: training\.pt does not hold the state of a run"):
        train_on_shards(new_session(tmp_path / "run", resume=True, steps=4), tiny_shards)


def test_held_out_data_that_cannot_be_read_costs_no_training(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", steps=2, evaluate_every=2, checkpoint_every=100)

    def evaluate(model: Classifier) -> dict[str, float]:
        raise UserError("held-out data are bad")

    stream = ShardStream(f"{tiny_shards}/train-*.tar", ClassifierSample((16, 16), 4), 8)
    with pytest.raises(UserError, match="held-out data are bad"):
        train(session, Classifier(MODEL), stream, evaluate)
    assert [path.name for path in session.run.checkpoints.iterdir()] == ["step-00000002"]


def test_best_starts_anew_when_another_metric_chooses_it(tmp_path):
    def run(**settings) -> RunFolder:
        session = new_session(tmp_path / "run", **settings)
        train(session, Classifier(MODEL), Repeat(), lambda model: {"accuracy": 0.9, "loss": 1.5})
        return session.run

    first = run(steps=1, select="accuracy")
    before = (first.best / "model.safetensors").read_bytes()
    again = run(steps=2, select="loss", resume=True)  # 1.5 is no better than 0.9 of another metric
    assert (again.best / "model.safetensors").read_bytes() != before


def test_best_of_a_checkpoint_without_the_name_of_its_metric_is_kept():
    progress = Progress(best=0.5)
    assert not progress.improves("accuracy", 0.4, "max")
    assert progress.improves("accuracy", 0.6, "max")


def test_a_killed_data_worker_costs_no_training(tmp_path, tiny_shards):
    def kill(number: int, batch: dict) -> None:
        if number == 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    session = new_session(tmp_path / "run", steps=1000, evaluate_every=1000, checkpoint_every=1000)
    with pytest.raises(UserError, match="a data worker was killed, often for lack of memory: lower train"):
        train_on_shards(session, tiny_shards, kill)
    [folder] = session.run.checkpoints.iterdir()
    assert int(folder.name[5:]) >= 3


def test_changed_architecture_is_refused_by_key(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2), tiny_shards)
    deeper = MODEL.model_copy(update={"core": MODEL.core.model_copy(update={"depth": 3})})
    with pytest.raises(UserError, match=r"holds another model: model\.core\.depth was 2 and is now 3"):
        train_on_shards(new_session(tmp_path / "run", resume=True, model=deeper), tiny_shards)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tmp_path, tiny_shards):
    session = new_session(tmp_path / "run", steps=2)
    train_on_shards(session, tiny_shards)
    path = session.run.checkpoints / "step-00000002" / "recipe.json"
    recipe = json.loads(path.read_text())
    del recipe["model"]["pooling"], recipe["train"]["compile"]
    path.write_text(json.dumps(recipe))
    assert changed_settings(path.parent, session.recipe) == {}
    recipe["model"]["gone"] = 1
    path.write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=r"holds another model: .*model\.gone was 1 and is now None"):
        check_same_model(path.parent, session.recipe)


def test_average_cannot_be_added_on_resume(tmp_path, tiny_shards):
    train_on_shards(new_session(tmp_path / "run", steps=2, ema_decay=0), tiny_shards)
    with pytest.raises(UserError, match=r"no averaged weights, because train\.ema_decay was 0"):
        train_on_shards(new_session(tmp_path / "run", resume=True), tiny_shards)


def test_broken_loss_stops_and_names_the_batch(tmp_path, tiny_shards):
    def spoil(number: int, batch: dict) -> None:
        if number == 5:
            batch["pixels"][0] = float("nan")

    session = new_session(tmp_path / "run", checkpoint_every=3)
    with pytest.raises(UserError, match=r"step 5: the loss is nan in the batch of train-\d+, "):
        train_on_shards(session, tiny_shards, spoil)
    assert [folder.name for folder in session.run.checkpoints.iterdir()] == ["step-00000003"]
    weights = read_weights(session.run.checkpoints / "step-00000003" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_new_run_does_not_overwrite_and_resume_wants_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run is not empty: add --resume .* --output"):
        new_session(tmp_path / "run")
    failed = new_session(tmp_path / "failed")
    failed.run.write_config(failed.recipe)  # it left nothing but its config.toml
    new_session(tmp_path / "failed")
    with pytest.raises(UserError, match="nothing to resume: no run folder"):
        new_session(tmp_path / "nowhere", resume=True)


class Repeat:
    """One batch without end; `open` until its iterator is closed."""

    tally, open = Tally(), False

    def __iter__(self):
        self.open = True
        try:
            while True:
                yield {"pixels": torch.zeros(8, 3, 16, 16), "labels": torch.arange(8) % 4}
        finally:
            self.open = False

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_missing_metric_of_choice_is_named(tmp_path):
    session = new_session(tmp_path / "run", steps=1, select="retrieval")
    with pytest.raises(UserError, match=r"unknown metric retrieval: choose from loss, last"):
        train(session, Classifier(MODEL), Repeat(), lambda model: {"loss": 1.0})


@pytest.mark.parametrize("select", ["loss", "retrieval"])
def test_the_stream_is_closed_when_training_ends_well_or_not(tmp_path, select):
    """Its processes would otherwise wait for one who leaves, and one who leaves for them."""
    session, stream = new_session(tmp_path / "run", steps=1, select=select), Repeat()
    seen = []

    def evaluate(model):
        seen.append(stream.open)
        return {"loss": 1.0}

    kept = None
    try:
        train(session, Classifier(MODEL), stream, evaluate)
    except UserError as error:
        kept = error  # and with it the frames that hold the iterator
    assert seen == [True]
    assert not stream.open
    assert (kept is None) == (select == "loss")


def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    def start() -> None:
        with open_session(ClassifierRecipe(output=tmp_path / "run")) as session:
            assert session.run.path.is_dir()
            raise UserError("no such data")

    with pytest.raises(UserError, match="no such data"):
        start()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def test_cuda_without_a_card_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(UserError, match="finds no CUDA device"):
        choose_device("cuda", local_rank=0)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_a_device_that_this_machine_lacks_is_refused(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=rf"train\.device = '{name}', but .*use auto"):
        choose_device(name, local_rank=0)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (-0.1, 0.9), (0.9, 1.5)])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(UserError, match=r"betas.*less than 1|betas.*at least 0"):
        build_config(OptimizerConfig, {"betas": list(betas)}, "recipe")


def test_a_seed_beyond_64_bits_is_refused():
    with pytest.raises(UserError, match=r"seed = .*expected a number less than"):
        build_config(TrainConfig, {"seed": 2**64}, "recipe")
