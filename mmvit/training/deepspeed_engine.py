"""The DeepSpeed engine: ZeRO 0 to 3 from a JSON file. Only this file imports deepspeed, lazily."""

import copy
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from mmvit.errors import UserError, refuse, shorten
from mmvit.files import write_json
from mmvit.training.checkpoint import MANIFEST, damaged, problem_of, read_json, sizes_of
from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import Processes, choose_precision
from mmvit.training.engine import (
    AVERAGE,
    LossModule,
    WeightAverage,
    cpu_weights,
    load_average,
    share_buffers,
    tensors_of,
    tensors_to,
)
from mmvit.training.optim import Optimizer, settings_kept
from mmvit.weights import WEIGHTS, write_weights

TAG = "deepspeed"  # folder of the sharded state inside a checkpoint
LAYOUT = "deepspeed.json"  # what it is sharded for
OURS = {  # keys of DeepSpeed's JSON that the recipe decides
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "[optimizer]",
    "scheduler": "optimizer.schedule",
}


class DeepSpeedEngine:
    """A model under DeepSpeed with our own AdamW: fp32 weights, autocast to bf16 as in plain torch.

    In stage 3 weights are sharded in training; evaluation and export gather them into a whole copy.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        processes: Processes,
        settings_path: Path,
    ):
        deepspeed = import_deepspeed(processes.device)
        settings = read_settings(settings_path)
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        check_supported(self.stage, train, optimizer, processes.device)
        self.train, self.processes = train, processes
        self.layout = {"zero_stage": self.stage, "processes": processes.world_size}
        self.precision = choose_precision(train.precision, processes.device)
        model = model.to(processes.device).train()
        self.average = WeightAverage(model, train.ema_decay) if train.ema_decay else None
        self.gathered = copy.deepcopy(model).eval().requires_grad_(False) if self.stage == 3 else None
        self.optimizer = Optimizer(model, optimizer, train.steps)
        self.zero_parameters = deepspeed.zero.GatheredParameters
        micro_batch_size = train.batch_size // (train.accumulation * processes.world_size)
        self.engine, *_ = deepspeed.initialize(
            model=LossModule(model),
            optimizer=self.optimizer.parts[0],
            config={
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 10**9,
                **settings,
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": train.accumulation,
                "gradient_clipping": train.clip_norm,
                "torch_autocast": {"enabled": self.precision != torch.float32, "dtype": "bfloat16"},
            },
        )
        for group in distributed_c10d._world.pg_map:  # DeepSpeed's own groups wait half an hour
            distributed_c10d._set_pg_timeout(timedelta(seconds=train.timeout), group)
        self.model = model
        self.passes = 0
        if self.stage == 3:
            for parameter in loose_parameters(model):
                deepspeed.zero.register_external_parameter(self.engine.module, parameter)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.passes += 1
        return self.engine(tensors_to(batch, self.processes.device))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if self.passes < self.train.accumulation:
            self.engine.step()  # only counts the pass

    def step(self, number: int) -> float:
        self.passes = 0
        self.optimizer.set_rate(number)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # stage 0 reports no norm
        norm = nn.utils.get_total_norm(gradients) if self.stage == 0 else None
        self.engine.step()
        if self.average is not None:
            self.average.update(self.model, number)
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def rate(self) -> float:
        return self.optimizer.rate

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        model = self.whole_model() if self.average is None else self.average.model
        share_buffers(model, self.processes)
        autocast = self.precision != torch.float32
        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.processes.device.type, self.precision, enabled=autocast),
            ):
                yield model
        finally:
            self.model.train()

    def whole_model(self) -> nn.Module:
        """The model with all its weights in this process; every process must call it.

        What is whole already (small weights, after a step) must stay so: gathered again for the next pass, it
        would come in bf16, and training would depend on when it was evaluated.
        """
        if self.gathered is None:
            return self.model
        with torch.no_grad():
            for whole, part in zip(tensors_of(self.gathered), tensors_of(self.model), strict=True):
                is_whole = not hasattr(part, "ds_id") or part.ds_status.name == "AVAILABLE"
                with nullcontext() if is_whole else self.zero_parameters(part):
                    whole.copy_(part)
        return self.gathered

    def save(self, folder: Path) -> None:
        try:
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # where torch writes files
                raise
            refuse(f"the shards in {folder / TAG} cannot be written, likely because the disk is full")
        self.processes.largest(0)  # all have written now
        self.processes.on_main(lambda: self.check_all_shards(folder))
        model = self.whole_model()
        if self.processes.is_main:
            write_json(self.layout, folder / LAYOUT)
            write_weights(cpu_weights(model), folder / WEIGHTS)
            if self.average is not None:
                write_weights(cpu_weights(self.average.model), folder / AVERAGE)

    def load(self, folder: Path) -> None:
        def read_manifest() -> tuple[dict[str, int], list[int]]:
            if not (folder / LAYOUT).is_file():
                raise UserError(f"{folder} was written without DeepSpeed: resume without --deepspeed")
            layout = read_json(folder / LAYOUT)
            if layout != self.layout:
                raise UserError(
                    f"{folder} was sharded for {layout}; this run has {self.layout}. Resume with the same "
                    "stage and number of processes, or start a new run"
                )
            return read_json(folder / MANIFEST)["bytes"], identity(folder)

        sizes, read_through = self.processes.from_main(read_manifest)
        self.processes.together(lambda: self.check_own_copy(folder, sizes, read_through))
        with settings_kept(self.engine.optimizer):
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise damaged(folder, f"DeepSpeed finds no state in {TAG}/")
        if self.average is not None:
            load_average(self.average.model, folder, self.processes)

    def check_all_shards(self, folder: Path) -> None:
        """Raises UserError if the shards of other processes are not in `folder`."""
        shards = [
            f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(self.processes.world_size)
        ]
        missing = [name for name in shards if self.stage and not (folder / TAG / name).is_file()]
        if missing:
            raise UserError(
                f"{folder / TAG} lacks {shorten(missing)}: under ZeRO each process writes its shard, so the "
                "run folder must be on a disk that all hosts share"
            )

    def check_own_copy(self, folder: Path, sizes: dict[str, int], read_through: list[int]) -> None:
        """Raises UserError unless this process sees the shards that the main one does, or a whole copy."""
        found = sizes_of(folder)
        missing = [name for name, size in sizes.items() if name.startswith(TAG) and found.get(name) != size]
        problem = f"{shorten(missing)} missing" if missing else ""
        if not problem and identity(folder) != read_through:
            problem = problem_of(folder)
        if problem:
            raise UserError(
                f"rank {self.processes.rank} on {socket.gethostname()} cannot resume from "
                f"{folder.resolve()}: {problem}. Under ZeRO each process reads its shard: put the run folder "
                "on a disk that all hosts share, or copy it to each"
            )


def identity(folder: Path) -> list[int]:
    """What tells a checkpoint from its copy, also over a network."""
    found = (folder / MANIFEST).stat()
    return [found.st_ino, found.st_mtime_ns]


def loose_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters outside the layers of torch.nn: positions, [CLS] and the like.

    A model may read them outside the forward pass of the module that owns them, too early for stage 3 to
    gather them, so they are gathered for the whole pass.
    """
    for module in model.modules():
        if not type(module).__module__.startswith("torch.nn."):
            yield from module.parameters(recurse=False)


