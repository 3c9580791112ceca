"""Several pictures of a caption are drawn, as many at a time as memory holds, and the best are kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmvit.errors import UserError
from mmvit.sampling.prompts import pad_prompts
from mmvit.sampling.rerank import CaptionScorer

DRAWN_TOGETHER = 64  # pictures that scripts draw before they save them


@dataclass
class Drawn:
    """Codes (pictures, rows, columns), the seed of each, and the scores that some were chosen by."""

    codes: Tensor
    seeds: list[int]
    scores: Tensor | None = None


def parts_of_seeds(
    number: int, seed: int, candidates: int, most: int = DRAWN_TOGETHER
) -> Iterator[tuple[int, int]]:
    """How many pictures to draw from which seed on, for a picture each of `number` seeds, at most `most` at a
    time; in one part where candidates are compared, all with all."""
    most = most if candidates == 1 else number
    for begun in range(0, number, most):
        yield min(most, number - begun), seed + begun


def choose(
    drawn: Drawn,
    prompts: Sequence[Mapping[str, float]],
    num_images: int,
    rate: Callable[[Sequence[str]], Tensor],
) -> Drawn:
    """Of each prompt's pictures the best `num_images`, the best first. `rate(captions)` scores all pictures,
    each for its own of `captions`; in a mixture scores count by weight."""
    each = len(drawn.seeds) // len(prompts)
    scores = torch.zeros(len(drawn.seeds))
    for column in zip(*pad_prompts(prompts), strict=True):
        pairs = [pair for pair in column for _ in range(each)]
        captions, weights = [caption for caption, _ in pairs], torch.tensor([weight for _, weight in pairs])
        scores += weights * rate(captions).cpu()
    best = scores.view(-1, each).topk(num_images, dim=1).indices
    best = (best + each * torch.arange(len(prompts)).unsqueeze(1)).flatten()
    return Drawn(drawn.codes[best.to(drawn.codes.device)], [drawn.seeds[i] for i in best], scores[best])


def check_candidates(
    prompts: Sequence[Mapping[str, float]], candidates: int, scorer: CaptionScorer | None, by_given: bool
) -> None:
    """Raises UserError for a scorer that has nothing to choose, and for pictures that nothing compares."""
    if scorer is not None and candidates == 1:
        raise UserError("a scorer chooses among candidates: draw 2 of them or more, or leave it out")
    if scorer is not None and not isinstance(scorer, CaptionScorer):
        raise UserError(
            f"scorer is a {type(scorer).__name__}, not a CaptionScorer: load it by "
            "CaptionScorer.from_pretrained(FOLDER)"
        )
    if candidates > 1 and scorer is None and not by_given and any([*prompt] == [""] for prompt in prompts):
        raise UserError(
            "candidates of a picture without a caption cannot be compared: give a caption, or draw no more "
            "than are wanted"
        )
