"""Two processes on gloo train to the same result as one, in DDP and under ZeRO 0 to 3, and resume there.

The test starts this very file under torchrun: each process goes through all the modes (see `main`).
"""

import copy
import json
import os
import re
import shutil
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import start_one, start_two
from safetensors.torch import load_file
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError, run_script
from mmvit.evaluation.accuracy import classification_metrics
from mmvit.evaluation.likelihood import mean_loss
from mmvit.files import write_json
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.streams.tally import Tally
from mmvit.training import OptimizerConfig, Processes, Recipe, RunFolder, Session, TrainConfig, train
from mmvit.training.checkpoint import MANIFEST
from mmvit.training.deepspeed_engine import DeepSpeedEngine, building
from mmvit.training.distributed import open_processes
from mmvit.training.engine import TorchEngine
from mmvit.training.loop import build_engine
from mmvit.training.muon import Muon

ROOT = Path(__file__).resolve().parent.parent
ZERO = {f"zero{stage}": ROOT / f"configs/deepspeed/zero{stage}.json" for stage in range(4)}
SHARDED = ROOT / "tests/zero3_in_shards.json"  # small weights, too, which ZeRO 3 leaves whole by default
MODES: dict[str, Path | None] = {"ddp": None, **ZERO, "zero3": SHARDED}
MODEL = ClassifierConfig(
    image_size=8, patch_size=4, num_classes=4, core=TransformerConfig(width=16, depth=1, num_heads=2)
)
STEPS = 6
STEP_5 = "run/checkpoints/step-00000005"


class ClassifierRecipe(Recipe):
    task: str = "classifier"
    model: ClassifierConfig = MODEL


class Pictures:
    """Sample i is the same whoever reads it: step by step, the processes share the global batch."""

    def __init__(self, batch_size: int, processes: Processes, stop_before: int | None = None):
        self.batch_size, self.processes, self.read = batch_size, processes, 0
        self.stop_before = stop_before

    def __iter__(self):
        while True:
            if self.read == self.stop_before and self.processes.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one process alone is told to stop
            first = (self.read * self.processes.world_size + self.processes.rank) * self.batch_size
            self.read += 1
            yield pictures(range(first, first + self.batch_size))

    def state_dict(self) -> dict:
        return {"read": self.read}

    def load_state_dict(self, state: dict) -> None:
        self.read = state["read"]

    @property
    def tally(self) -> Tally:
        return Tally(read=self.read * self.batch_size)


def pictures(numbers: range) -> dict[str, torch.Tensor]:
    """Noise with one bright channel, which is the class; the fourth class has none."""
    pixels = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in numbers])
    labels = torch.tensor([n * 7 % 4 for n in numbers])
    pixels += 2 * torch.eye(4)[labels][:, :3, None, None]
    return {"pixels": pixels, "labels": labels}


def new_session(
    output: Path,
    processes: Processes,
    deepspeed: Path | None = None,
    resume: bool = False,
    weight_decay: float = 0.05,
    name: str = "adamw",
    **settings,
) -> Session:
    defaults = {
        "steps": STEPS,
        "batch_size": 8,
        "precision": "fp32",
        "log_every": 2,
        "evaluate_every": 3,
        "ema_decay": 0.8,
    }
    recipe = ClassifierRecipe(
        output=output,
        train=TrainConfig(**defaults | settings),
        optimizer=OptimizerConfig(name=name, lr=2e-2, warmup_steps=2, weight_decay=weight_decay),
    )
    run = RunFolder(output)
    processes.on_main(lambda: run.open(resume))
    torch.manual_seed(recipe.train.seed)
    return Session(recipe, processes, run, resume, deepspeed)


def run_training(session: Session, stop_before: int | None = None) -> None:
    def evaluate(model: Classifier) -> dict[str, float]:
        own = range(1000 + session.processes.rank, 1016, session.processes.world_size)
        return classification_metrics(model, [pictures(own)])

    stream = Pictures(session.micro_batch_size, session.processes, stop_before)
    with building(session.recipe.train, session.processes, session.deepspeed):
        train(session, Classifier(MODEL), stream, evaluate)


class Mean(nn.Linear):
    """Its loss is the mean of its samples."""

    def loss(self, batch):
        mean = batch["values"].mean()
        return mean, {"loss": mean}