def import_deepspeed(device: torch.device) -> Any:
    """Imports deepspeed for the accelerator of `device`, and silences all but its warnings."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs DeepSpeed, which could not be imported ({error}). On Linux: pip install "
            "deepspeed. Without --deepspeed the same command trains with plain torch, also under torchrun"
        ) from None
    logger.setLevel(logging.WARNING)
    if device.type == "cpu":  # or it runs a compiler at start-up, for operators that gloo does not need
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def zero_stage(path: Path | None) -> int:
    """The ZeRO stage in DeepSpeed's JSON settings, 0 without any."""
    return read_settings(path).get("zero_optimization", {}).get("stage", 0) if path else 0


def read_settings(path: Path) -> dict[str, Any]:
    """DeepSpeed's JSON, without the keys that the recipe decides.

    Raises:
        UserError: for an unreadable file, and for keys that belong in the recipe.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"no DeepSpeed settings at {path}; shipped ones are zero0, zero1, zero2 and zero3"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(f"{path}: expected a JSON object with a section zero_optimization, as in zero2.json")
    if clashes := [f"{key} (set {OURS[key]} instead)" for key in settings if key in OURS]:
        raise UserError(f"{path} contradicts the recipe; remove {', '.join(clashes)}")
    return settings


def check_supported(stage: Any, train: TrainConfig, optimizer: OptimizerConfig, device: torch.device) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"DeepSpeed supports cpu and cuda here, not {device.type}; remove --deepspeed")
    if optimizer.name in ("muon", "lars"):
        raise UserError(
            f"optimizer.name {optimizer.name} works without --deepspeed only: it needs whole matrices, which "
            "ZeRO shards; use adamw"
        )
    if train.compile:
        raise UserError("train.compile works without --deepspeed only; set it to false")
    if stage == 3 and train.ema_decay:
        raise UserError(
            "train.ema_decay needs whole weights in every step, which ZeRO 3 shards; set it to 0, or use "
            "stage 2"
        )
