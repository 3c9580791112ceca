"""Training: evaluation, metrics, run folders, and the messages for the user's mistakes."""

import multiprocessing
import os
import signal
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import MODEL, ClassifierRecipe, Repeat, comparable_metrics, new_session, train_on_shards

from mmvit.config import build_config, read_toml
from mmvit.data.samples import ClassifierSample
from mmvit.errors import UserError
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.models.classifier import Classifier
from mmvit.streams.stream import ShardStream
from mmvit.training import (
    OptimizerConfig,
    Processes,
    RunFolder,
    Session,
    TrainConfig,
    open_session,
    train,
    training_stream,
)
from mmvit.training.distributed import choose_device
from mmvit.training.optim import rate_scale
from mmvit.training.resume import Progress

DRAW_CURVES = RunFolder.draw_curves  # before conftest.py replaces it


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


class Falling(nn.Module):
    """A weight whose gradient is always 1; remembers what it was at each pass, and a random number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen, self.drawn = [], []

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict]:
        self.seen.append(self.weight.item())
        self.drawn.append(torch.rand(()).item())
        return self.weight + 0, {}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def test_every_step_is_taken_at_its_own_rate(tmp_path):
    session, model = new_session(tmp_path / "run", steps=6, log_every=1, clip_norm=0.0), Falling()
    optimizer = OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, warmup_steps=2)
    session.recipe = session.recipe.model_copy(update={"optimizer": optimizer})
    train(session, model, Repeat())
    rates = [0.1 * rate_scale(step, 6, optimizer) for step in range(1, 7)]
    assert rates[0] == pytest.approx(0.1 / 3)
    assert [record["lr"] for record in session.run.read_metrics()] == pytest.approx(rates)
    moved = [before - after for before, after in pairwise([*model.seen, model.weight.item()])]
    assert moved == pytest.approx(rates, abs=1e-7)


def test_processes_draw_different_dropout_from_one_seed(tmp_path):
    def drawn(rank: int, seed: int, name: str) -> list[float]:
        session, model = new_session(tmp_path / name, steps=3, seed=seed), Falling()
        session.processes = Processes(rank=rank, world_size=1, device=torch.device("cpu"))
        train(session, model, Repeat())
        return model.drawn

    first = drawn(0, 7, "first")
    assert drawn(0, 7, "again") == first
    assert not {*drawn(1, 7, "rank")} & {*first}
    assert not {*drawn(0, 8, "seed")} & {*first}


def test_the_seed_chooses_the_first_weights_and_the_order_of_samples(tmp_path, tiny_shards):
    def begin(number: int, seed: int) -> tuple[list[float], list[str]]:
        recipe = ClassifierRecipe(output=tmp_path / str(number), train=TrainConfig(seed=seed, num_workers=0))
        with open_session(recipe) as session:
            decode = ClassifierSample((16, 16), 4)
            batches = iter(training_stream(session, [f"{tiny_shards}/train-*.tar"], decode, 100))
            return Classifier(MODEL).stem.proj.weight.flatten().tolist(), next(batches)["keys"]

    first, again, other = begin(0, 7), begin(1, 7), begin(2, 8)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


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


@pytest.mark.parametrize("steps", [2, 5])
def test_held_out_data_that_cannot_be_read_cost_neither_training_nor_an_evaluation(
    tmp_path, tiny_shards, steps, assert_same_state
):
    """A file that is gone, or a data worker that is killed while the model is evaluated."""

    def run(name: str, fails: bool = False, resume: bool = False) -> Session:
        session = new_session(tmp_path / name, resume, steps=steps, evaluate_every=2, checkpoint_every=100)
        stream = ShardStream(f"{tiny_shards}/train-*.tar", ClassifierSample((16, 16), 4), 8)
        held_out = ShardStream(
            f"{tiny_shards}/held-out-*.tar", ClassifierSample((16, 16), 4), 8, repeat=False
        )

        def evaluate(model: Classifier) -> dict[str, float]:
            torch.rand(3)
            if fails:
                raise UserError("held-out data are bad")
            return classification_metrics(model, held_out)

        with pytest.raises(UserError, match="held-out data are bad") if fails else nullcontext():
            train(session, Classifier(MODEL), stream, evaluate)
        return session

    whole, cut = run("whole"), run("cut", fails=True)
    assert [path.name for path in cut.run.checkpoints.iterdir()] == ["step-00000002"]
    run("cut", fails=True, resume=True)  # still bad
    run("cut", resume=True)
    assert comparable_metrics(cut.run) == comparable_metrics(whole.run)
    for export in ("best", "last"):
        weights = (load_file(each.run.path / export / "model.safetensors") for each in (whole, cut))
        assert_same_state(*weights)


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


def test_broken_loss_stops_and_names_the_batch(tmp_path, tiny_shards):
    def spoil(number: int, batch: dict) -> None:
        if number == 5:
            batch["pixels"][0] = float("nan")

    session = new_session(tmp_path / "run", checkpoint_every=3)
    with pytest.raises(UserError, match=r"step 5: the loss is nan in the batch of train-\d+, "):
        train_on_shards(session, tiny_shards, spoil)
    assert [folder.name for folder in session.run.checkpoints.iterdir()] == ["step-00000003"]
    weights = load_file(session.run.checkpoints / "step-00000003" / "model.safetensors")
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
