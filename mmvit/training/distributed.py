"""Processes that train together: this one's rank, and what they exchange besides gradients."""

import gc
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mmvit.errors import OF_FILES, UserError
from mmvit.progress import with_progress
from mmvit.training.network import INTERFACE, choose_interface

Item = TypeVar("Item")
Result = TypeVar("Result")
FOREVER = 365 * 24 * 3600.0  # seconds


class FailedElsewhere(SystemExit):
    """Ends this process for an error that another one reports."""


@dataclass(frozen=True)
class Processes:
    """This process among the `world_size` that `torchrun` or `deepspeed` started; otherwise alone."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics averaged over all processes, which must all call this with the same names."""
        if self.world_size == 1 or not metrics:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world_size).tolist(), strict=True))

    def largest(self, *values: int) -> list[int]:
        """The maximum of each value over all processes, so that they take the same decision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """All processes' values by rank, in the main process; an empty list in the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def together(self, action: Callable[[], Result]) -> Result:
        """Runs `action` in every process. A `UserError`, or a full or read-only disk, in one ends all; if all
        have it, the main process alone says so."""
        problem: BaseException | None = None
        try:
            result = action()
        except (UserError, FailedElsewhere) as error:  # the latter where `action` calls this, too
            problem = error
        except OSError as error:
            if error.errno not in OF_FILES:
                raise
            problem = UserError(f"{error.filename or 'a file'}: {error.strerror}")
        main_tells = isinstance(problem, UserError) and self.is_main
        failed, main_tells = self.largest(int(problem is not None), int(main_tells))
        if problem and (self.is_main or not main_tells):
            raise problem
        if failed:
            raise FailedElsewhere(2)
        return result

    def check_alike(self, own: dict[str, Any], advice: str) -> None:
        """Raises UserError that names what another process has otherwise than the main one; then the others
        exit."""
        everyone = self.gather((socket.gethostname(), own))

        def compare() -> None:
            main_host, main = everyone[0]
            for rank, (host, other) in enumerate(everyone[1:], start=1):
                if different := [name for name in {**main, **other} if main.get(name) != other.get(name)]:
                    found = [
                        f"{name} is {other.get(name)} for rank {rank} on {host}, and {main.get(name)} for "
                        f"rank 0 on {main_host}"
                        for name in different[:3]
                    ]
                    raise UserError(f"the processes differ: {'; '.join(found)}. {advice}")

        self.on_main(compare)

    def on_main(self, action: Callable[[], Any]) -> None:
        """Runs `action` in the main process while the others wait."""
        self.together(action if self.is_main else lambda: None)

    def from_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns in the main process, in all: containers of tensors, numbers and strings.

        Tensors travel one by one. A `UserError` of `action` ends all.
        """
        found: list[Any] = []
        self.on_main(lambda: found.append(action()))
        if self.world_size == 1:
            return found[0]
        tensors = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        outline = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), found or [None])
        dist.broadcast_object_list(outline)
        own = iter(tensors)

        def sent(shape: Tensor) -> Tensor:
            tensor = next(own, None)
            tensor = torch.empty(shape.shape, dtype=shape.dtype) if tensor is None else tensor.contiguous()
            if tensor.numel():
                content = tensor.reshape(-1).view(torch.uint8)
                moved = content.to(self.device)
                dist.broadcast(moved, 0)
                content.copy_(moved)
            return tensor

        return tree_map_only(Tensor, sent, outline[0])

    def share_out(
        self, items: Sequence[Item], do: Callable[[Sequence[Item]], Iterable[Result]]
    ) -> list[Result]:
        """One result for each of `items`, in the main process; in the others an empty list.

        Args:
            do: gives the results of this process's share. A `UserError` of it ends all, at once under
                torchrun.
        """
        of_ranks = self.gather([*do(items[self.rank :: self.world_size])])
        places = [divmod(number, self.world_size) for number in range(len(items))]
        return [of_ranks[rank][place] for place, rank in places] if self.is_main else []

    def shown(
        self,
        items: Iterable[Item],
        total: int | None,
        what: str,
        count: Callable[[Item], int] = lambda item: 1,
    ) -> Iterable[Item]:
        """`items`, which are this process's share, with progress in the main process."""
        of_all = f" (process 1 of {self.world_size})" if self.world_size > 1 else ""
        return with_progress(items, total, what + of_all, count) if self.is_main else items


@contextmanager
def open_processes(
    device: str = "auto", needs_group: bool = False, timeout: float = 600, patience: float | None = None
) -> Iterator[Processes]:
    """Joins the process group described by the launcher's environment, and leaves it at the end.

    Args:
        device: "auto" or a torch device; on CUDA each process takes the GPU of its local rank.
        needs_group: makes a group of one for a process without a launcher (DeepSpeed needs it).
        timeout: seconds to wait for the others, at the start and in every exchange.
        patience: seconds to wait in exchanges, if different from `timeout`.

    Raises:
        UserError: when others do not come, or do not answer (in one of those that have waited for them).
    """
    rank, world_size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    own_device = choose_device(device, environment_number("LOCAL_RANK", 0))
    processes = Processes(rank, world_size, own_device)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if world_size == 1 and not needs_group:
        yield processes
        return
    store = join_group(processes, timeout, timeout if patience is None else patience)
    try:
        with failures_told_once(processes, store, timeout):
            yield processes
            dist.barrier()  # a process that leaves early would break what the others still exchange
    finally:
        gc.collect()  # engines hold on to the group in cycles
        dist.destroy_process_group()


