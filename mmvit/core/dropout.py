"""Dropout that is cheap on a CPU: one random byte per element from a fast generator, instead of one Bernoulli
draw."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 8  # random bytes in one word


class Dropout(nn.Module):
    """Zeroes elements with probability `p` and scales the rest by 1 / (1 - p) (Srivastava et al., 2014).

    On a CPU, `p` is rounded to a multiple of 1/256 and the scale follows the rounded value, so the
    expectation is exact (in bfloat16, up to rounding of the scale). Each call seeds its generator from
    torch's default one, so `torch.manual_seed` and a saved random state reproduce it.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected a dropout in [0, 1), got {p}")
        self.p = p
        self.threshold = min(255, max(1, round(256 * p)))  # bytes below it are dropped

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return ByteDropout.apply(x, self.threshold)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ByteDropout(torch.autograd.Function):
    """x · mask, with the mask built in x's own type in two passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: int) -> Tensor:
        random_bytes = draw_bytes(x.numel())
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ge(random_bytes.view(x.shape), threshold, out=mask)
        mask.mul_(256 / (256 - threshold))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


def draw_bytes(count: int) -> Tensor:
    """`count` random bytes (uint8) from SFC64, several times faster than torch's Mersenne Twister."""
    seed = torch.randint(2**63 - 1, ()).item()
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(0, 2**64 - 1, -(-count // BYTES), dtype=np.uint64, endpoint=True)
    return torch.from_numpy(words.view(np.uint8)[:count])
