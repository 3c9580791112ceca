"""Captions: read from a sample or a file, in one of several languages, and turned into token ids."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from mmvit.errors import UserError, refuse_damage
from mmvit.places import find
from mmvit.progress import with_progress
from mmvit.streams.shards import BadSample, BadShard, Sample, ShardPatterns, expand_shards, read_shard

PAD = "[PAD]"
MOST_OF_TOKENIZER = 2**26  # bytes of a tokenizer.json
MOST_BYTES = 2**20  # of a sample's txt or json
LONGEST_WORD = 1000  # characters that BPE dropout merges at a time, as its time grows with their square


class TextTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers (byte-level BPE), with reproducible BPE dropout.

    A caption becomes its tokens followed by pads, token 0. Tokens that a post-processor would put around it
    are left out, so the empty caption, which means "no caption" in classifier-free guidance, is all pads.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer"):
        tokenizer.encode_special_tokens = True  # "[PAD]" in a caption is ordinary text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.vocab_size: int = tokenizer.get_vocab_size()
        last = max(tokenizer.get_vocab().values(), default=-1)
        if last >= self.vocab_size:  # `to_str` would count up to it
            raise UserError(
                f"{source}: expected {self.vocab_size:,} tokens without gaps, got token {last:,}; learn one "
                "with mmvit tokenizer text"
            )
        model = json.loads(tokenizer.to_str())["model"]
        pad_id = tokenizer.token_to_id(PAD)
        if model["type"] != "BPE" or pad_id is None:
            raise UserError(
                f"{source}: expected a BPE model with a {PAD} token, got {model['type']} "
                f"{'without' if pad_id is None else 'with'} {PAD}; learn one with mmvit tokenizer text"
            )
        if pad_id != 0:
            raise UserError(
                f"{source}: expected {PAD} as token 0, which models read as padding, got token {pad_id}; "
                "learn one with mmvit tokenizer text"
            )
        self.tokenizer = tokenizer
        self.source = source
        self.pad_id: int = pad_id
        merges = (
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        )
        self.ranks: dict[tuple[str, str], int] = {merge: rank for rank, merge in enumerate(merges)}

    def is_same(self, other: "TextTokenizer") -> bool:
        """Whether both tokenize every caption alike."""
        return self.tokenizer.to_str() == other.tokenizer.to_str()

    def __reduce__(self) -> tuple:
        return TextTokenizer, (self.tokenizer, self.source)  # pickling would lose encode_special_tokens

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Reads a `tokenizer.json`, or the one in a folder.

        Raises:
            UserError: if it is missing or is not a byte-level BPE tokenizer with a `[PAD]` token.
        """
        path = find(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no text tokenizer at {path}; tokenizers/emoji-text ships with mmvit")
        if (size := path.stat().st_size) > MOST_OF_TOKENIZER:
            raise UserError(
                f"{path} is not a tokenizer.json: {size:,} bytes of at most {MOST_OF_TOKENIZER:,}"
            )
        with refuse_damage(path):
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the Rust library raises a bare Exception
                raise UserError(
                    f"{path} is not a tokenizer.json of Hugging Face tokenizers: {error}"
                ) from None
            return cls(tokenizer, str(path))

    def save(self, path: str | Path) -> None:
        self.tokenizer.save(str(path))

    def encode(
        self, captions: Sequence[str], length: int, dropout: float = 0.0, rng: random.Random | None = None
    ) -> tuple[torch.Tensor, int]:
        """Tokenizes captions.

        Args:
            length: tokens per caption; longer ones are cut, shorter ones padded.
            dropout: probability of skipping a BPE merge (BPE-dropout, Provilkov et al. 2020), with `rng`.

        Returns:
            ids int64 (captions, length), and how many captions were cut.
        """
        with refuse_damage(self.source):  # which a caption may be the first to show
            tokens = [self.tokenize(caption, dropout, rng) for caption in captions]
        rows = [each[:length] + [self.pad_id] * (length - len(each)) for each in tokens]
        ids = np.array(rows, dtype=np.int64).reshape(len(rows), length)  # several times faster than torch's
        return torch.from_numpy(ids), sum(len(each) > length for each in tokens)

    def tokenize(self, caption: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The token ids of one caption, uncut and without pads."""
        if dropout == 0.0:
            return self.tokenizer.encode(caption, add_special_tokens=False).ids
        if rng is None:
            raise ValueError("BPE dropout needs an rng, to be repeatable")
        text = self.tokenizer.normalizer.normalize_str(caption) if self.tokenizer.normalizer else caption
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [
            self.tokenizer.token_to_id(token)
            for word, _ in words
            for start in range(0, len(word), LONGEST_WORD)
            for token in self.merge(word[start : start + LONGEST_WORD], dropout, rng)
        ]

    def merge(self, word: str, dropout: float, rng: random.Random) -> list[str]:
        """Joins the characters of a word by the learnt merges, best first.

        Each round skips every possible merge with probability `dropout`. Our own code, because the library's
        dropout cannot be seeded.
        """
        tokens = list(word)
        while len(tokens) > 1:
            offers = [
                (self.ranks[pair], place)
                for place, pair in enumerate(pairwise(tokens))
                if pair in self.ranks and rng.random() >= dropout
            ]
            if not offers:
                break
            _, place = min(offers)
            tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
        return tokens

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The normalized caption (NFKC, lower case, single spaces) of ids (length,), without pads."""
        numbers = [int(number) for number in ids]
        return self.tokenizer.decode([number for number in numbers if number != self.pad_id]).strip()


def read_caption_file(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the caption file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not (captions := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} holds no captions; write one per line")
    return captions


def read_caption(
    sample: Sample, languages: Sequence[str], rng: random.Random, falls_back: bool = True
) -> str:
    """A sample's caption in one of `languages`, drawn evenly from those in its `json`, else its `txt`.

    Args:
        falls_back: False requires one of the languages.

    Raises:
        BadSample: not UTF-8, not JSON, or neither any of the languages nor a `txt` to fall back to.
    """
    captions = read_captions(sample) if "json" in sample.files else {}
    if spoken := [language for language in languages if language in captions]:
        return captions[rng.choice(spoken)]
    if "txt" in sample.files and falls_back:
        return read_text(sample, "txt").strip()
    no_text = "has no txt, and " if falls_back else "has "
    raise BadSample(
        "no caption",
        f"{no_text}no caption in {', '.join(languages) or 'any language'} in its json, which has "
        f"{', '.join(captions) or 'none'}",
    )


def read_captions(sample: Sample) -> dict[str, str]:
    """The captions by language in a sample's `json`: {"captions": {language: caption}}.

    Raises:
        BadSample: not UTF-8, too long, not JSON, or of another form.
    """
    text = read_text(sample, "json")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of too many digits, nested too deep
        raise BadSample("json is invalid", str(error)) from None
    captions = facts.get("captions", {}) if isinstance(facts, dict) else {}
    if not isinstance(captions, dict):
        raise BadSample("json is invalid", 'captions are not {"captions": {language: caption}}')
    captions = {language: caption for language, caption in captions.items() if isinstance(caption, str)}
    check_text(*captions, *captions.values())
    return captions


def check_text(*texts: str) -> None:
    """Raises BadSample for what UTF-8 cannot hold: JSON may write half of a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadSample("text with a lone surrogate", "") from None


def read_text(sample: Sample, extension: str) -> str:
    """The text of a sample's file. Raises BadSample if it is not UTF-8, or longer than any caption."""
    data = sample.files[extension]
    if len(data) > MOST_BYTES:
        raise BadSample("text is too long", f"{extension} has {len(data):,} bytes of at most {MOST_BYTES:,}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at position {error.start} of {extension}"
        raise BadSample("caption is not UTF-8", found) from None


class CaptionLengths(NamedTuple):
    """How many tokens captions have, compared with the `text_length` of a model."""

    captions: int  # measured
    num_cut: int  # of these, longer than text_length
    longest: int  # tokens
    key: str  # of the sample with the longest caption
    text_length: int

    @property
    def share_cut(self) -> float:
        return self.num_cut / max(1, self.captions)

    def describe(self, setting: str = "model.text_length") -> str:
        """A line for the start of a training; "" if every caption fits."""
        if not self.num_cut:
            return ""
        return (
            f"{self.share_cut:.1%} of the first {self.captions:,} captions are longer than {setting} "
            f"({self.text_length} tokens) and will be cut; the longest has {self.longest:,} ({self.key})"
        )


def caption_lengths(
    shards: ShardPatterns,
    tokenizer: TextTokenizer,
    text_length: int,
    languages: Sequence[str] = ("en",),
    most: int = 2000,
) -> CaptionLengths:
    """Measures the first captions of `shards` in `languages`, or their `txt`, about as many from each shard.

    Reads captions alone, no images, and tokenizes `most` of them: well under a second. Samples without a
    readable caption, and damaged parts of a shard, are left to the training to count.

    Raises:
        UserError: if captions name their languages, and no sample has one in a language of `languages`; for
            English a `txt` will do. All captions are read where the first ones lack a language.
    """
    paths = list(dict.fromkeys(expand_shards(shards)))
    there: Counter[str] = Counter()
    lengths: list[tuple[int, str]] = []
    for number, path in enumerate(paths, start=1):
        try:
            for sample in read_shard(path, only=("txt", "json")):
                if len(lengths) * len(paths) >= most * number:
                    break
                there.update(languages_of(sample))
                lengths += [
                    (len(tokenizer.tokenize(caption)), sample.key)
                    for caption in all_captions(sample, languages)
                ]
        except BadShard:
            continue
    if there and (missing := {*languages} - {"en", *there}):
        for path in with_progress(paths, len(paths), f"searching captions in {', '.join(sorted(missing))}"):
            if not missing:
                break
            with suppress(BadShard):
                for sample in read_shard(path, only=("json",)):
                    missing -= {*languages_of(sample)}
        if missing:
            raise UserError(
                f"languages: no caption of {paths[0].parent} is in {', '.join(sorted(missing))}; there are "
                f"captions in {', '.join(language for language, _ in there.most_common(20))}"
            )
    longest, key = max(lengths, default=(0, ""))
    num_cut = sum(length > text_length for length, _ in lengths)
    return CaptionLengths(len(lengths), num_cut, longest, key, text_length)


def languages_of(sample: Sample) -> list[str]:
    try:
        return list(read_captions(sample)) if "json" in sample.files else []
    except BadSample:
        return []


def all_captions(sample: Sample, languages: Sequence[str]) -> list[str]:
    """Every caption that `read_caption` might draw for a sample; none if it would be skipped."""
    try:
        captions = read_captions(sample) if "json" in sample.files else {}
        spoken = [captions[language] for language in dict.fromkeys(languages) if language in captions]
        return spoken or ([read_text(sample, "txt").strip()] if "txt" in sample.files else [])
    except BadSample:
        return []
