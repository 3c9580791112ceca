"""The cost of running and training models, computed from their shapes: nothing is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.config import Config
from mmvit.core.transformer import TransformerConfig
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.registry import build_model
from mmvit.models.resnet import ResNetConfig

Result = TypeVar("Result")


def forward_macs(config: ClassifierConfig | ResNetConfig) -> int:
    """Multiply-adds of all matrix products and convolutions in one image's forward pass. Norms, activations
    and softmax are not counted, as usual. FLOPs are twice as many."""
    if isinstance(config, ClassifierConfig):  # the counter does not see a fused kernel's products
        plain = config.core.model_copy(update={"attention_kernel": "plain"})
        config = config.model_copy(update={"core": plain})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_model(config).eval()
        model(torch.empty(1, config.channels, *config.height_width))
    return counter.get_total_flops() // 2


def training_flops(macs: int, images: float) -> float:
    """FLOPs of training on `images` images in all: a step costs about three forward passes of 2 · `macs`
    FLOPs."""
    return 6 * macs * images


@dataclass(frozen=True)
class Memory:
    """The memory of one process in training, in bytes; `activations` is for one example."""

    weights: float
    gradients: float
    moments: float
    average: float
    activations: float

    @property
    def state(self) -> float:
        """The part that does not grow with the batch."""
        return self.weights + self.gradients + self.moments + self.average


def training_memory(
    parameters: int,
    core: TransformerConfig,
    tokens: int,
    stage: int = 0,
    processes: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    average: bool = False,
    stem: float = 0.0,
) -> Memory:
    """An estimate for AdamW under ZeRO `stage` (1910.02054) with our engines: weights, gradients and both
    moments in float32, to which bf16 adds a copy of the weights. Communication buffers, fragmentation, and
    activations of embeddings and heads are not counted.

    Args:
        parameters: of the whole model.
        tokens: of one example in the core.
        average: whether a moving average of the weights is kept (`train.ema_decay`).
        stem: bytes of `stem_activations`.
    """
    share = 1 / processes
    of_weights, of_gradients, of_moments = (share if stage >= first else 1.0 for first in (3, 2, 1))
    copies = 2 if precision == "bf16" else 0
    master = 4 * share if stage in (1, 2) else 0  # DeepSpeed updates a flat copy of its own part
    return Memory(
        weights=parameters * ((4 + copies) * of_weights + master),
        gradients=parameters * 4 * of_gradients,
        moments=parameters * 8 * of_moments,
        average=parameters * 4 * average,
        activations=core_activations(core, tokens) * (1 if precision == "bf16" else 2) + stem,
    )


def stem_activations(config: Config) -> float:
    """Bytes that the convolutions of a classifier's stem store of one example for the gradient, at 32 bits
    per value; 0 for models without them. In bf16 it is slightly less, because their norms stay in float32."""
    if not isinstance(config, ClassifierConfig) or config.stem == "patch":
        return 0.0
    with torch.device("meta"):
        stem = build_model(config).stem

        def kept(batch: int) -> int:
            pixels = torch.empty(batch, config.channels, *config.height_width)
            return kept_for_backward(lambda: stem(pixels), but=stem)[1]

        return float(kept(2) - kept(1))  # cancels what does not grow with the batch


def kept_for_backward(forward: Callable[[], Result], but: nn.Module) -> tuple[Result, int]:
    """What `forward` returns, and the bytes that it keeps for the backward pass, without those of the
    weights and buffers of `but`."""
    own = {tensor.untyped_storage()._cdata for tensor in (*but.parameters(), *but.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that keys stay unique

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for storage in storages.values())


def core_activations(core: TransformerConfig, tokens: int) -> float:
    """Bytes that a core stores of one example for the gradient, at 16 bits per value (2205.05198, without
    dropout masks and with fused attention); with checkpointing, at the worst moment of the backward pass."""
    attention = 6 * core.width  # norm1, its output, queries, keys, values and the output of attention
    mlp = (4 if core.mlp == "swiglu" else 2) * core.mlp_width + 2 * core.width  # and norm2 and its output
    sums = 2 * core.width
    stored, largest = core.width, 0
    for layer in range(core.depth):
        chosen = layer % core.activation_checkpointing_every == 0
        recomputed = core.activation_checkpointing if chosen else "none"
        again = {"none": 0, "attention": attention, "blocks": attention + mlp + core.width}[recomputed]
        stored += attention + mlp + sums - again
        largest = max(largest, stored - (mlp if recomputed == "attention" else 0) + again)
    return 2.0 * tokens * largest