def join_group(processes: Processes, timeout: float, patience: float) -> dist.Store:
    """Makes the default process group. Returns the store by which the processes have found one another."""
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    longest = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=longest))
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        if backend == "gloo":
            choose_interface(store, rank, world_size)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(
            backend, store=group, rank=rank, world_size=world_size, timeout=timedelta(seconds=patience)
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {processes.rank} has not found all {processes.world_size} processes at {where} within "
            f"train.timeout = {timeout:g} s: {str(error).splitlines()[0]}"
        ) from None
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"rank {processes.rank} on {socket.gethostname()} and the other processes cannot connect by "
            f"interface {os.environ.get(INTERFACE)}: on each host, set {INTERFACE} to the one that leads to "
            "the others (`ip route get ADDRESS` names it), and let its firewall pass all ports: "
            f"{str(error).splitlines()[0]}"
        ) from None
    store.set(f"process/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
    return store


@contextmanager
def failures_told_once(processes: Processes, store: dist.Store, timeout: float) -> Iterator[None]:
    """A context in which one process says why all of them end: the one that has failed, or one of those that
    have waited for it in vain."""
    try:
        yield
    except Exception as error:  # of which SystemExit is none: then all end together
        is_waiting = isinstance(error, dist.DistError) or (
            "gloo" in str(error) and type(error) is RuntimeError
        )
        is_late = "imed out" in str(error) or "Application timeout" in str(error)
        patience = min(10, max(1, timeout / 5)) if is_late else 2
        answers: list[list[str] | None] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(silent_processes(processes, store, is_waiting, is_late, patience))

        if is_waiting and current_thread() is main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, before anything is said
        asking = Thread(target=ask, daemon=True)  # who is cut off from the store gets no answer, nor an error
        asking.start()
        asking.join(patience + 5 if is_waiting else 2)
        if not is_waiting:
            raise
        if not answers:
            raise UserError(
                f"rank {processes.rank} has lost rank 0, which did not answer within train.timeout = "
                f"{timeout:g} s: look at {os.environ['MASTER_ADDR']} and the network between their hosts"
                if is_late
                else f"rank {processes.rank} has lost rank 0, which says why, unless the network between "
                "their hosts is down"
            ) from None
        if answers == [None]:
            raise FailedElsewhere(2) from None
        if answers == [[]]:  # all wait
            raise
        how = f"did not answer within train.timeout = {timeout:g} s" if is_late else "is gone"
        raise UserError(
            f"{' and '.join(answers[0])} {how}: look at what it said last, the memory of its host, and the "
            "network"
        ) from None


def silent_processes(
    processes: Processes, store: dist.Store, is_waiting: bool, is_late: bool, patience: float
) -> list[str] | None:
    """Says in the store whether this process ends because it waits for others. Returns those that say
    nothing for `patience` seconds, or came when the time of others was up; None if another process tells the
    user."""

    def have_said(word: str) -> set[int]:
        return {rank for rank in range(processes.world_size) if store.check([f"{word}/{rank}"])}

    store.set(f"{'waiting' if is_waiting else 'failed'}/{processes.rank}", "late" if is_late else "")
    ends = time.monotonic() + patience
    while is_waiting and not have_said("failed") and time.monotonic() < ends + 1:
        waiting = have_said("waiting")
        silent = {*range(processes.world_size)} - waiting
        if not silent or time.monotonic() > ends:
            late = {rank for rank in waiting if store.get(f"waiting/{rank}") == b"late"}
            silent = silent or (waiting - late if late else silent)
            if processes.rank == min(waiting - silent):
                names = [f"rank {rank} ({store.get(f'process/{rank}').decode()})" for rank in sorted(silent)]
                store.set(f"failed/{processes.rank}", "")
                time.sleep(0.5)  # for the others to see it: the store may end with this process
                return names
        time.sleep(0.1)
    return None


def environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(
            f"the environment variable {name} must be a number, got {text!r}; torchrun and deepspeed "
            "set it, unset it to run alone"
        )
    return int(text)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The torch device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"train.device = {name!r} is not a torch device; use auto, cpu, cuda or mps"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"train.device = {name!r}, but torch {torch.__version__} finds no CUDA device; use "
                "auto or cpu"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} needs cuda:{index}, but there are only {torch.cuda.device_count()} "
                "GPUs; start fewer processes"
            )
        return torch.device("cuda", index)
    try:
        torch.empty(1, device=device).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(
            f"train.device = {name!r}, but torch {torch.__version__} cannot use it here; use auto or cpu"
        ) from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of `train.precision`; "auto" is bf16 where the hardware supports it."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        fast = abilities.get("amx_bf16", False) or abilities.get("avx512_bf16", False)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
