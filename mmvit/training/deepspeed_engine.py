"""The DeepSpeed engine: ZeRO 0 to 3 from a JSON file. Only this file imports deepspeed, lazily."""

import ctypes
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from mmvit.core.transformer import Transformer
from mmvit.errors import UserError
from mmvit.sharding import outline_of, sharding, state_of
from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import FailedElsewhere, Processes, choose_precision
from mmvit.training.engine import AVERAGE, LossModule, check_average, move_average, share_buffers, tensors_to
from mmvit.training.flat_muon import FlatMuon
from mmvit.training.moments import (
    MOMENTS,
    STEP,
    check_optimizer,
    check_trained,
    sent_one_by_one,
    write_optimizer,
)
from mmvit.training.optim import Optimizer
from mmvit.training.shards import Piece, Shards, whole_of
from mmvit.weights import WEIGHTS, check_fit, write_weights

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
    """A model under DeepSpeed with our own optimizers: fp32 weights, autocast to bf16 as in plain torch.

    In stage 3 no process ever has more than its share of the weights and a layer; models are built within
    `building`. Each process averages its own part of the weights. Checkpoints hold whole tensors by name,
    which the main process writes one at a time, for any engine and number of processes.
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
        self.precision = choose_precision(train.precision, processes.device)
        self.model = model.to(processes.device).train()
        self.optimizer = Optimizer(model, optimizer, train.steps, flat=True)
        configuration = complete(settings, train, processes, self.precision)
        self.engine, *_ = deepspeed.initialize(
            model=LossModule(model),
            optimizer=self.optimizer.parts[0],
            config=configuration,
        )
        for group in distributed_c10d._world.pg_map:  # DeepSpeed's own groups wait half an hour
            distributed_c10d._set_pg_timeout(timedelta(seconds=train.timeout), group)
        if self.stage == 3:
            keep_weights_once(self.engine.optimizer)
            give_memory_back()
        self.shards = Shards(self.stage, self.engine.optimizer, self.optimizer.parts[0])
        if isinstance(self.optimizer.parts[0], FlatMuon):
            self.optimizer.parts[0].shards = self.shards
        self.average = [each.detach().clone() for each in self.averaged_tensors()] if train.ema_decay else []
        self.passes = 0
        self.at_once = []
        if self.stage == 3:
            self.at_once = [*loose_parameters(model)]
            for parameter in self.at_once:
                deepspeed.zero.register_external_parameter(self.engine.module, parameter)
            if not any(isinstance(module, Transformer) for module in model.modules()):
                self.at_once = [*model.parameters()]
        self.zero_parameters = deepspeed.zero.GatheredParameters
        self.how = ZeroThree(configuration, processes) if self.stage == 3 else None

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
        if self.average:
            move_average(self.average, self.averaged_tensors(), self.train.ema_decay, number)
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def rate(self) -> float:
        return self.optimizer.rate

    def averaged_tensors(self) -> list[Tensor]:
        """What this process averages: its part of the trained weights, and the buffers."""
        return [*(flat.values.detach() for flat in self.shards.flats), *self.model.buffers()]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has its averaged weights."""
        self.exchange_average()
        try:
            yield
        finally:
            self.exchange_average()

    @torch.no_grad()
    def exchange_average(self) -> None:
        if self.average:
            weights = len(self.shards.flats)
            self.shards.exchange(self.average[:weights])
            for average, buffer in zip(self.average[weights:], self.model.buffers(), strict=True):
                before = buffer.clone()
                buffer.copy_(average)
                average.copy_(before)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        autocast = self.precision != torch.float32
        with sharding(self.how), self.averaged():
            share_buffers(self.model, self.processes)
            self.model.eval()
            try:
                with (
                    torch.no_grad(),
                    self.gathered(),
                    torch.autocast(self.processes.device.type, self.precision, enabled=autocast),
                ):
                    yield self.model
            finally:
                self.model.train()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which parameters outside of layers are whole.

        After it, small ones are as before: gathered again for the next pass, they would come in bf16, and
        training would depend on evaluations.
        """
        if self.stage < 3:
            yield
            return
        small = [p for p in self.engine.optimizer.persistent_parameters if p.ds_status.name == "AVAILABLE"]
        hidden = [p for p in self.at_once if p.ds_status.name != "AVAILABLE"]
        for parameter in self.at_once:
            parameter.is_external_param = True  # not released with the module that has it
        try:
            with self.zero_parameters(hidden) if hidden else nullcontext():
                yield
        finally:
            for parameter in self.at_once:
                parameter.is_external_param = False
            if small:
                small[0].all_gather(small)

    def save(self, folder: Path) -> None:
        with sharding(self.how):
            layout = dict(outline_of(self.model))
            self.processes.together(lambda: self.write(layout, state_of(self.model), folder / WEIGHTS))
            if self.average:
                with self.averaged():
                    self.processes.together(
                        lambda: self.write(layout, state_of(self.model), folder / AVERAGE)
                    )
            self.processes.together(lambda: self.write(self.outline(), self.moments(), folder / MOMENTS))
        if self.processes.is_main:
            write_optimizer(self.optimizer, folder)

    def write(self, layout: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], path: Path) -> None:
        """Writes whole tensors from the main process; the others help to join them."""
        if self.processes.is_main:
            write_weights(layout, path, tensors)
        else:
            deque(tensors, maxlen=0)

    def kept(self) -> Iterator[tuple[str, Tensor, Piece]]:
        """Every tensor of the optimizer's state, flat, by the names that `moments_of` gives it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for flat in self.shards.flats:
            for key, values in self.optimizer.parts[0].state.get(flat.values, {}).items():
                for piece in flat.pieces:
                    yield f"{key}/{names[id(piece.parameter)]}", values, piece

    def outline(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(() if name.startswith(f"{STEP}/") else piece.shape, device="meta")
            for name, _, piece in self.kept()
        }

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors of the optimizer's state."""
        for name, values, piece in self.kept():
            yield name, values if name.startswith(f"{STEP}/") else self.shards.join([piece], values)[0]

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        check_optimizer(folder, self.optimizer, self.processes)
        own = self.model.state_dict(keep_vars=True)
        buffers = {id(buffer): place for place, buffer in enumerate(self.model.buffers())}

        def fits(path: Path) -> Iterator[tuple[str, Tensor]]:
            return sent_one_by_one(path, self.processes, lambda shapes: self.check_fit(shapes, path))

        for name, tensor in fits(folder / WEIGHTS):
            self.take(own[name], tensor)
        self.shards.show()
        if self.average:
            check_average(folder, self.processes)
            for name, tensor in fits(folder / AVERAGE):
                if id(own[name]) in buffers:
                    self.average[len(self.shards.flats) + buffers[id(own[name])]].copy_(tensor)
                elif id(own[name]) in self.shards.places:
                    self.take(own[name], tensor, self.average)
        trained = {name: p for name, p in self.model.named_parameters() if id(p) in self.shards.places}
        for name, tensor in sent_one_by_one(
            folder / MOMENTS, self.processes, lambda shapes: check_trained(shapes, trained)
        ):
            key, _, parameter = name.partition("/")
            number, piece = self.shards.places[id(trained[parameter])]
            values = self.shards.flats[number].values
            state = self.optimizer.parts[0].state[values]
            if key == STEP:
                state[key] = tensor.to(values.device)
            else:
                self.shards.put(piece, state.setdefault(key, torch.zeros_like(values)), tensor)

    def check_fit(self, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
        with sharding(self.how):
            check_fit(self.model, shapes, str(path))

    def take(self, tensor: Tensor, whole: Tensor, flats: list[Tensor] | None = None) -> None:
        """Sets a weight or a buffer of the model, or what stands for it in `flats`, to `whole`."""
        if id(tensor) in self.shards.places:
            number, piece = self.shards.places[id(tensor)]
            values = self.shards.flats[number].values if flats is None else flats[number]
            self.shards.put(piece, values, whole)
        elif hasattr(tensor, "ds_id"):  # frozen, and shared out
            share = tensor.ds_tensor
            own = whole.reshape(-1)[self.processes.rank * share.numel() :][: share.numel()]
            share[: len(own)].copy_(own)
        else:
            tensor.copy_(whole)


class ZeroThree:
    """How stage 3 shares out the weights of a model (`mmvit.sharding`)."""

    def __init__(self, settings: dict[str, Any], processes: Processes):
        self.zero = import_deepspeed(processes.device).zero
        self.settings, self.processes = settings, processes

    def share(self, module: nn.Module) -> None:
        self.zero.Init(module=module.to(self.processes.device), config_dict_or_path=self.settings)
        give_memory_back()

    @contextmanager
    def whole(self, tensors: list[Tensor]) -> Iterator[None]:
        shared = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        with self.zero.GatheredParameters(shared, modifier_rank=0):
            yield
        if shared:
            give_memory_back()

    def shape(self, tensor: Tensor) -> torch.Size:
        return getattr(tensor, "ds_shape", tensor.shape)

    def read(self, tensor: Tensor) -> Tensor:
        return whole_of(tensor) if hasattr(tensor, "ds_id") else tensor.detach()

    def begin(self, fails: bool = False) -> None:
        self.begun = True
        if any(self.processes.largest(fails)) and not fails:
            raise FailedElsewhere(2)

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """A context in which every process reads the model once; what fails before that ends all."""
        self.begun = False
        try:
            yield
        except BaseException:
            if not self.begun:
                self.begin(fails=True)
            raise


def give_memory_back() -> None:
    """Returns what the allocator of C keeps of freed layers, in all as much as a model, to the system."""
    with suppress(AttributeError):  # of other C libraries than glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def building(train: TrainConfig, processes: Processes, path: Path | None) -> Iterator[None]:
    """A context in which models are built as the engine for DeepSpeed's settings in `path` wants them."""
    how = None
    if zero_stage(path) == 3:
        precision = choose_precision(train.precision, processes.device)
        how = ZeroThree(complete(read_settings(path), train, processes, precision), processes)
    with sharding(how):
        yield


def complete(
    settings: dict[str, Any], train: TrainConfig, processes: Processes, precision: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's settings, with what the recipe decides."""
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **settings,
        "train_micro_batch_size_per_gpu": train.batch_size // (train.accumulation * processes.world_size),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_norm,
        "torch_autocast": {"enabled": precision != torch.float32, "dtype": "bfloat16"},
    }


def keep_weights_once(zero: Any) -> None:
    """Lets the weights that the optimizer trains be those that the model computes with, both of fp32.

    DeepSpeed means to do so, but compares devices with their names, and copies.
    """
    for master, shown in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
    ):
        if shown is not None and (shown.dtype, shown.device) == (master.dtype, master.device):
            master.data = shown.data


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
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # the tests try ours
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
    if optimizer.name == "lars":
        raise UserError(
            "optimizer.name lars works without --deepspeed only: it needs the norms of whole matrices, which "
            "ZeRO shards; use adamw, muon or sgd"
        )
    if train.compile:
        raise UserError("train.compile works without --deepspeed only; set it to false")
