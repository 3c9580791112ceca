"""Trains a generator: captions in, image codes out, on shards made by pipelines/encode_images.py.

    python pipelines/train_caption_to_image.py configs/emoji_demo.toml
    python pipelines/train_caption_to_image.py configs/emoji_demo.toml --train.steps 100 --output runs/short
    torchrun --nproc_per_node 2 pipelines/train_caption_to_image.py configs/emoji_demo.toml
    deepspeed pipelines/train_caption_to_image.py configs/emoji_demo.toml \\
        --deepspeed configs/deepspeed/zero2.json --optimizer.name adamw

The same command with --resume continues. The run folder then holds the model with both tokenizers (best/,
last/), ready for pipelines/sample_images.py, and a grid of samples at every evaluation (samples/).
"""

from collections.abc import Callable

from pydantic import Field
from torch import nn

from mmvit.config import Config
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import check_codes_fit, grid_of_codes
from mmvit.data.samples import CaptionCodesSample
from mmvit.data.shards import ShardPatterns, expand_shards
from mmvit.errors import UserError, run_script
from mmvit.evaluation.likelihood import mean_loss
from mmvit.hub import fingerprint
from mmvit.models.generator import GeneratorConfig, GeneratorTransformer
from mmvit.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import labelled_grid
from mmvit.training import Recipe, Session, one_epoch, open_session, train, training_stream


class DataConfig(Config):
    """Where the codes are, and what made them."""

    train: ShardPatterns
    held_out: ShardPatterns
    image_tokenizer: str = "tokenizers/emoji-image"
    text_tokenizer: str = "tokenizers/emoji-text"
    languages: tuple[str, ...] = Field(
        ("en",), description="a caption's language is drawn among these, sample by sample"
    )
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    shuffle_buffer: int = Field(4000, ge=0)


class SamplesConfig(Config):
    """The grid of samples that is drawn at every evaluation."""

    captions: tuple[str, ...] = ()
    num_images: int = Field(4, ge=1)
    guidance_scale: float = 1.0
    temperature: float = Field(0.7, ge=0)


class GeneratorRecipe(Recipe):
    """CONFIG.toml of this script."""

    data: DataConfig
    model: GeneratorConfig = GeneratorConfig()
    samples: SamplesConfig = SamplesConfig()


def main() -> None:
    with open_session(GeneratorRecipe, __doc__) as session:
        recipe, data, processes = session.recipe, session.recipe.data, session.processes
        text_tokenizer = TextTokenizer.from_file(data.text_tokenizer)
        image_tokenizer = load_image_tokenizer(data.image_tokenizer, processes.device)
        grid = grid_of_codes(expand_shards(data.train)[0].parent)
        config = fit_to_data(recipe.model, text_tokenizer, image_tokenizer, grid)
        check_shards(data, config, image_tokenizer)
        if getattr(image_tokenizer, "decoder", None) is None:
            raise UserError(
                f"{data.image_tokenizer} cannot decode, so this generator could not draw pictures"
            )

        shape = (text_tokenizer, config.text_length, config.grid, config.codebook_size)
        decode = CaptionCodesSample(*shape, data.languages, data.bpe_dropout)
        stream = training_stream(session, data.train, decode, data.shuffle_buffer)
        held_out = one_epoch(session, data.held_out, CaptionCodesSample(*shape, data.languages[:1]))

        model = GeneratorTransformer(config)
        model.start_from_codebook(image_tokenizer.code_vectors())

        train(
            session,
            model,
            stream,
            evaluate=lambda model: mean_loss(model, held_out, count="codes"),
            select="image_loss",
            after_evaluation=grid_drawer(session, text_tokenizer, image_tokenizer),
            export=lambda model, folder: Generator(model, text_tokenizer, image_tokenizer).save_pretrained(
                folder
            ),
        )


def fit_to_data(
    model: GeneratorConfig, text: TextTokenizer, image: ImageTokenizer, grid: tuple[int, int]
) -> GeneratorConfig:
    """The model's configuration with the tokenizers' vocabularies and the grid of the codes; one that was set
    to something else is an error."""
    facts = {"vocab_size": text.vocab_size, "codebook_size": image.codebook_size, "grid": grid}
    for name, fact in facts.items():
        default = GeneratorConfig.model_fields[name].default
        if getattr(model, name) not in (fact, default):
            where = "shards have" if name == "grid" else "tokenizer has"
            raise UserError(f"model.{name} is {getattr(model, name)}, but the {where} {fact}; leave it out")
    return model.model_copy(update=facts)


def check_shards(data: DataConfig, config: GeneratorConfig, image_tokenizer: ImageTokenizer) -> None:
    """Raises UserError unless the shards were encoded by this image tokenizer, in this grid."""
    for folder in {shard.parent for shard in expand_shards([*data.train, *data.held_out])}:
        check_codes_fit(folder, config.grid, config.codebook_size, fingerprint(image_tokenizer))


def grid_drawer(
    session: Session[GeneratorRecipe], text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer
) -> Callable[[nn.Module, int], None] | None:
    """What draws `samples/step-….png` with the model so far; None where no captions are set."""
    settings, folder = session.recipe.samples, session.run.samples

    def draw(model: nn.Module, step: int) -> None:
        generator = Generator(model, text_tokenizer, image_tokenizer)
        pictures = generator.generate(
            settings.captions,
            settings.num_images,
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
        )
        rows = [pictures[i : i + settings.num_images] for i in range(0, len(pictures), settings.num_images)]
        folder.mkdir(exist_ok=True)
        labelled_grid(rows, settings.captions).save(folder / f"step-{step:06d}.png")

    return draw if settings.captions else None


if __name__ == "__main__":
    run_script(main)
