"""Code after code in raster order, with cached keys and values and classifier-free guidance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmvit.models.generator_transformer import PAD, GeneratorTransformer
from mmvit.sampling.filters import draw, filter_logits, uniforms

ONE_THREAD_UP_TO = 2  # rows


def sample_codes(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    seeds: list[int],
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    on_step: Callable[[Tensor], None] | None = None,
    base_ids: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Draws one image's codes for each caption, or each mixture of captions.

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length), or of mixtures (batch, captions, text_length); never changed.
        seeds: one an image; the same seed, caption and settings give the same codes in any batch.
        guidance_scale: 1 samples from the caption alone. Another scale reads the empty caption beside it, as
            more rows of the same batch, and samples from logits base + scale · (caption's − base)
            (2207.12598). Of mixtures one for each caption, (batch, captions): base + Σ scale · (caption's −
            base), as composed diffusion does (2206.01714).
        temperature, top_k, top_p: see `filter_logits`.
        on_step: called with the codes so far, (batch, n), after each one.
        base_ids: (batch, text_length) what to hold captions against, instead of the empty one.
        given: (batch, rows · columns) codes that are taken as they are, -1 where one is drawn, which is from
            what is before it alone.

    Returns:
        Codes (batch, rows · columns).
    """
    batch, config = len(caption_ids), model.config
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions")
    prompts = Rows(caption_ids, guidance_scale, base_ids)
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


class Rows:
    """The captions that are read beside each other for every image, as rows of one batch, `ids`: the first
    captions of all images, the second ones, ..., and the bases where something is held against them."""

    def __init__(self, caption_ids: Tensor, scale: float | Tensor, base_ids: Tensor | None):
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
        """Logits (rows, codes) → those that are drawn from, (batch, codes)."""
        if not self.is_guided:
            return logits
        *captions, base = logits.float().split(self.batch)
        total = base
        for scale, own in zip(self.scales, captions, strict=True):
            total = total + scale * (own - base)
        return total


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