def check_mean_loss(processes: Processes) -> None:
    """Every sample counts once, whichever of the processes has it and however many it has."""
    model, values = Mean(1, 1), torch.arange(5.0)
    for own in (([0, 1, 2, 3], [4]), ([0, 1, 2, 3, 4], [])):
        batches = [{"values": values[part]} for part in torch.tensor(own[processes.rank]).long().split(3)]
        found = mean_loss(model, [batch for batch in batches if len(batch["values"])], count="values")
        assert found == {"loss": 2.0}, found


class Normed(nn.Sequential):
    """Its loss is the mean of its output."""

    def loss(self, batch):
        return self(batch["values"]).mean(), {}


def check_statistics(processes: Processes) -> None:
    """All processes evaluate what the main one exports, whatever their batch norms have seen."""
    own = torch.full((4, 1), float(processes.rank)) + torch.arange(4.0)[:, None]
    for decay in (0.0, 0.5):
        settings = TrainConfig(batch_size=8, ema_decay=decay, precision="fp32")
        model = Normed(nn.BatchNorm1d(1), nn.Linear(1, 1))
        engine = TorchEngine(model, settings, OptimizerConfig(), processes)
        for step in (1, 2):
            engine.backward(engine.loss({"values": own})[0])
            engine.step(step)
        with engine.evaluating() as evaluated:
            found = [None, None]
            torch.distributed.all_gather_object(found, evaluated[0].running_mean.item())
            assert found[0] == found[1] > 0, found


def check_same_start(processes: Processes) -> None:
    """All processes train, and average, from the weights of the main one."""
    torch.manual_seed(processes.rank)
    engine = TorchEngine(Mean(1, 1), TrainConfig(ema_decay=0.5), OptimizerConfig(), processes)
    for model in (engine.model, engine.average.model):
        weight = model.weight.detach()
        sent = weight.clone()
        torch.distributed.broadcast(sent, 0)
        assert torch.equal(weight, sent)


def check_muon(processes: Processes) -> None:
    """Matrices of which each process turns a part, or none, go where torch's Muon takes them."""
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (24, 40), (40, 24), (32, 32)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [Muon([{"params": ours}], **settings)]
    optimizers.append(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings))
    for _ in range(3):
        for mine, peer in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            peer.grad = mine.grad
        for optimizer in optimizers:
            optimizer.step()
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, peer, rtol=0.02, atol=0.01)
        everyone = [torch.empty_like(mine) for _ in range(processes.world_size)]
        torch.distributed.all_gather(everyone, mine.detach())
        assert all(torch.equal(mine, other) for other in everyone)


def check_conversions(folder: Path, processes: Processes) -> None:
    """Every engine writes again what it has read of any other's checkpoint, bit for bit."""
    for target, deepspeed in MODES.items():
        session = new_session(folder / f"to-{target}", processes, deepspeed)
        with building(session.recipe.train, processes, deepspeed):
            engine = build_engine(session, Classifier(MODEL))
        for source in MODES:
            before, after = folder / source / "checkpoints/step-00000006", folder / f"from-{source}-{target}"
            processes.on_main(after.mkdir)
            engine.load(before)
            engine.save(after)
            names = ("model.safetensors", "average.safetensors", "moments.safetensors")
            for name in names if processes.is_main else ():
                left, right = load_file(before / name), load_file(after / name)
                assert left.keys() == right.keys(), (source, target, name)
                assert all(torch.equal(left[key], right[key]) for key in left), (source, target, name)


def check_full_disks(folder: Path, processes: Processes) -> None:
    """Whatever the main process cannot write, the others do not wait for it."""
    for number, failing in enumerate(("weights.write_tensor", "training.run.put_in_place", "hub.outline_of")):
        session = new_session(folder / f"full-{number}", processes, MODES["zero3"], evaluate_every=9)
        full = mock.patch(f"mmvit.{failing}", side_effect=UserError("the disk is full"))
        with full if processes.is_main else nullcontext(), pytest.raises((UserError, SystemExit)) as met:
            run_training(session)
        assert str(met.value) == ("the disk is full" if processes.is_main else "2"), met.value


