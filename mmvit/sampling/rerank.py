"""How well pictures fit captions, by a CLIP with the text tokenizer that it was trained on, kept in one
folder; to choose among several pictures of a caption (2102.12092, section 2.4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError
from mmvit.hub import find_model_folder
from mmvit.memory import in_parts
from mmvit.models.classification import fit_pixels
from mmvit.models.clip import CLIP

TEXT = "text_tokenizer"


class CaptionScorer:
    """`scorer.scores(pixels, captions)`: cosines of pictures and captions."""

    def __init__(self, clip: CLIP, text_tokenizer: TextTokenizer):
        if text_tokenizer.vocab_size != clip.config.vocab_size:
            raise UserError(
                f"the text tokenizer has {text_tokenizer.vocab_size} tokens, the CLIP was built for "
                f"{clip.config.vocab_size}"
            )
        self.clip, self.text_tokenizer = clip.eval(), text_tokenizer

    @property
    def device(self) -> torch.device:
        return self.clip.start.device

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> Self:
        """Loads a CLIP's folder, a run folder (its best model) or a Hub repository.

        Raises:
            UserError: when the folder holds no CLIP, or its parts do not fit together.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        clip = CLIP.from_pretrained(folder, device)
        return cls(clip, TextTokenizer.from_file(folder / TEXT / "tokenizer.json"))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes both parts, so that the folder is all that scoring needs."""
        folder = Path(folder)
        (folder / TEXT).mkdir(parents=True, exist_ok=True)
        self.text_tokenizer.save(folder / TEXT / "tokenizer.json")
        return self.clip.save_pretrained(folder, dtype)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions → unit vectors (captions, embedding_width); those that are too long are cut."""
        ids, _ = self.text_tokenizer.encode(captions, self.clip.config.text_length)
        return in_parts(lambda part: self.clip.embed_captions(part.to(self.device)), ids, size=batch_size)

    @torch.inference_mode()
    def embed_pictures(self, pixels: Tensor, batch_size: int = 64) -> Tensor:
        """pixels (pictures, 3, height, width) in [-1, 1], of any size → unit vectors (pictures,
        embedding_width)."""

        def embed(part: Tensor) -> Tensor:
            return self.clip.embed_pictures(fit_pixels(part.to(self.device), self.clip.config.image))

        return in_parts(embed, pixels, size=batch_size)

    def scores(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine of every picture with its own caption, (pictures,); pixels (pictures, 3, height,
        width)."""
        if len(pixels) != len(captions):
            raise ValueError(f"{len(pixels)} pictures and {len(captions)} captions")
        return (self.embed_pictures(pixels) * self.embed_captions(captions)).sum(1)
