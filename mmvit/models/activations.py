"""What training keeps of every example, found by tracing a step without values: nothing is computed or
allocated, so that this works for models of any size on any machine."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmvit.config import Config
from mmvit.core import dropout
from mmvit.models.registry import build_model

Device = Literal["cuda", "cpu"]
Precision = Literal["bf16", "fp32"]
Result = TypeVar("Result")
MANY = 1024  # examples, beside which what does not grow with the batch is nothing

# what autocast on CUDA computes in bf16, and what in fp32 (torch's documentation of torch.amp), as far as
# models here use it
IN_BF16 = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "conv2d", "conv_transpose2d",
    "scaled_dot_product_attention",
}  # fmt: skip
IN_FP32 = {
    "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "sum", "exp", "log",
    "norm", "normalize", "pow", "rsqrt", "mse_loss", "l1_loss",
}  # fmt: skip


@dataclass(frozen=True)
class Activations:
    """Bytes of one example: what the forward pass keeps for the backward pass, and the most that is in use
    at any moment of both, with recomputed activations and gradients of the largest tensors."""

    kept: float
    peak: float


def activations(
    config: Config, device: Device = "cuda", precision: Precision = "bf16", **more: Any
) -> Activations:
    """As `trace_step`, in less time for deep cores: every block keeps the same, so that two shallow ones tell
    how much."""
    core = getattr(config, "core", None)
    shallow = 4 * core.activation_checkpointing_every if core else 0
    if not core or core.depth <= 3 * shallow:
        return trace_step(config, device, precision, **more)
    few, twice = (
        trace_step(with_depth(config, depth), device, precision, **more) for depth in (shallow, 2 * shallow)
    )
    times = core.depth / shallow - 1
    return Activations(*(a + times * (b - a) for a, b in zip(astuple(few), astuple(twice), strict=True)))


def with_depth(config: Config, depth: int) -> Config:
    return config.model_copy(update={"core": config.core.model_copy(update={"depth": depth})})


def trace_step(
    config: Config,
    device: Device = "cuda",
    precision: Precision = "bf16",
    image_size: tuple[int, int] | None = None,
    examples: int = MANY,
) -> Activations:
    """The activations of a model in training.

    Args:
        precision: of autocast, as `train.precision`.
        image_size: (height, width), for models of images of any size.
        examples: how many are traced together.

    Raises:
        RuntimeError: or NotImplementedError, for losses that ask for a value, which tensors here do not have.
    """
    with torch.device("meta"):
        model = build_model(config).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    with without_values(device, precision):
        model.to_empty(device="meta" if device == "cuda" else "cpu")
        batch = example_batch(config, examples, image_size)
        with InUse() as in_use, torch.autograd.set_multithreading_enabled(False):  # modes are of one thread
            (loss, _), kept = kept_for_backward(lambda: model.loss(batch), but=model)
            run_backward(loss)
    return Activations(kept / examples, in_use.peak / examples)


def example_batch(
    config: Config, examples: int, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A batch without meaning, with everything that losses read."""
    parts = [config, *(getattr(config, name, None) for name in ("image", "classifier", "generator"))]
    batch = {"labels": torch.zeros(examples, dtype=torch.long)}
    for part in filter(None, parts):
        if height_width := getattr(part, "height_width", image_size):
            batch["pixels"] = torch.empty(examples, getattr(part, "channels", 3), *height_width)
        for name, length in (("caption_ids", "text_length"), ("codes", "num_codes")):
            if count := getattr(part, length, None):
                batch[name] = torch.zeros(examples, count, dtype=torch.long)
    return batch


def kept_for_backward(forward: Callable[[], Result], but: nn.Module) -> tuple[Result, int]:
    """What `forward` returns, and the bytes that it keeps for the backward pass, without those of the
    weights and buffers of `but`."""
    own = {tensor.untyped_storage()._cdata for tensor in (*but.parameters(), *but.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept alive, so that keys stay unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for storage in storages.values())


class InUse(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still in use, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        given = {storage._cdata for storage in storages_of((arguments, named))}
        for storage in storages_of(result):
            if storage._cdata not in given | self.counted:
                self.counted.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


def storages_of(values: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]


def run_backward(loss: Tensor) -> None:
    """`loss.backward()` within `OnCuda`, which torch's own function would leave."""
    engine = torch.autograd.Variable._execution_engine
    keep_graph, create_graph, allow_unreachable, accumulate = False, False, True, True
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), keep_graph, create_graph, (), allow_unreachable, accumulate
    )


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def without_values(device: Device, precision: Precision) -> Iterator[None]:
    """A context in which new tensors have only shapes and types. Those of a GPU are on torch's meta device,
    where models choose the same operations."""
    autocast = precision == "bf16"
    if device == "cpu":
        masks = mock.patch.object(dropout, "draw_bytes", lambda count: torch.empty(count, dtype=torch.uint8))
        tensors = FakeTensorMode(allow_non_fake_inputs=True)
        with masks, tensors, torch.device("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            yield
        return
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", autocast)  # torch.autocast refuses where there is no GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.device("meta"), OnCuda(autocast):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


class OnCuda(TorchFunctionMode):
    """Tensors on the meta device go through autocast as on CUDA, and through CUDA's fused operations."""

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        named, name = named or {}, getattr(function, "__name__", "")
        if self.autocast and name in IN_BF16 | IN_FP32:
            dtype = torch.bfloat16 if name in IN_BF16 else torch.float32
            arguments, named = tree_map_only(Tensor, lambda each: self.cast(each, dtype), (arguments, named))
        if function is F.scaled_dot_product_attention:
            return fused_attention(*arguments, **named)
        if function is F.dropout:
            return torch.native_dropout(arguments[0], named["p"], True)[0]
        return function(*arguments, **named)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (isinstance(tensor, nn.Parameter) and dtype == torch.bfloat16):
            return tensor.to(dtype)
        if id(tensor) not in self.copies:  # autocast makes one for all uses
            self.copies[id(tensor)] = tensor.to(dtype)
        return self.copies[id(tensor)]


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention by the kernel that torch chooses on CUDA: none keeps the maps."""
    aten = torch.ops.aten
    if attn_mask is None and query.dtype == torch.bfloat16:
        return aten._scaled_dot_product_flash_attention(query, key, value, is_causal=is_causal)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, is_causal=is_causal
    )[0]