def check_decay_after_resuming(run: Path, processes: Processes, deepspeed: Path) -> None:
    """Decay is as it is configured now, not as it was when the checkpoint was written."""
    found, load = [], DeepSpeedEngine.load

    def watched(engine: DeepSpeedEngine, folder: Path) -> None:
        load(engine, folder)
        found.extend(group["weight_decay"] for group in engine.engine.optimizer.param_groups)

    settings = {"accumulation": 2, "steps": STEPS + 1, "weight_decay": 0.5}
    with mock.patch.object(DeepSpeedEngine, "load", watched):
        run_training(new_session(run, processes, deepspeed, resume=True, **settings))
    assert set(found) == {0.0, 0.5}, found


def resume_on_disks_apart(folder: Path, processes: Processes) -> None:
    """Each process is a node with a disk of its own, where the run folder has the same relative name."""
    nodes = [folder / f"node{rank}" for rank in range(2)]
    nodes[processes.rank].mkdir()
    os.chdir(nodes[processes.rank])

    def run(steps: int, resume: bool = True, output: Path = Path("run"), mode: str = "ddp") -> None:
        run_training(new_session(output, processes, MODES[mode], resume=resume, steps=steps))

    def refused(message: str, *, by_rank: int = 0, **more: object) -> None:
        with pytest.raises((UserError, SystemExit)) as caught:
            run(6, **more)
        expected = message if processes.rank == by_rank else "^2$"
        assert re.search(expected, str(caught.value)), caught.value

    for output in (folder / "shared", Path("run")):
        run(3, resume=False, output=output)
        run(5, output=output)  # node 1 has no checkpoint to go on from
    assert (nodes[processes.rank] / "run").exists() == processes.is_main
    processes.largest(0)
    theirs, ours = nodes[1] / STEP_5, nodes[0] / STEP_5
    where = re.escape(f"on {socket.gethostname()} in {nodes[1]}/run/checkpoints")
    processes.on_main(lambda: shutil.copytree(ours, theirs.with_name("step-00000009")))
    refused(f"different checkpoints: rank 1 {where} has step-00000009, and rank 0 .* has step-00000005")
    processes.on_main(
        lambda: shutil.move(theirs.with_name("step-00000009"), theirs.with_name("step-00000002"))
    )
    refused(f"different checkpoints: rank 1 {where} has step-00000002, and rank 0 .* has step-00000005")
    processes.on_main(lambda: shutil.move(theirs.with_name("step-00000002"), theirs))
    processes.on_main(lambda: write_json({}, theirs / MANIFEST))
    refused(rf"rank 1 {where} has a step-00000005 of content \w+, and rank 0 .* content \w+\. If")
    for output in (folder / "zero", Path("zero")):
        run(3, resume=False, output=output, mode="zero3")
        run(5, output=output, mode="zero3")


