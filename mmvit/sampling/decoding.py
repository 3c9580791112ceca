"""Drawing codes, one after the other in raster order or many at a time in any order: classifier-free
guidance, temperature, top-k and top-p, and draws that depend on each image's own seed only."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import current_thread, main_thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvit.models.generator_transformer import PAD, GeneratorTransformer
from mmvit.sampling.any_order import draw_order, group_bounds

ONE_THREAD_UP_TO = 2  # rows
MIN_TEMPERATURE = 1e-6
TOKENS_TOGETHER = 64  # in a forward that takes little longer than one of a single token
MOST_DRAFTED = 16  # few drafts further ahead are right


class PartlyDrawn(NamedTuple):
    """Codes (batch, rows · columns), and where they are `known`, boolean of the same shape."""

    codes: Tensor
    known: Tensor


def sample_codes(
    model: GeneratorTransformer, caption_ids: Tensor, seeds: list[int], *how: Any, **more: Any
) -> Tensor:
    """Draws one image's codes for each caption, or for each mixture of captions: the last of `decode`, which
    has the arguments.

    Returns:
        Codes (batch, rows · columns).
    """
    *_, (codes, _) = decode(model, caption_ids, seeds, *how, **more)
    return codes


def decode(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    seeds: list[int],
    guidance_scale: float | Tensor = 1.0,
    base_ids: Tensor | None = None,
    given: Tensor | None = None,
    *,
    num_steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Iterator[PartlyDrawn]:
    """Draws codes step by step; yields all that are known after each step, in tensors that the next step
    changes.

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length), or for mixtures (batch, captions, text_length); never changed.
        seeds: one per image; the same seed, caption and settings give the same codes in any batch.
        guidance_scale: see `GuidedBatch`.
        base_ids: (batch, text_length), what captions are compared with instead of the empty caption.
        given: (batch, rows · columns), codes to keep, and -1 where one is drawn. In raster order, what is
            drawn depends on earlier codes only; in any order on all that are known.
        num_steps: forwards of a model of any order, by default `default_steps`; raster order has one per
            code.
        temperature, top_k, top_p: see `filter_logits`.
    """
    if len(seeds) != len(caption_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(caption_ids)} captions")
    if given is None:
        given = torch.full((len(seeds), model.config.num_codes), -1, device=caption_ids.device)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    prompts = GuidedBatch(caption_ids, guidance_scale, base_ids)
    partly = PartlyDrawn(given.clamp(min=0), given >= 0)
    if model.config.order == "raster":
        steps = decode_raster(model, prompts, seeds, partly, filters)
    else:
        steps = decode_any_order(model, prompts, seeds, partly, filters, num_steps)
    while True:
        with torch.inference_mode():
            step = next(steps, None)
        if step is None:
            return
        yield step


def decode_raster(
    model: GeneratorTransformer,
    prompts: "GuidedBatch",
    seeds: list[int],
    partly: PartlyDrawn,
    filters: dict[str, Any],
) -> Iterator[PartlyDrawn]:
    """Codes from the first to the last, with cached keys and values, several a forward where that pays.

    Each forward reads drafts of the next codes as well, and draws every code again from what it read, by the
    code's own random number. Up to the first code that came out unlike its draft all are what they would be
    one by one (speculative Jacobi decoding, 2410.01699, but with the same numbers instead of a test that
    keeps the law), and the others are the next drafts. Below float32, where a forward of several codes rounds
    unlike several of one, there are no drafts.
    """
    codes, known = partly
    rows, places = len(prompts.ids), codes.shape[1]
    given, drafted = known.clone(), window(rows, codes.device)
    numbers = uniforms(seeds, places).to(codes.device)
    cache = model.new_cache(rows)
    done = 0
    while done < places:
        with few_threads(rows, codes.device):
            if not done:
                logits = model.prefill(prompts.ids, cache).unsqueeze(1)
            else:
                cache.length = model.prefix_length + done - 1
                read = codes[:, done - 1 : min(done + drafted, places) - 1]
                logits = model.step(read.repeat(rows // len(codes), 1), cache)
            if logits.dtype != torch.float32:
                drafted = 1
            logits = prompts.combine(logits)
            ahead = slice(done, done + logits.shape[1])
            probabilities = filter_logits(logits.flatten(0, 1), **filters)
            drawn = draw(probabilities, numbers[:, ahead].flatten()).view(len(codes), -1)
        drawn = torch.where(given[:, ahead], codes[:, ahead], drawn)
        is_kept = (drawn == codes[:, ahead]).cumprod(1)[:, :-1]
        done += 1 + int(is_kept.sum(1).min())
        codes[:, ahead] = drawn
        codes[:, ahead.stop :] = torch.where(given[:, ahead.stop :], codes[:, ahead.stop :], drawn[:, -1:])
        known[:, :done] = True
        yield partly


def window(rows: int, device: torch.device) -> int:
    """How many codes of each of `rows` images a forward draws: as many as take little longer than one."""
    tokens = TOKENS_TOGETHER if device.type == "cpu" else 4 * TOKENS_TOGETHER
    return min(MOST_DRAFTED, max(1, tokens // rows))


def decode_any_order(
    model: GeneratorTransformer,
    prompts: "GuidedBatch",
    seeds: list[int],
    partly: PartlyDrawn,
    filters: dict[str, Any],
    num_steps: int | None = None,
) -> Iterator[PartlyDrawn]:
    """A group of the codes of each image a step, independently of each other; every forward reads all codes
    that are known. Groups grow as `group_bounds` says, each image's in an order of its own."""
    codes, known = partly
    rows, places = len(prompts.ids), codes.shape[1]
    numbers = uniforms(seeds, 2 * places).to(codes.device)
    order = draw_order(known, numbers[:, places:])
    unknown = (~known).sum(1)
    steps = min(num_steps or default_steps(places), max(1, int(unknown.max())))
    captions = model.embed_captions(prompts.ids)
    if model.config.attention == "prefix":
        captions = model.new_cache(rows)
        model.prefill(prompts.ids, captions)
    repeat = rows // len(codes)
    for start, end in pairwise(group_bounds(unknown, steps)):
        rank = start.unsqueeze(1) + torch.arange(int((end - start).max()), device=codes.device)
        rank = torch.minimum(rank, end.unsqueeze(1) - 1)  # images with fewer codes to draw repeat their last
        group = order.gather(1, rank.clamp(min=0))
        is_drawn = (end > start).unsqueeze(1)
        seen = model.read_codes(codes.repeat(repeat, 1), ~known.repeat(repeat, 1), captions)
        chosen = group.repeat(repeat, 1).unsqueeze(-1).expand(-1, -1, seen.shape[-1])
        logits = prompts.combine(model.image_head(seen.gather(1, chosen)))
        probabilities = filter_logits(logits.flatten(0, 1), **filters)
        drawn = draw(probabilities, numbers.gather(1, group).flatten()).view_as(group)
        codes.scatter_(1, group, torch.where(is_drawn, drawn, codes.gather(1, group)))
        known.scatter_(1, group, is_drawn | known.gather(1, group))
        yield partly


