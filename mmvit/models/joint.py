"""A classifier and a generator on one core: one set of weights that reads images as patches, and captions and
images as tokens and codes."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_serializer, model_validator
from torch import Tensor, nn

from mmvit.config import Config
from mmvit.core.transformer import Transformer, TransformerConfig
from mmvit.hub import JOINT, Pretrained
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer

PARTS = ("classifier", "generator")


class JointConfig(Config):
    """A classifier and a generator; `core` is the core of both, whose own `core` need not be given."""

    kind: Literal["joint"] = "joint"
    classifier: ClassifierConfig = ClassifierConfig()
    generator: GeneratorConfig = GeneratorConfig()
    core: TransformerConfig = TransformerConfig()
    classification_weight: float = Field(
        1.0, gt=0, description="weight of the classifier's loss; the generator's has weight 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_core(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        try:
            core = TransformerConfig.model_validate(values.get("core", {}))
        except ValidationError:
            return values  # so that the error names `core` alone
        parts = {name: part for name in PARTS if isinstance(part := values.get(name, {}), dict)}
        return {**values, **{name: {"core": core, **part} for name, part in parts.items()}}

    @model_validator(mode="after")
    def _parts_have_the_core(self) -> Self:
        for name in PARTS:
            if getattr(self, name).core != self.core:
                raise ValueError(f"{name}.core differs from core: set only core")
        return self

    @model_serializer(mode="wrap")
    def _write_the_core_once(self, write: Any) -> dict[str, Any]:
        values = write(self)
        for name in PARTS:
            del values[name]["core"]
        return values


class Joint(Pretrained, nn.Module):
    """A `classifier` and a `generator`, each as it is alone, with the same `core`.

    Weights are named `core.…`, `classifier.…` and `generator.…`, the core's only once.
    `Classifier.from_pretrained` and `mmvit.Generator.from_pretrained` load their part of its folder.
    """

    config_class, kind = JointConfig, JOINT

    def __init__(self, config: JointConfig):
        super().__init__()
        self.config = config
        self.core = Transformer(config.core)
        self.classifier = Classifier(config.classifier)
        self.generator = GeneratorTransformer(config.generator)
        self.classifier.core = self.generator.core = self.core
        self.register_state_dict_post_hook(forget_copies)
        self.register_load_state_dict_pre_hook(restore_copies)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses of a batch with the entries of each: `pixels`, `labels`, `caption_ids` and `codes`."""
        classification_loss, classified = self.classifier.loss(batch)
        generation_loss, generated = self.generator.loss(batch)
        loss = self.config.classification_weight * classification_loss + generation_loss
        metrics = {"classification_loss": classified["loss"], "generation_loss": generated["loss"]}
        rest = {**classified, **generated}
        del rest["loss"]
        return loss, {"loss": loss.detach(), **metrics, **rest}


def forget_copies(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Keeps only the first of the core's three names: `core`, `classifier.core`, `generator.core`."""
    copies = tuple(f"{prefix}{part}.core." for part in PARTS)
    for name in [name for name in state if name.startswith(copies)]:
        del state[name]


def restore_copies(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The inverse of `forget_copies`."""
    own = f"{prefix}core."
    for name in [name for name in state if name.startswith(own)]:
        for part in PARTS:
            state[f"{prefix}{part}.{name.removeprefix(prefix)}"] = state[name]
