"""From logits to one code: temperature, top-k, top-p, and a draw that depends on the image's own seed
alone."""

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-6


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Probabilities (batch, codes) after temperature, then top-k, then nucleus filtering (1904.09751).

    Args:
        logits: (batch, codes).
        temperature: 0, or so little that float32 cannot hold the quotients, is the limit: all probability on
            the likeliest code.
        top_k: keep the k likeliest codes; None or 0 keeps all.
        top_p: keep the fewest likeliest codes whose probabilities reach top_p; the likeliest always stays.
    """
    if temperature < LEAST_TEMPERATURE:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(
            -1, logits.argmax(-1, keepdim=True), 1.0
        )
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(-1) - ordered  # the mass of all likelier codes
        removed = torch.zeros_like(likelier, dtype=torch.bool).scatter_(-1, order, likelier >= top_p)
        removed.scatter_(-1, order[:, :1], False)
        probabilities = probabilities.masked_fill(removed, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling: probabilities (batch, codes), uniform numbers (batch,) in [0, 1) → codes
    (batch,)."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return codes.clamp(max=probabilities.shape[-1] - 1)


def uniforms(seeds: list[int], num_codes: int) -> Tensor:
    """Uniform numbers (len(seeds), num_codes), each row from a generator of its own: a seed gives its image
    in any batch."""
    rows = [
        torch.rand(num_codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)
