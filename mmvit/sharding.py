"""Weights that processes share out (ZeRO 3): what models, built and read as ever, must know of it.

`mmvit.training` says how, once a session begins; without that, every process holds all weights, and nothing
here does anything.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Batch = TypeVar("Batch")


class Sharding(Protocol):
    """How weights are shared out. Every process must call each method with the same weights."""

    def share(self, module: nn.Module) -> None:
        """Keeps of the module's parameters only the part of this process."""

    def whole(self, tensors: list[Tensor]) -> AbstractContextManager:
        """A context in which these tensors are whole; what the main process writes into them stays."""

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of the whole tensor."""

    def read(self, tensor: Tensor) -> Tensor:
        """The whole content of a tensor, in full precision."""

    def begin(self) -> None:
        """Waits until every process is about to read a model. Ends this one if another will not."""

    def exporting(self) -> AbstractContextManager:
        """A context in which every process reads a model once; what fails before that ends all."""


active: Sharding | None = None


@contextmanager
def sharding(how: Sharding | None) -> Iterator[None]:
    """A context in which models are built, and their weights read and written, in shards."""
    global active
    before, active = active, how
    try:
        yield
    finally:
        active = before


def shared(module: Module) -> Module:
    """Says that `module` is built and has its first weights; a large model is a row of such modules."""
    if active is not None:
        active.share(module)
    return module


def whole(*tensors: Tensor) -> AbstractContextManager:
    """A context in which weights can be written to."""
    return nullcontext() if active is None else active.whole([*tensors])


def read(tensor: Tensor) -> Tensor:
    """The content of a weight."""
    return tensor.detach() if active is None else active.read(tensor)


def outline_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `state_of`, but with tensors of the meta device."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape = tensor.shape if active is None else active.shape(tensor)
        yield name, torch.empty(shape, dtype=tensor.dtype, device="meta")


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and whole contents of `state_dict()`, one at a time."""
    if active is not None:
        active.begin()
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, read(tensor)


def in_step(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count: where weights are shared out, every process must make
    as many passes as the one with the most, and goes on with a batch that does not count."""
    if active is None or not dist.is_initialized() or dist.get_world_size() == 1:
        yield from ((batch, True) for batch in batches)
        return
    everyone: list[bool] = [False] * dist.get_world_size()
    own, spare = iter(batches), None
    while True:
        batch = next(own, None)
        dist.all_gather_object(everyone, batch is not None)
        if not any(everyone):
            return
        if spare is None:
            spare = batch
            if not all(everyone):
                sent = [batch]
                dist.broadcast_object_list(sent, everyone.index(True))
                spare = sent[0] if batch is None else batch
        yield (spare, False) if batch is None else (batch, True)
