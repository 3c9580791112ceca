"""Tiny trainings in forked processes, which spares each the seconds of importing torch; and whether two runs
are equal bit for bit."""

import contextlib
import importlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmvit import cli
from mmvit.data.writing import ShardWriter
from mmvit.models.vq import VQConfig, VQModel
from mmvit.training import RunFolder
from mmvit.training.checkpoint import read_state
from mmvit.training.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
TRAIN = """
    [train]
    steps = 6
    batch_size = 8
    num_workers = 0
    log_every = 1
    evaluate_every = 3
    checkpoint_every = 2
    keep_checkpoints = 2
    precision = "fp32"
    ema_decay = 0.9
"""
CORE = "{ width = 16, depth = 1, num_heads = 2, dropout = 0.1 }"
KINDS = {
    "classifier": """
    task = "classifier"
    [data]
    train = "{data}/images/train-*.tar"
    held_out = "{data}/images/held-out-*.tar"
    augment = {{ crop_padding = 2, flip = 0.5 }}
    [model]
    image_size = 16
    patch_size = 8
    num_classes = 4
    core = {core}
""",
    "generator": """
    task = "generator"
    [data]
    train = "{data}/codes/train-*.tar"
    held_out = "{data}/codes/held-out-*.tar"
    image_tokenizer = "{data}/tokenizer"
    text_tokenizer = "{root}/tokenizers/emoji-text"
    bpe_dropout = 0.1
    [model]
    text_length = 8
    core = {core}
    [preview]
    captions = []
""",
    "joint": """
    task = "joint"
    [classes]
    train = "{data}/images/train-*.tar"
    held_out = "{data}/images/held-out-*.tar"
    [captions]
    train = "{data}/codes/train-*.tar"
    held_out = "{data}/codes/held-out-*.tar"
    image_tokenizer = "{data}/tokenizer"
    text_tokenizer = "{root}/tokenizers/emoji-text"
    [model]
    core = {core}
    classifier = {{ image_size = 16, patch_size = 8, num_classes = 4 }}
    generator = {{ text_length = 8 }}
    [preview]
    captions = []
""",
}
MODES = {"alone": (1, None), "ddp": (2, None), "zero2": (2, "zero2"), "zero3": (2, "zero3")}
CHILD_ENDS: list[Callable[[], object]] = []  # what a forked process calls at its end
PASSING = {"seconds", "lr"}
PATIENCE = 240  # seconds until a run that should have ended counts as hanging


