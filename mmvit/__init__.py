"""mmvit: one Transformer core that reads image patches, text tokens and image codes."""

from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.models.generator import GeneratorConfig, GeneratorTransformer
from mmvit.models.presets import preset
from mmvit.models.vq import VQConfig, VQModel
from mmvit.sampling.generator import Generator
from mmvit.sampling.rerank import CaptionScorer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CaptionScorer",
    "Classifier",
    "ClassifierConfig",
    "Generator",
    "GeneratorConfig",
    "GeneratorTransformer",
    "ImageClassifier",
    "VQConfig",
    "VQModel",
    "preset",
]
__version__ = "0.1.0"
