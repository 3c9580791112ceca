"""What a generator trains on: shards of captions with image codes, and the tokenizers of both."""

from dataclasses import dataclass

from mmvit.data.captions import TextTokenizer, caption_lengths
from mmvit.data.codes import check_codes_fit
from mmvit.data.samples import CaptionCodesSample
from mmvit.errors import UserError
from mmvit.hub import fingerprint
from mmvit.models.generator_transformer import GeneratorConfig
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.recipes.data import CaptionCodesConfig
from mmvit.streams.shards import expand_shards
from mmvit.streams.stream import ShardStream
from mmvit.training import Session, one_epoch, training_stream


@dataclass(frozen=True)
class CaptionCodes:
    """Both tokenizers, this process's endless training stream, and its share of the held-out samples."""

    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    stream: ShardStream
    held_out: ShardStream


def open_caption_codes(
    session: Session, data: CaptionCodesConfig, config: GeneratorConfig, section: str = "data"
) -> CaptionCodes:
    """Opens the data of the recipe's `section` for a generator of `config`.

    Raises:
        UserError: if shards, tokenizers and `config` do not fit together, or codes could not be decoded.
    """
    text_tokenizer = TextTokenizer.from_file(data.text_tokenizer)
    image_tokenizer = load_image_tokenizer(data.image_tokenizer, session.processes.device)
    own = fingerprint(image_tokenizer)
    for folder in {shard.parent for shard in expand_shards([*data.train, *data.held_out])}:
        check_codes_fit(folder, config.grid, config.codebook_size, own, f"{section}.image_tokenizer")
    if getattr(image_tokenizer, "decoder", None) is None:
        raise UserError(f"{data.image_tokenizer} has no decoder, so this generator could not draw images")
    lengths = caption_lengths(data.train, text_tokenizer, config.text_length, data.languages)
    if longer := lengths.describe():
        session.say(longer)
    shape = (text_tokenizer, config.text_length, config.grid, config.codebook_size)
    decode = CaptionCodesSample(*shape, data.languages, data.bpe_dropout, data.augmented)
    stream = training_stream(session, data.train, decode, data.shuffle_buffer)
    held_out = one_epoch(session, data.held_out, CaptionCodesSample(*shape, data.languages[:1]))
    return CaptionCodes(text_tokenizer, image_tokenizer, stream, held_out)
