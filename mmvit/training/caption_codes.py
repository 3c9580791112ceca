"""What a generator is trained on: shards of captions with image codes, and the tokenizers that both are
of."""

from dataclasses import dataclass

from pydantic import Field

from mmvit.config import Config
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import check_codes_fit, grid_of_codes
from mmvit.data.samples import CaptionCodesSample
from mmvit.data.shards import ShardPatterns, expand_shards
from mmvit.data.stream import ShardStream
from mmvit.errors import UserError
from mmvit.hub import fingerprint
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.training.session import Session
from mmvit.training.streams import one_epoch, training_stream


class CaptionCodesConfig(Config):
    """Where the codes are, and what made them."""

    train: ShardPatterns
    held_out: ShardPatterns
    image_tokenizer: str = "tokenizers/emoji-image"
    text_tokenizer: str = "tokenizers/emoji-text"
    languages: tuple[str, ...] = Field(
        ("en",),
        description="a caption's language is drawn among these, sample by sample; one named twice comes "
        "twice as often",
    )
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    augmented: float = Field(
        0.0, ge=0, le=1, description="probability that a training image is one of its augmented copies"
    )
    shuffle_buffer: int = Field(4000, ge=0)


@dataclass(frozen=True)
class CaptionCodes:
    """Both tokenizers, the model's configuration with what they and the shards say of it, and the data."""

    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    config: GeneratorConfig
    stream: ShardStream
    held_out: ShardStream


def open_caption_codes(
    session: Session,
    data: CaptionCodesConfig,
    model: GeneratorConfig,
    section: str = "model",
    data_section: str = "data",
) -> CaptionCodes:
    """Raises UserError where shards, tokenizers and `model`, which are the recipe's `section` and
    `data_section`, do not fit together, or pictures could not be decoded."""
    text_tokenizer = TextTokenizer.from_file(data.text_tokenizer)
    image_tokenizer = load_image_tokenizer(data.image_tokenizer, session.processes.device)
    grid = grid_of_codes(expand_shards(data.train)[0].parent)
    config = fit_to_data(model, text_tokenizer, image_tokenizer, grid, section)
    own = fingerprint(image_tokenizer)
    for folder in {shard.parent for shard in expand_shards([*data.train, *data.held_out])}:
        setting = f"{data_section}.image_tokenizer"
        check_codes_fit(folder, config.grid, config.codebook_size, own, setting)
    if getattr(image_tokenizer, "decoder", None) is None:
        raise UserError(f"{data.image_tokenizer} cannot decode, so this generator could not draw pictures")
    shape = (text_tokenizer, config.text_length, config.grid, config.codebook_size)
    decode = CaptionCodesSample(*shape, data.languages, data.bpe_dropout, data.augmented)
    stream = training_stream(session, data.train, decode, data.shuffle_buffer)
    held_out = one_epoch(session, data.held_out, CaptionCodesSample(*shape, data.languages[:1]))
    return CaptionCodes(text_tokenizer, image_tokenizer, config, stream, held_out)


def fit_to_data(
    model: GeneratorConfig,
    text: TextTokenizer,
    image: ImageTokenizer,
    grid: tuple[int, int],
    section: str = "model",
) -> GeneratorConfig:
    """The model's configuration with the tokenizers' vocabularies and the grid of the codes; one that was set
    to something else is an error."""
    facts = {"vocab_size": text.vocab_size, "codebook_size": image.codebook_size, "grid": grid}
    for name, fact in facts.items():
        default = GeneratorConfig.model_fields[name].default
        if getattr(model, name) not in (fact, default):
            where = "shards have" if name == "grid" else "tokenizer has"
            found = getattr(model, name)
            raise UserError(f"{section}.{name} is {found}, but the {where} {fact}; leave it out")
    if model.attention == "dalle" and model.convolution > grid[1]:
        raise UserError(
            f"{section}.convolution is {model.convolution}, but the shards have {grid[1]} columns of codes; "
            "it is at most as many"
        )
    return model.model_copy(update=facts)
