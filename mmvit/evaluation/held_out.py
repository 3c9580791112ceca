"""What a generator is measured on: the captions of a split, and images of its data set."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from mmvit.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """The captions of a split and, among images of the data set (`everything`, pixels (images, 3, height,
    width): all of them, or a sample), the places of their own images and of the training images."""

    keys: list[str]
    captions: list[str]
    everything: Tensor
    own: Tensor
    trained: Tensor
    trained_keys: list[str]

    @property
    def pixels(self) -> Tensor:
        """The images of the split."""
        return self.everything[self.own]

    @classmethod
    def of(cls, captions: Mapping[str, Any], real: Mapping[str, Any], trained: Sequence[str]) -> Self:
        """Joins what `read_split` returns by key; captions without an image in `real` are left out.

        Args:
            captions: the `keys` and `captions` of the split.
            real: the `keys` and `pixels` of all splits, or of a sample of them.
            trained: the keys of the training images.

        Raises:
            UserError: if two images have the same key.
        """
        place = {key: i for i, key in enumerate(real["keys"])}
        if len(place) < len(real["keys"]):
            (twin, _), *_ = Counter(real["keys"]).most_common(1)
            raise UserError(
                f"several images have the key {twin}, perhaps in different splits, so it is unclear which "
                "one a caption belongs to: give every sample of the data set its own key"
            )
        pairs = [
            pair for pair in zip(captions["keys"], captions["captions"], strict=True) if pair[0] in place
        ]
        trained = [key for key in trained if key in place]
        return cls(
            keys=[key for key, _ in pairs],
            captions=[caption for _, caption in pairs],
            everything=real["pixels"],
            own=torch.tensor([place[key] for key, _ in pairs], dtype=torch.long),
            trained=torch.tensor([place[key] for key in trained], dtype=torch.long),
            trained_keys=trained,
        )

    def spread(self, number: int) -> Self:
        """`number` of the captions, evenly spread over the split; all if it has fewer."""
        return self.some(evenly_spread(len(self.own), number))

    def matching(self, pattern: str) -> Self:
        """The captions whose key contains a match of a regular expression. Raises UserError if none does."""
        chosen = [i for i, key in enumerate(self.keys) if re.search(pattern, key)]
        if not chosen:
            raise UserError(
                f"--keys {pattern!r} matches none of {len(self.keys)} keys, such as {self.keys[:2]}"
            )
        return self.some(chosen)

    def some(self, chosen: Sequence[int] | Tensor) -> Self:
        """The captions at these places."""
        return replace(
            self,
            keys=[self.keys[i] for i in chosen],
            captions=[self.captions[i] for i in chosen],
            own=self.own[chosen],
        )


def evenly_spread(total: int, number: int) -> Tensor:
    """`number` places among `total`, from the first to the last; all if there are fewer."""
    exact = torch.float64  # float32 would name some twice
    return torch.linspace(0, total - 1, min(number, total), dtype=exact).round().long()
