"""Engines hold a model and its optimizer and take training steps: the interface, and plain torch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mmvit.errors import UserError
from mmvit.sharding import Sharding
from mmvit.training.checkpoint import read_state
from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import Processes, choose_precision
from mmvit.training.moments import (
    MOMENTS,
    check_optimizer,
    check_trained,
    moments_of,
    sent_one_by_one,
    set_moments,
    write_optimizer,
)
from mmvit.training.optim import Optimizer
from mmvit.weights import WEIGHTS, check_fit, has_weights, write_weights

AVERAGE = "average.safetensors"
OPTIMIZER = "optimizer.pt"  # of earlier versions


class Engine(Protocol):
    """What the loop needs: `loss` and `backward` for each of `train.accumulation` passes, then one `step`."""

    how: Sharding | None  # by which processes share out weights, so that none can draw or export alone

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's loss and metrics for the tensors of a batch, which are moved to the device."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss / accumulation`; processes exchange gradients in a step's last pass."""

    def step(self, number: int) -> float:
        """Takes optimizer step `number` (from 1). Returns the gradient's norm before clipping."""

    def rate(self) -> float:
        """The learning rate of the last step."""

    def evaluating(self) -> Iterator[nn.Module]:
        """A context with the model to evaluate and export: averaged if that is on, in evaluation mode; every
        process must enter it."""

    def save(self, folder: Path) -> None:
        """Writes weights, average and optimizer into `folder`; every process must call it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; every process must call it. What all hold alike, the main process reads
        and sends to the others."""


class LossModule(nn.Module):
    """Calls `model.loss` as a forward pass, which is what DDP, DeepSpeed and torch.compile wrap."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch)


class WeightAverage:
    """An exponential moving average of a model's parameters and buffers.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the steps n, so that a short run
    does not average over its start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, number: int) -> None:
        """Moves towards `model` after its optimizer step `number`."""
        move_average([*tensors_of(self.model)], [*tensors_of(model)], self.decay, number)


@torch.no_grad()
def move_average(averages: list[Tensor], currents: list[Tensor], decay: float, number: int) -> None:
    """Moves `averages` towards `currents` after optimizer step `number`."""
    decay = min(decay, (1 + number) / (10 + number))
    moving, fixed = [], []
    for average, current in zip(averages, currents, strict=True):
        (moving if average.is_floating_point() else fixed).append((average, current.detach()))
    if moving:
        averages, currents = zip(*moving, strict=True)
        get_ema_multi_avg_fn(decay)(list(averages), list(currents), number)
    for average, current in fixed:
        average.copy_(current)


class TorchEngine:
    """Plain torch: autocast, clipping, our optimizers, averaged weights; DDP with several processes."""

    how = None

    def __init__(
        self, model: nn.Module, train: TrainConfig, optimizer: OptimizerConfig, processes: Processes
    ):
        self.train, self.processes = train, processes
        self.model = model.to(processes.device).train()
        self.precision = choose_precision(train.precision, processes.device)
        self.optimizer = Optimizer(self.model, optimizer, train.steps)
        self.wrapped: nn.Module = LossModule(self.model)
        if train.compile:
            self.wrapped.compile()
        if processes.world_size > 1:
            self.wrapped = DistributedDataParallel(self.wrapped, gradient_as_bucket_view=True)
        # last: DDP gives all processes the weights of the main one, which may have started from other files
        self.average = WeightAverage(self.model, train.ema_decay) if train.ema_decay else None
        self.passes = 0

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.passes += 1
        if isinstance(self.wrapped, DistributedDataParallel):  # what DDP.no_sync does
            self.wrapped.require_backward_grad_sync = self.passes == self.train.accumulation
        with self.autocast():
            return self.wrapped(tensors_to(batch, self.processes.device))

    def backward(self, loss: Tensor) -> None:
        (loss / self.train.accumulation).backward()

    def step(self, number: int) -> float:
        self.passes = 0
        self.optimizer.set_rate(number)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model, number)
        return norm.item()

    def rate(self) -> float:
        return self.optimizer.rate

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.processes.device.type, self.precision, enabled=self.precision != torch.float32
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        model = self.model if self.average is None else self.average.model
        share_buffers(model, self.processes)
        model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield model
        finally:
            self.model.train()

    def save(self, folder: Path) -> None:
        if not self.processes.is_main:
            return
        write_weights(self.model.state_dict(), folder / WEIGHTS)
        if self.average is not None:
            write_weights(self.average.model.state_dict(), folder / AVERAGE)
        write_weights(moments_of(self.optimizer, self.model), folder / MOMENTS)
        write_optimizer(self.optimizer, folder)

    def load(self, folder: Path) -> None:
        def is_old() -> bool:
            return (folder / OPTIMIZER).is_file()

        old = self.processes.from_main(is_old)
        if not old:
            check_optimizer(folder, self.optimizer, self.processes)
        receive(self.model, folder / WEIGHTS, self.processes)
        if self.average is not None:
            check_average(folder, self.processes)
            receive(self.average.model, folder / AVERAGE, self.processes)
        if old:
            state = self.processes.from_main(lambda: read_state(folder / OPTIMIZER)["optimizer"])
            self.optimizer.load_state_dict(state)
            return
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        moments = sent_one_by_one(
            folder / MOMENTS, self.processes, lambda shapes: check_trained(shapes, trained)
        )
        set_moments(self.optimizer, self.model, moments)


def receive(model: nn.Module, path: Path, processes: Processes) -> None:
    """Loads weights that the main process alone reads. Raises UserError if they do not fit."""
    own = model.state_dict()
    for name, tensor in sent_one_by_one(path, processes, lambda shapes: check_fit(model, shapes, str(path))):
        if name in own:  # models used to have empty parameters
            own[name].copy_(tensor)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Gives all processes the main one's buffers, as exported: each has seen other batches with its batch
    norms."""
    if processes.world_size > 1:
        for buffer in filter(Tensor.is_floating_point, model.buffers()):
            sent = buffer.contiguous()
            dist.broadcast(sent, 0)
            buffer.copy_(sent)


def check_average(folder: Path, processes: Processes) -> None:
    """Raises UserError if the checkpoint has no averaged weights."""

    def check() -> None:
        if not has_weights(folder / AVERAGE):
            raise UserError(
                f"{folder} has no averaged weights, because train.ema_decay was 0: set it back to 0"
            )

    processes.on_main(check)


def tensors_to(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors on `device`, without keys and captions."""
    return {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
