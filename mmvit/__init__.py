"""mmvit: one Transformer core that reads image patches, text tokens and image codes.

    generator = mmvit.Generator.from_pretrained()                       # the generator that ships
    images = generator.generate("red apple", num_images=4)
    run = mmvit.train("emoji_demo", {"train.steps": 100})                # what `mmvit train` does
    figures = mmvit.evaluate(run.path, "data/emoji")

Mistakes raise `mmvit.UserError`.
"""

import importlib as _importlib
from typing import Any as _Any

__version__ = "0.1.0"

# each name and its module, imported on first use: the command line must not wait for torch
MODULES = {
    "CLIP": "mmvit.models.clip",
    "CLIPConfig": "mmvit.models.clip",
    "CaptionScorer": "mmvit.sampling.candidates",
    "Classifier": "mmvit.models.classifier",
    "ClassifierConfig": "mmvit.models.classifier",
    "Generator": "mmvit.sampling.generator",
    "GeneratorConfig": "mmvit.models.generator_transformer",
    "GeneratorTransformer": "mmvit.models.generator_transformer",
    "ImageClassifier": "mmvit.evaluation.image_classifier",
    "UserError": "mmvit.errors",
    "VQConfig": "mmvit.models.vq",
    "VQModel": "mmvit.models.vq",
    "evaluate": "mmvit.evaluation.evaluate",
    "preset": "mmvit.models.presets",
    "train": "mmvit.recipes.launch",
}
__all__ = [*MODULES]


def __getattr__(name: str) -> _Any:
    if name not in MODULES:
        raise AttributeError(f"module 'mmvit' has no attribute {name!r}")
    value = getattr(_importlib.import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
