"""What the `[model]` of a recipe begins with: a preset, or the model that training starts from."""

from typing import Any, Self

from pydantic import Field, model_validator

from mmvit.config import Config, sections_of
from mmvit.errors import UserError
from mmvit.hub import find_model_folder, in_words, read_part_description
from mmvit.models.clip import CLIPConfig
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.presets import PRESETS, preset


class StartConfig(Config):
    """The weights that training begins from; drawn at random where there is no `model` or `core`."""

    model: str | None = Field(
        None, description="a run folder, exported model or Hub repository that training goes on from"
    )
    core: str | None = Field(
        None, description="the same of any model with such a core, as another's, of which it alone is taken"
    )

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.model and self.core:
            raise ValueError("start.model brings its core: leave start.core out, or start.model")
        return self


# what a preset's model was made for, and the shards and tokenizers of a run say of their own
FACTS = {"vocab_size", "codebook_size", "grid"}
# of the data and of training, not of the model: what a recipe says of these stays beside another model
KEPT = {
    "image_size", "channels", "num_classes", "text_length", "label_smoothing", "patch_dropout",
    "caption_dropout", "code_noise", "dropout", "stochastic_depth", "attention_kernel",
    "activation_checkpointing",
}  # fmt: skip


def with_preset(values: Any, recipe: type[Config] | None = None) -> Any:
    """The values of a recipe. Where its `[model]` names a `preset`, it gets this preset's settings, of which
    those that the section has itself win. Raises UserError for a preset that there is not, or that is of
    another kind than the models of this `recipe`."""
    own = values.get("model") if isinstance(values, dict) else None
    if not isinstance(own, dict) or "preset" not in own:
        return values
    base = preset(str(own["preset"]))
    kinds = (
        tuple(sections_of(recipe.model_fields["model"]))
        if recipe and "model" in recipe.model_fields
        else (Config,)
    )
    if not isinstance(base, kinds):
        fitting = ", ".join(name for name in PRESETS if isinstance(PRESETS[name], kinds))
        raise UserError(
            f"model.preset {own['preset']} is no model of this script, which has {fitting or 'no presets'}"
        )
    begun = settings_of(base)
    return {**values, "model": merged(begun, {key: own[key] for key in own if key != "preset"})}


def under_preset(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of a recipe with a preset in the place of its own `[model]`, of which stays what the preset
    says nothing of and is of the data or of training. Raises UserError for a preset that there is not."""
    base, own = preset(name), values.get("model")
    if not isinstance(own, dict):
        return values
    left = kept({key: own[key] for key in own if key in type(base).model_fields}, KEPT | facts_of(base))
    return {**values, "model": merged(left, settings_of(base))}


def kept(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The settings of these names, section by section."""
    sections = {name: kept(value, names) for name, value in values.items() if isinstance(value, dict)}
    return {**{name: value for name, value in values.items() if name in names}, **sections}


def facts_of(base: Config) -> set[str]:
    return FACTS if isinstance(base, GeneratorConfig | CLIPConfig) else set()


def settings_of(base: Config) -> dict[str, Any]:
    """What a preset says, without what is the data's."""
    facts = facts_of(base)
    begun = base.model_dump(exclude=facts, exclude_unset=True)
    return {**begun, "kind": base.kind} if hasattr(base, "kind") else begun


def with_start(values: Any, kind: str, **changes: Any) -> Any:
    """The values of a recipe. Where its `start.model` names a trained model, `[model]` gets the settings of
    this one in the same way, but for `changes`. Raises UserError where there is no model of that `kind`."""
    start = values.get("start") if isinstance(values, dict) else None
    if not isinstance(start, dict) or not isinstance(start.get("model"), str):
        return values
    folder = find_model_folder(start["model"])
    described = read_part_description(folder, kind)
    if described["kind"] != kind:
        raise UserError(
            f"start.model: {folder} holds {in_words(described['kind'])}, and training begins from "
            f"{in_words(kind)}"
        )
    own = values.get("model", {})
    if not isinstance(own, dict):
        return values
    return {**values, "model": {**merged(described["config"], own), **changes}}


def merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`values` with `others` in their place, section by section."""
    sections = {
        name: merged(values[name], others[name])
        for name in values.keys() & others.keys()
        if isinstance(values[name], dict) and isinstance(others[name], dict)
    }
    return {**values, **others, **sections}