def default_steps(places: int) -> int:
    """Forwards for `places` codes: their square root, 8 for 64 and 16 for 256."""
    return max(1, round(places**0.5))


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
            self.scales = scales.expand(captions.shape[:2]).T  # (captions, batch)
            base = torch.full_like(captions[:, 0], PAD) if base_ids is None else base_ids
            self.ids = torch.cat([self.ids, base])

    def combine(self, logits: Tensor) -> Tensor:
        """Logits of `ids` (rows, ..., codes) → the logits to draw from (batch, ..., codes)."""
        if not self.is_guided:
            return logits
        *captions, base = logits.float().split(self.batch)
        total = base
        for scales, caption in zip(self.scales, captions, strict=True):
            total = total + scales.view(-1, *[1] * (base.ndim - 1)) * (caption - base)
        return total


@contextmanager
def few_threads(rows: int, device: torch.device) -> Iterator[None]:
    """Uses a single CPU thread for a few rows: a second one gains nothing (docs/speed.md), and on a
    busy machine, where threads wait for each other in every layer, takes up to 100 times as long."""
    is_alone = current_thread() is main_thread()  # the number is the whole process's
    if device.type != "cpu" or rows > ONE_THREAD_UP_TO or not is_alone:
        yield
        return
    before = torch.get_num_threads()
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
