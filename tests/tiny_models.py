"""Small models with random weights for tests of drawing and of the page."""

from typing import Any

import torch
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import TextTokenizer
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.sampling.generator import Generator

CORE = TransformerConfig(width=32, depth=1, num_heads=2)


def tiny_generator(
    tokenizer: TextTokenizer, order: str = "any", grid: tuple[int, int] = (2, 3), **settings: Any
) -> Generator:
    """A generator of 16 codes, 8x8 pixels each."""
    torch.manual_seed(0)
    config = GeneratorConfig(
        vocab_size=tokenizer.vocab_size, text_length=6, codebook_size=16, grid=grid, core=CORE,
        order=order, attention="full" if order == "any" else "prefix", **settings,
    )  # fmt: skip
    transformer = drawn_weights(GeneratorTransformer(config))
    return Generator(transformer, tokenizer, VQModel(VQConfig(codebook_size=16)))


def tiny_classifier(*classes: str) -> ImageClassifier:
    """A classifier of images of 16x16 pixels."""
    torch.manual_seed(0)
    config = ClassifierConfig(image_size=16, patch_size=8, num_classes=len(classes), core=CORE)
    return ImageClassifier(drawn_weights(Classifier(config)), classes)


def drawn_weights(model: nn.Module) -> nn.Module:
    """The model with all weights from N(0, 0.3): new heads are zero, and would give equal logits."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
