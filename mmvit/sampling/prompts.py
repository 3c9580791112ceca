"""Prompts: captions, mixtures of captions, and what guidance leads away from, parsed once."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError

# a caption, or several with their weights: {"red apple": 0.5, "green apple": 0.5}
MOST_WEIGHT = 1000  # of a caption; far beyond use, and far below what overflows
Prompt = str | Mapping[str, float]


@dataclass(frozen=True)
class Prompts:
    """What to draw: the captions of each prompt with their weights, and one caption that guidance leads away
    from, for all prompts; "" leads away from images in general."""

    mixtures: list[dict[str, float]]
    negative: str = ""

    @classmethod
    def parse(cls, prompts: Prompt | Iterable[Prompt], negative: str = "") -> Self:
        """Parses one prompt or several; a caption alone has weight 1.

        Raises:
            UserError: for no prompts, anything that is not a caption or a mixture, or a mixture without a
                positive weight.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            prompts = [prompts]
        mixtures = [parse_mixture(prompt) for prompt in prompts]
        if not mixtures:
            raise UserError("no captions to draw: give at least one; '' draws an image of anything")
        if not isinstance(negative, str):
            raise UserError(f"negative: expected a caption (str), got {negative!r}")
        check_text(negative)
        return cls(mixtures, negative)

    def __len__(self) -> int:
        return len(self.mixtures)

    @property
    def is_weighted(self) -> bool:
        """Whether any prompt is more than one caption of weight 1."""
        return any([*mixture.values()] != [1.0] for mixture in self.mixtures)

    @property
    def has_empty(self) -> bool:
        """Whether any prompt is the empty caption alone."""
        return any([*mixture] == [""] for mixture in self.mixtures)

    def for_images(self, number: int) -> Self:
        """One prompt for each of `number` given images: a single one is repeated. Raises UserError for
        another number of prompts."""
        if len(self) not in (1, number):
            raise UserError(f"{len(self)} captions for {number} images: give one, or one for each image")
        return replace(self, mixtures=self.mixtures * (number // len(self)))

    def padded(self) -> list[list[tuple[str, float]]]:
        """The captions and weights of each prompt, padded with empty captions of weight 0 to the longest."""
        longest = max(map(len, self.mixtures))
        return [[*mixture.items(), *[("", 0.0)] * (longest - len(mixture))] for mixture in self.mixtures]

    def encode(self, tokenizer: TextTokenizer, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (prompts, captions, length) and weights (prompts, captions) of the captions, padded as
        `padded` does, and token ids (prompts, length) of the negative caption. Captions that are too long
        are cut, with a warning."""
        rows = self.padded()
        captions = [caption for row in rows for caption, _ in row]
        ids, num_cut = tokenizer.encode([*captions, self.negative], length)
        warn_of_captions([*captions, self.negative], num_cut, length)
        weights = torch.tensor([[weight for _, weight in row] for row in rows])
        return ids[:-1].unflatten(0, (len(rows), -1)), weights, ids[-1].expand(len(rows), -1)


def parse_mixture(prompt: Prompt) -> dict[str, float]:
    if isinstance(prompt, str):
        check_text(prompt)
        return {prompt: 1.0}
    if not isinstance(prompt, Mapping):
        raise UserError(f"expected a caption (str) or captions with weights (dict), got {prompt!r}")
    if not prompt:
        raise UserError("an empty mixture of captions: give at least one caption with its weight")
    for caption, weight in prompt.items():
        if not isinstance(caption, str):
            raise UserError(f"a mixture's captions must be str, got {caption!r}")
        check_text(caption)
        if not isinstance(weight, int | float) or not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
            raise UserError(
                f"the weight of {caption!r}: expected a number from -{MOST_WEIGHT} to {MOST_WEIGHT}, "
                f"got {str(weight)[:20]}"
            )
    if max(prompt.values()) <= 0:
        raise UserError(
            f"the mixture {dict(prompt)} has no caption of a weight above 0; to lead away from a caption, "
            "use `negative`"
        )
    return dict(prompt)


def check_text(caption: str) -> None:
    """Raises UserError for what is not valid Unicode, such as undecodable bytes of a command line."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise UserError(f"the caption {caption!r:.40} is not valid UTF-8 text") from None


def warn_of_captions(captions: list[str], num_cut: int, length: int) -> None:
    if num_cut:
        total = sum(map(bool, captions))  # without the empty ones that fill up
        warnings.warn(
            f"{num_cut} of {total} captions have more than {length} tokens and were cut there",
            stacklevel=5,
        )
    if wordless := [caption for caption in captions if caption and not any(map(str.isalnum, caption))]:
        warnings.warn(
            f"the caption {wordless[0][:20]!r} has no letter or digit: models read words like those of the "
            "captions they were trained on; describe the image in words",
            stacklevel=5,
        )
