"""What is asked of a generator: captions, mixtures of them, and what they are held against, as token ids."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError

# a caption, or several with their weights: {"red apple": 0.5, "green apple": 0.5}
Prompt = str | Mapping[str, float]


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[dict[str, float]]:
    """Each prompt as captions with weights; a caption alone has weight 1.

    Raises:
        UserError: for no prompt, or one without captions or with a weight that is no number.
    """
    if isinstance(prompts, str | Mapping):
        prompts = [prompts]
    listed = [as_weights(prompt) for prompt in prompts]
    if not listed:
        raise UserError("no captions to draw; give at least one, '' for an unconditional picture")
    for prompt in listed:
        if not prompt:
            raise UserError("a mixture of no captions; give at least one with its weight")
        for caption, weight in prompt.items():
            if not isinstance(caption, str):
                raise UserError(f"a mixture has {caption!r} in it; captions are str")
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UserError(f"the weight of {caption!r} is {weight!r}; it is a number")
        if max(prompt.values()) <= 0:
            raise UserError(
                f"the mixture {prompt} has no caption with a weight above 0; `negative` leads away from one"
            )
    return listed


def as_weights(prompt: Prompt) -> dict[str, float]:
    """Raises UserError for what is neither a caption nor a mapping."""
    if isinstance(prompt, str):
        return {prompt: 1.0}
    if not isinstance(prompt, Mapping):
        raise UserError(
            f"{prompt!r} is a {type(prompt).__name__}, not a caption (str) nor captions with their weights"
        )
    return dict(prompt)


def pad_prompts(prompts: Sequence[Mapping[str, float]]) -> list[list[tuple[str, float]]]:
    """The captions and weights of each prompt, as many as the longest has: those that it lacks are empty and
    have weight 0."""
    most = max(len(prompt) for prompt in prompts)
    return [[*prompt.items(), *[("", 0.0)] * (most - len(prompt))] for prompt in prompts]


def encode_prompts(
    prompts: Sequence[Mapping[str, float]], tokenizer: TextTokenizer, length: int
) -> tuple[Tensor, Tensor]:
    """Token ids (prompts, captions, length) and weights (prompts, captions), padded as `pad_prompts` does.
    Captions that are too long are cut, with a warning."""
    rows = pad_prompts(prompts)
    captions = [caption for row in rows for caption, _ in row]
    ids, num_cut = tokenizer.encode(captions, length)
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(captions)} captions have more than {length} tokens and are cut there",
            stacklevel=4,
        )
    if wordless := [caption for caption in captions if caption and not any(map(str.isalnum, caption))]:
        warnings.warn(
            f"the caption {wordless[0][:20]!r} has no letter or digit in it: a model reads words, as those "
            "of the captions that it learnt; name what is to be seen",
            stacklevel=4,
        )
    weights = [[weight for _, weight in row] for row in rows]
    return ids.unflatten(0, (len(rows), -1)), torch.tensor(weights)


def has_weights(prompts: Sequence[Mapping[str, float]]) -> bool:
    return any([*prompt.values()] != [1.0] for prompt in prompts)