def main() -> None:
    """`FOLDER` is what each of the two processes does: every mode to the end, straight and resumed.
    `FOLDER MODE` resumes the run in that folder; `FOLDER apart` is `resume_on_disks_apart`.
    """
    folder, *mode = Path(sys.argv[1]), *sys.argv[2:]
    with open_processes("cpu", needs_group=True) as processes:
        if mode == ["apart"]:
            resume_on_disks_apart(folder, processes)
            return
        if mode:
            run_training(new_session(folder, processes, MODES[mode[0]], resume=True, accumulation=2))
            return
        check_mean_loss(processes)
        check_statistics(processes)
        check_same_start(processes)
        check_muon(processes)
        for mode, deepspeed in MODES.items():
            run_training(new_session(folder / mode, processes, deepspeed, accumulation=2))
            cut = folder / f"{mode}-cut"
            with pytest.raises(SystemExit, match="143"):
                run_training(new_session(cut, processes, deepspeed, accumulation=2), stop_before=5)
            run_training(new_session(cut, processes, deepspeed, resume=True, accumulation=2))
        check_conversions(folder, processes)
        check_full_disks(folder, processes)
        for mode, deepspeed in MODES.items():
            run_training(new_session(folder / f"{mode}-muon", processes, deepspeed, name="muon"))
        for mode in ("zero1", "zero3"):
            on = folder / f"{mode}-on"
            processes.on_main(lambda: shutil.copytree(folder / mode, on))  # noqa: B023
            check_decay_after_resuming(on, processes, MODES[mode])
        run_training(new_session(folder / "zero2-bf16", processes, MODES["zero2"], precision="bf16"))
        settings = {"deepspeed": ZERO["zero3"], "precision": "bf16"}
        run_training(new_session(folder / "zero3-bf16", processes, **settings))
        cut = folder / "zero3-bf16-cut"
        with pytest.raises(SystemExit, match="143"):
            run_training(new_session(cut, processes, **settings, evaluate_every=8), stop_before=3)
        run_training(new_session(cut, processes, **settings, resume=True, evaluate_every=2))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder with the runs of two processes in every mode."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("two")
    ended = start_two(__file__, folder)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The same recipe in this process alone: `averaged` weights or `plain` ones, and in `bf16`."""
    folder = tmp_path_factory.mktemp("one")
    alone = Processes(0, 1, torch.device("cpu"))
    run_training(new_session(folder / "averaged", alone))
    run_training(new_session(folder / "plain", alone, ema_decay=0.0))
    run_training(new_session(folder / "bf16", alone, precision="bf16"))
    return folder


def losses(run: Path, kind: str) -> list[float]:
    return [record["loss"] for record in RunFolder(run).read_metrics() if record["kind"] == kind]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_reach_the_loss_of_one(two_processes, one_process, mode):
    run, reference = two_processes / mode, one_process / "averaged"
    expected = losses(reference, "train")
    assert len(expected) == 3
    assert expected[-1] < 0.85 * expected[0]
    assert losses(run, "train") == pytest.approx(expected, rel=1e-4)
    assert losses(run, "held_out") == pytest.approx(losses(reference, "held_out"), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_exported_weights_are_whole_and_load_in_plain_torch(two_processes, one_process, mode):
    reference = Classifier.from_pretrained(one_process / "averaged" / "last")
    model = Classifier.from_pretrained(two_processes / mode / "last")
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
def test_one_process_told_to_stop_stops_both_and_they_resume(two_processes, mode):
    whole, cut = two_processes / mode, two_processes / f"{mode}-cut"
    steps = sorted(folder.name for folder in (cut / "checkpoints").iterdir())
    assert steps == ["step-00000003", "step-00000006"]
    assert losses(cut, "train") == losses(whole, "train")
    final = "checkpoints/step-00000006/model.safetensors"
    left, right = load_file(whole / final), load_file(cut / final)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mode", ["zero2-bf16", "zero3-bf16"])
def test_bf16_autocast_keeps_fp32_weights(two_processes, one_process, mode):
    weights = load_file(two_processes / mode / "last/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    expected = losses(one_process / "bf16", "train")
    assert losses(two_processes / mode, "train") == pytest.approx(expected, rel=0.03)
    assert expected != losses(one_process / "plain", "train")


def test_neither_stops_nor_evaluations_change_a_run_under_zero_3_in_bf16(two_processes):
    whole, cut = two_processes / "zero3-bf16", two_processes / "zero3-bf16-cut"
    assert losses(cut, "train") == losses(whole, "train")
    left, right = (load_file(run / "last/model.safetensors") for run in (whole, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in left.values())


def test_checkpoint_of_two_processes_resumes_in_one(two_processes, tmp_path):
    """Amid two lines of metrics: the means of both processes so far are in the next one."""
    shutil.copytree(two_processes / "ddp-cut", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    alone = Processes(0, 1, torch.device("cpu"))
    session = new_session(tmp_path / "run", alone, resume=True, accumulation=2)
    run_training(session)
    steps = [record["step"] for record in session.run.read_metrics() if record["kind"] == "train"]
    assert steps == [2, 4, 6]
    assert losses(session.run.path, "train") == pytest.approx(
        losses(two_processes / "ddp", "train"), rel=1e-4
    )


@pytest.mark.parametrize(("before", "after"), [("zero3", "ddp"), ("zero2", "zero1"), ("ddp", "zero3")])
def test_another_engine_and_number_of_processes_go_on(two_processes, tmp_path, before, after):
    shutil.copytree(two_processes / f"{before}-cut", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    ended = start_one(__file__, tmp_path / "run", after)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert losses(tmp_path / "run", "train") == pytest.approx(
        losses(two_processes / "ddp", "train"), rel=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_muon_goes_where_it_goes_in_one_process(two_processes, tmp_path, mode):
    run_training(new_session(tmp_path, Processes(0, 1, torch.device("cpu")), name="muon"))
    for kind in ("train", "held_out"):
        assert losses(two_processes / f"{mode}-muon", kind) == pytest.approx(losses(tmp_path, kind), rel=2e-3)


def test_a_run_folder_on_the_disk_of_the_main_process_alone_will_do(tmp_path):
    """The others are sent what they need, unless they see something else, or need shards."""
    ended = start_two(__file__, tmp_path, "apart")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-8000:]
    for shared, apart in (("shared", "node0/run"), ("zero", "node0/zero")):
        left, right = (
            load_file(tmp_path / run / STEP_5[4:] / "model.safetensors") for run in (shared, apart)
        )
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert losses(tmp_path / shared, "train") == losses(tmp_path / apart, "train")


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        (
            '{"train_batch_size": 8, "bf16": {"enabled": true}}',
            [],
            r"remove train_batch_size \(set train\.batch_size instead\), bf16",
        ),
        (
            '{"zero_optimization": {"stage": 5}}',
            [],
            r"zero_optimization\.stage: expected 0, 1, 2 or 3, got 5",
        ),
        ("{}", ["--optimizer.name", "lars"], r"lars works without --deepspeed only"),
        ("{", [], "is not valid JSON"),
        (None, [], r"no DeepSpeed settings at .*settings\.json"),
    ],
)
def test_settings_that_cannot_work_are_explained(
    tmp_path, tiny_shards, run_script, settings, overrides, message
):
    config, path = tmp_path / "config.toml", tmp_path / "settings.json"
    config.write_text(
        f"""
