"""The kinds of image tokenizers, and loading whichever a folder holds."""

from pathlib import Path

import torch

from mmvit.errors import UserError
from mmvit.hub import find_model_folder, in_words, read_description
from mmvit.models.codes import ImageTokenizer
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.vq import VQModel
from mmvit.models.vqgan import VQGAN

KINDS = {kind.kind: kind for kind in (VQModel, DiscreteVAE, VQGAN)}


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer of a folder, a run folder (its best model) or a Hub repository, of any kind.

    Raises:
        UserError: when nothing is there, or a model of another kind.
    """
    folder = find_model_folder(path)
    kind = read_description(folder)["kind"]
    if kind not in KINDS:
        raise UserError(f"{folder} holds {in_words(kind)}, not an image tokenizer ({', '.join(KINDS)})")
    return KINDS[kind].from_pretrained(folder, device)
