"""Code after code in raster order, with cached keys and values and classifier-free guidance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmvit.models.generator import PAD, GeneratorTransformer
from mmvit.sampling.filters import draw, filter_logits, uniforms

ONE_THREAD_UP_TO = 2  # rows


def sample_codes(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    seeds: list[int],
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Draws one image's codes for each caption.

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length); never changed.
        seeds: one an image; the same seed, caption and settings give the same codes in any batch.
        guidance_scale: 1 samples from the caption alone. Another scale reads the empty caption beside it, as
            more rows of the same batch, and samples from logits unconditional + scale · (conditional −
            unconditional) (2207.12598).
        temperature, top_k, top_p: see `filter_logits`.
        on_step: called with the codes so far, (batch, n), after each one.

    Returns:
        Codes (batch, rows · columns).
    """
    batch, config = len(caption_ids), model.config
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions")
    is_guided = guidance_scale != 1
    rows = torch.cat([caption_ids, torch.full_like(caption_ids, PAD)]) if is_guided else caption_ids
    codes = torch.empty(batch, config.num_codes, dtype=torch.long, device=caption_ids.device)
    with torch.inference_mode(), few_threads(len(rows), caption_ids.device):
        cache = model.new_cache(len(rows))
        numbers = uniforms(seeds, config.num_codes).to(caption_ids.device)
        logits = model.prefill(rows, cache)
        for place in range(config.num_codes):
            if is_guided:
                conditional, unconditional = logits.float().chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            codes[:, place] = draw(filter_logits(logits, temperature, top_k, top_p), numbers[:, place])
            if on_step is not None:
                on_step(codes[:, : place + 1])
            if place + 1 < config.num_codes:
                latest = codes[:, place]
                logits = model.step(torch.cat([latest, latest]) if is_guided else latest, cache)
    return codes


@contextmanager
def few_threads(rows: int, device: torch.device) -> Iterator[None]:
    """Reads few rows a step with one thread of a CPU: two are no faster (benchmarks/README.md), and wait for
    each other at every layer, which beside other busy programs takes up to 100 times as long."""
    before = torch.get_num_threads()
    if device.type == "cpu" and rows <= ONE_THREAD_UP_TO:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