output = "{tmp_path}/run"
data = {{train = "{tiny_shards}/train-*.tar", held_out = "{tiny_shards}/held-out-*.tar"}}
model = {{image_size = 16, patch_size = 8, num_classes = 4, core = {{width = 16, depth = 1, num_heads = 2}}}}
"""
    )
    if settings is not None:
        path.write_text(settings)
    ended = run_script("pipelines/train_classifier.py", config, "--deepspeed", path, *overrides)
    assert ended.returncode == 2
    assert re.search(message, ended.stderr)
    assert "Traceback" not in ended.stderr


def test_zero_3_command_trains_a_model_without_prefix_tokens(tmp_path, tiny_shards):
    """The README's third command on two processes: every weight is sharded, and none of them is empty."""
    pytest.importorskip("deepspeed")
    settings = json.loads(ZERO["zero3"].read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else tiny weights stay whole
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    (tmp_path / "config.toml").write_text(
        f"""
output = "{tmp_path}/run"
data = {{train = "{tiny_shards}/train-*.tar", held_out = "{tiny_shards}/held-out-*.tar"}}
model = {{preset = "vit-modern", image_size = 16, stem_width = 8, num_classes = 4, \
core = {{width = 16, depth = 1, num_heads = 2}}}}
train = {{steps = 4, batch_size = 8, log_every = 1, num_workers = 0}}
"""
    )
    options = ("--deepspeed", tmp_path / "zero3.json", "--optimizer.name", "adamw", "--train.ema_decay", 0)
    ended = start_two("pipelines/train_classifier.py", tmp_path / "config.toml", *options)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-8000:]
    found = losses(tmp_path / "run", "train")
    assert len(found) == 4
    assert found[-1] < found[0]
    model = Classifier.from_pretrained(tmp_path / "run" / "last")
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_bug_in_a_data_worker_of_one_process_ends_both(tmp_path, tiny_shards):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "folder, here, shards = map(Path, sys.argv[1:])\n"
        "sys.path.insert(0, str(here)); import test_distributed as tests; from tiny_streams import *\n"
        "with tests.open_processes('cpu') as processes:\n"
        "    session = tests.new_session(folder, processes, steps=100_000)\n"
        "    split = {'rank': processes.rank, 'world_size': 2, 'num_workers': 2}\n"
        "    stream = stream_of(shards, Broken((8, 8), 4), **split)\n"
        "    tests.train(session, tests.Classifier(tests.MODEL), stream)\n"
    )
    ended = start_two(script, tmp_path / "run", Path(__file__).parent, tiny_shards)
    assert ended.returncode == 1
    assert "RuntimeError: a data worker failed:" in ended.stderr
    assert re.search(r"ValueError: .* same shape\n.*while stacking labels of .*train-025", ended.stderr)


def test_ready_settings_are_of_their_stage_and_leave_small_buffers():
    for stage, path in enumerate(ZERO.values()):
        settings = json.loads(path.read_text())["zero_optimization"]
        assert settings.pop("stage") == stage
        assert all(size <= 10**8 for size in settings.values())


if __name__ == "__main__":
    run_script(main)