@dataclass
class Tally:
    """How often a harm was done, and where it was not held."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, problem: str) -> None:
        """Counts one try; `problem` is "" if it was held."""
        self.tried += 1
        if problem:
            self.failures.append(problem)
            print(f"NOT HELD: {problem}", flush=True)


def prepare(folder: Path) -> None:
    """Makes the data, a tokenizer and a recipe of each kind in `folder`."""
    import deepspeed  # noqa: F401  before any fork

    torch.set_num_threads(1)
    write_images(folder / "images")
    torch.manual_seed(0)
    VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16))).save_pretrained(
        folder / "tokenizer"
    )
    arguments = ["encode", folder / "images", folder / "codes", "--tokenizer", folder / "tokenizer"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([*map(str, arguments), "--size", "16"])
    for kind, text in KINDS.items():
        recipe = text.format(data=folder, root=ROOT, core=CORE) + TRAIN
        (folder / f"{kind}.toml").write_text("\n".join(line.strip() for line in recipe.splitlines()))
    for kind, mode in {**dict.fromkeys(KINDS, "alone"), "classifier": "zero3"}.items():
        import_ahead(folder, kind, mode)


def write_images(folder: Path) -> None:
    """Writes shards of 48 training images and 8 held-out ones."""
    rng = random.Random(0)
    for split, count in (("train", 48), ("held-out", 8)):
        with ShardWriter(folder, split, samples_per_shard=10) as writer:
            for number in range(count):
                name, colour = list(COLOURS.items())[number % 4]
                noise = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3) // 8
                png = io.BytesIO()
                Image.fromarray((np.array(colour) * 7 // 8 + noise).astype(np.uint8)).save(png, "PNG")
                files = {"png": png.getvalue(), "cls": b"%d" % (number % 4), "txt": f"{name} square".encode()}
                writer.write(f"{split}-{number:03d}", files)


def import_ahead(folder: Path, kind: str, mode: str) -> None:
    """Imports what a training imports, so that those forked later need not."""
    listed = folder / "modules.json"

    def list_modules(rank: int) -> None:
        if rank == 0:
            CHILD_ENDS.append(lambda: listed.write_text(json.dumps(sorted(sys.modules))))

    Job(folder, kind, mode, folder / f"first-{kind}", before=list_modules).wait()
    for name in json.loads(listed.read_text()):
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


class Job:
    """One `mmvit train` in one or two processes of a group of their own."""

    started = 0

    def __init__(
        self,
        data: Path,
        kind: str,
        mode: str,
        output: Path,
        *settings: object,
        before: Callable[[int], None] = lambda rank: None,
    ):
        """`before(rank)` is called in each process before it trains."""
        world, zero = MODES[mode]
        Job.started += 1
        self.log = data / "logs" / f"{Job.started}.txt"
        self.log.parent.mkdir(exist_ok=True)
        arguments = ["train", data / f"{kind}.toml", "--output", output, *settings]
        if zero:
            arguments += ["--deepspeed", zero, "--optimizer.name", "adamw"]
        if zero == "zero3":
            arguments += ["--train.ema_decay", "0"]
        port = free_port()
        self.began = time.monotonic()
        self.pids: list[int] = []
        for rank in range(world):
            sys.stdout.flush()
            if pid := os.fork():
                self.pids.append(pid)
                with contextlib.suppress(OSError):
                    os.setpgid(pid, self.pids[0])
                continue
            code = 1
            try:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                code = child([*map(str, arguments)], self.log, rank, world, port, before)
            finally:
                os._exit(code)
        self.codes: dict[int, int] = {}

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes, with their data workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def wait(self, patience: float = PATIENCE) -> list[int] | None:
        """The exit codes by rank (negative: the signal that killed it); None if it hangs, which ends it."""
        end = time.monotonic() + patience
        while len(self.codes) < len(self.pids):
            for pid in self.pids:
                if pid not in self.codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                self.kill()
                for pid in self.pids:
                    if pid not in self.codes:
                        os.waitpid(pid, 0)
                return None
            time.sleep(0.005)
        self.seconds = time.monotonic() - self.began
        self.kill()  # data workers that a killed process has left
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def child(
    arguments: list[str], log: Path, rank: int, world: int, port: int, before: Callable[[int], None]
) -> int:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    RunFolder.draw_curves = lambda run: run.curves.touch()  # most of the time of a tiny run
    code = 0
    try:
        before(rank)
        cli.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.settrace(None)
    for call in CHILD_ENDS:
        call()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def go_on(whole: Path, data: Path, kind: str, mode: str, output: Path, *settings: object) -> str:
    """Resumes a run to its end; returns what went wrong, or how it differs from the run `whole`, or ""."""
    job = Job(data, kind, mode, output, *settings, *(("--resume",) if output.is_dir() else ()))
    codes = job.wait()
    if codes is None:
        return "the resumed run hangs"
    if any(codes):
        return f"the resumed run ended with {codes}: {job.said()[-600:]}"
    problem = difference(whole, output)
    return problem and f"after resuming, {problem} is not that of an uninterrupted run"


def told(job: Job) -> str:
    """What is wrong with how a run that could not go on said so; "" for code 2 and one line of error."""
    codes, said = job.wait(), job.said()
    if codes is None:
        return "hangs"
    if set(codes) != {2} or "error: " not in said or "Traceback" in said:
        return f"ended with {codes}: {said[-600:]}"
    return ""


def difference(left: Path, right: Path) -> str:
    """What two run folders differ in; "" if nothing but times does."""
    for name in ("last", "best"):
        if problem := files_differ(left / name, right / name):
            return f"{name}/{problem}"
    final = sorted(folder.name for folder in (left / "checkpoints").glob("step-*"))[-1]
    folders = left / "checkpoints" / final, right / "checkpoints" / final
    if not folders[1].is_dir():
        return f"{final} is missing"
    if not same(read_state(folders[0] / "training.pt"), read_state(folders[1] / "training.pt")):
        return f"{final}/training.pt"
    if problem := files_differ(*folders, leave=("training.pt", "manifest.json", "recipe.json")):
        return f"{final}/{problem}"
    if metrics(left) != metrics(right):
        return "metrics.jsonl"
    return ""


def files_differ(left: Path, right: Path, leave: tuple[str, ...] = ()) -> str:
    names = [
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        for folder in (left, right)
    ]
    if names[0] != names[1]:
        return f"has {names[1]}, not {names[0]}"
    for name in names[0]:
        if Path(name).name in leave or (left / name).read_bytes() == (right / name).read_bytes():
            continue
        if not name.endswith(".pt") or not same(load(left / name), load(right / name)):
            return name
    return ""


def load(path: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Whether two states are equal bit for bit, but for seconds, and rates, which each step sets anew."""
    if isinstance(left, dict):
        keys = left.keys() - PASSING
        return keys == right.keys() - PASSING and all(same(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if type(left).__module__.startswith("deepspeed"):
        return same(vars(left), vars(right))
    return left == right or left is right


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]
