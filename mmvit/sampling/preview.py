"""The grid of images that a training run draws with its generator at every evaluation."""

from pathlib import Path

from pydantic import Field

from mmvit.config import Config
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import labelled_grid
from mmvit.sampling.settings import GuidanceScale, SamplingSettings, Temperature


class PreviewConfig(Config):
    """What is drawn; nothing without captions. The trained model keeps the settings as its defaults."""

    captions: tuple[str, ...] = ()
    num_images: int = Field(4, ge=1)
    guidance_scale: GuidanceScale = 1.0
    temperature: Temperature = 0.7
    num_steps: int | None = Field(None, ge=1)

    @property
    def settings(self) -> SamplingSettings:
        how = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "num_steps")}
        return SamplingSettings(**how)


def check_preview(config: PreviewConfig, model: GeneratorConfig) -> None:
    """Raises ValueError for previews that `model` could not draw."""
    if config.guidance_scale != 1 and model.caption_dropout == 0:
        raise ValueError(
            f"preview.guidance_scale is {config.guidance_scale}, but with caption_dropout = 0 the model "
            "learns no guidance: set it to 1, or caption_dropout to 0.1"
        )
    if config.num_steps is not None and model.order == "raster":
        raise ValueError('preview.num_steps needs model.order = "any": raster order has one step per code')


def draw_preview(generator: Generator, config: PreviewConfig, path: Path | None) -> None:
    """Draws `num_images` images of every caption, a row each; without a `path`, only to help the process that
    has one (ZeRO 3)."""
    if not config.captions:
        return
    images = generator.generate(config.captions, config.num_images)
    if path is None:
        return
    rows = [images[i : i + config.num_images] for i in range(0, len(images), config.num_images)]
    path.parent.mkdir(exist_ok=True)
    labelled_grid(rows, config.captions).save(path)
