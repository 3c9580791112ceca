"""Every kind of model: building one from its configuration, loading one of any kind from a folder."""

from pathlib import Path

import torch
from torch import nn

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.hub import Pretrained, find_model_folder, in_words, read_part_description
from mmvit.models.classifier import Classifier
from mmvit.models.clip import CLIP
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.joint import Joint
from mmvit.models.resnet import ResNet
from mmvit.models.vq import VQModel
from mmvit.models.vqgan import VQGAN

CLASSIFIERS = {model.kind: model for model in (Classifier, ResNet)}
IMAGE_TOKENIZERS = {model.kind: model for model in (VQModel, DiscreteVAE, VQGAN)}
MODELS = {
    **CLASSIFIERS,
    **{model.kind: model for model in (GeneratorTransformer, Joint, CLIP)},
    **IMAGE_TOKENIZERS,
}


def build_model(config: Config) -> nn.Module:
    """The untrained model that `config` describes."""
    return next(model for model in MODELS.values() if model.config_class is type(config))(config)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> Classifier | ResNet:
    """The classifier at `path`, as `load_one_of` finds it, or the classifier of a joint model."""
    return load_one_of(CLASSIFIERS, "a classifier", path, device)


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer at `path`, as `load_one_of` finds it."""
    return load_one_of(IMAGE_TOKENIZERS, "an image tokenizer", path, device)


def load_one_of(
    models: dict[str, type[Pretrained]], expected: str, path: str | Path, device: str | torch.device
) -> Pretrained:
    """The model in a folder, a run folder (its best model) or a Hub repository, of any of the given kinds.

    Raises:
        UserError: when `path` holds no model, or one of another kind.
    """
    folder = find_model_folder(path)
    kind = read_part_description(folder, *models)["kind"]
    if kind not in models:
        raise UserError(f"{folder} holds {in_words(kind)}, not {expected} ({', '.join(models)})")
    return models[kind].from_pretrained(folder, device)
