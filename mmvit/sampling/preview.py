"""The grid of samples that a run draws of its generator at every evaluation."""

from pathlib import Path

from pydantic import Field

from mmvit.config import Config
from mmvit.errors import UserError
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import labelled_grid
from mmvit.sampling.settings import SamplingSettings


class PreviewConfig(Config):
    """What is drawn; nothing without captions."""

    captions: tuple[str, ...] = ()
    num_images: int = Field(4, ge=1)
    guidance_scale: float = 1.0
    temperature: float = Field(0.7, ge=0)

    @property
    def settings(self) -> SamplingSettings:
        """What the model is sampled with, then and later, where nothing else is said."""
        return SamplingSettings(guidance_scale=self.guidance_scale, temperature=self.temperature)


def check_preview(config: PreviewConfig, model: GeneratorConfig) -> None:
    """Raises UserError, before anything is trained, for settings that there are not, and for guidance that
    `model` will not know."""
    try:
        _ = config.settings  # which checks each
    except UserError as error:
        raise UserError(f"samples: {error}") from None
    if config.guidance_scale != 1 and model.caption_dropout == 0:
        raise UserError(
            f"samples.guidance_scale is {config.guidance_scale}, but with caption_dropout = 0 the model "
            "learns no guidance: set it to 1, or caption_dropout to 0.1"
        )


def draw_preview(generator: Generator, config: PreviewConfig, path: Path) -> None:
    """Draws `num_images` pictures of every caption, a row each."""
    if not config.captions:
        return
    pictures = generator.generate(config.captions, config.num_images)
    rows = [pictures[i : i + config.num_images] for i in range(0, len(pictures), config.num_images)]
    path.parent.mkdir(exist_ok=True)
    labelled_grid(rows, config.captions).save(path)
