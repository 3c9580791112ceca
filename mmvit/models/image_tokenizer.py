"""Image tokenizers behind one interface: what the pipelines ask of one, and loading whichever a folder
holds."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmvit.errors import UserError
from mmvit.hub import find_model_folder, read_description
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.vq import VQModel
from mmvit.models.vqgan import VQGAN

KINDS = {kind.kind: kind for kind in (VQModel, DiscreteVAE, VQGAN)}


class ImageTokenizer(Protocol):
    """An `nn.Module` that turns pixels into codes and back; its classes are in `KINDS`."""

    factor: int  # pixels per code, along each side
    codebook_size: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the codes of an image; UserError for a size that cannot be."""

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, height, width) in [-1, 1] → codes (batch, rows, columns), int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """codes (batch, rows, columns) → pixels (batch, 3, height, width) in [-1, 1], float32."""

    def code_vectors(self) -> Tensor:
        """What each code stands for, (codebook_size, any width); like codes have like vectors."""

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path: ...


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer of a folder, a run folder (its best model) or a Hub repository, of any kind.

    Raises:
        UserError: when nothing is there, or a model of another kind.
    """
    folder = find_model_folder(path)
    kind = read_description(folder)["kind"]
    if kind not in KINDS:
        raise UserError(f"{folder} holds a {kind}, not an image tokenizer ({', '.join(KINDS)})")
    return KINDS[kind].from_pretrained(folder, device)
