"""Code after code in raster order: cached keys and values, classifier-free guidance, temperature, top-k and
top-p, and draws that depend on each image's own seed only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmvit.models.generator_transformer import PAD, GeneratorTransformer

ONE_THREAD_UP_TO = 2  # rows
MIN_TEMPERATURE = 1e-6


def sample_codes(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    seeds: list[int],
    guidance_scale: float | Tensor = 1.0,
    base_ids: Tensor | None = None,
    given: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Draws one image's codes for each caption, or for each mixture of captions.

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length), or for mixtures (batch, captions, text_length); never changed.
        seeds: one per image; the same seed, caption and settings give the same codes in any batch.
        guidance_scale: see `GuidedBatch`.
        base_ids: (batch, text_length), what captions are compared with instead of the empty caption.
        given: (batch, rows · columns), codes to keep, and -1 where one is drawn. What is drawn depends on
            earlier codes only.
        temperature, top_k, top_p: see `filter_logits`.
        on_step: called after each code with the codes so far, (batch, n).

    Returns:
        Codes (batch, rows · columns).
    """
    batch, config = len(caption_ids), model.config
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions")
    prompts = GuidedBatch(caption_ids, guidance_scale, base_ids)
    codes = torch.empty(batch, config.num_codes, dtype=torch.long, device=caption_ids.device)
    with torch.inference_mode(), few_threads(len(prompts.ids), caption_ids.device):
        cache = model.new_cache(len(prompts.ids))
        numbers = uniforms(seeds, config.num_codes).to(caption_ids.device)
        logits = model.prefill(prompts.ids, cache)
        for place in range(config.num_codes):
            probabilities = filter_logits(prompts.combine(logits), temperature, top_k, top_p)
            drawn = draw(probabilities, numbers[:, place])
            if given is not None:
                drawn = torch.where(given[:, place] < 0, drawn, given[:, place])
            codes[:, place] = drawn
            if on_step is not None:
                on_step(codes[:, : place + 1])
            if place + 1 < config.num_codes:
                logits = model.step(drawn.repeat(len(prompts.ids) // batch), cache)
    return codes


class GuidedBatch:
    """Everything that is read for a batch of images, as rows `ids`: the first captions of all images, the
    second captions, ..., and last, where there is guidance, what captions are compared with.

    Args:
        caption_ids: (batch, text_length), or for mixtures (batch, captions, text_length).
        scale: 1 reads a caption alone. Any other scale draws from base + scale · (caption − base), where base
            are the logits without a caption (2207.12598). For mixtures a scale per caption, (batch,
            captions): base + Σ scale · (caption − base), as in composed diffusion (2206.01714).
        base_ids: (batch, text_length), a negative caption as the base; by default the empty caption.
    """

    def __init__(self, caption_ids: Tensor, scale: float | Tensor, base_ids: Tensor | None = None):
        captions = caption_ids.unsqueeze(1) if caption_ids.ndim == 2 else caption_ids
        self.batch = len(captions)
        self.ids = captions.transpose(0, 1).flatten(0, 1)
        self.is_guided = isinstance(scale, Tensor) or scale != 1 or captions.shape[1] > 1
        if self.is_guided:
            scales = torch.as_tensor(scale, dtype=torch.float32, device=caption_ids.device)
            self.scales = scales.expand(captions.shape[:2]).T.unsqueeze(-1)  # (captions, batch, 1)
            base = torch.full_like(captions[:, 0], PAD) if base_ids is None else base_ids
            self.ids = torch.cat([self.ids, base])

    def combine(self, logits: Tensor) -> Tensor:
        """Logits of `ids` (rows, codes) → the logits to draw from (batch, codes)."""
        if not self.is_guided:
            return logits
        *captions, base = logits.float().split(self.batch)
        total = base
        for scale, caption in zip(self.scales, captions, strict=True):
            total = total + scale * (caption - base)
        return total


@contextmanager
def few_threads(rows: int, device: torch.device) -> Iterator[None]:
    """Uses a single CPU thread for a few rows: a second one gains nothing (docs/speed.md), and on a
    busy machine, where threads wait for each other in every layer, takes up to 100 times as long."""
    before = torch.get_num_threads()
    if device.type == "cpu" and rows <= ONE_THREAD_UP_TO:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Probabilities (batch, codes) after temperature, then top-k, then nucleus filtering (1904.09751).

    Args:
        logits: (batch, codes).
        temperature: 0, or too little for float32 to hold the quotients, puts all probability on the likeliest
            code.
        top_k: keep the k likeliest codes; None or 0 keeps all.
        top_p: keep the fewest likeliest codes whose probabilities reach top_p; the likeliest always stays.
    """
    if temperature < MIN_TEMPERATURE:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered  # the probability of all likelier codes
        removed = torch.zeros_like(mass_before, dtype=torch.bool).scatter_(-1, order, mass_before >= top_p)
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
    """Uniform numbers (len(seeds), num_codes), each row from a random generator of its own, so that a seed
    draws the same image in any batch."""
    rows = [
        torch.rand(num_codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)
