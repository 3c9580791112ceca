"""The `[start]` section of recipes: the weights that training starts from."""

from typing import Self

from pydantic import Field, model_validator

from mmvit.config import Config


class StartConfig(Config):
    """Trained weights to start from; without `model` or `core`, weights are random."""

    model: str | None = Field(
        None, description="run folder, exported model or Hub repository whose weights training continues from"
    )
    core: str | None = Field(
        None, description="run folder, exported model or Hub repository to take only the core's weights from"
    )

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.model and self.core:
            raise ValueError("start.model includes a core: set either start.model or start.core")
        return self
