"""Captions: reading them from a sample, choosing a language, and turning them into token ids."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmvit.data.shards import BadSample, Sample
from mmvit.errors import UserError

PAD = "[PAD]"


class TextTokenizer:
    """A `tokenizer.json` of Hugging Face tokenizers (byte-level BPE), with reproducible BPE dropout.

    A caption is its tokens followed by pads, token 0, without those that a file's post-processor would put
    around it; so the empty caption, which stands for "no caption" in classifier-free guidance, is all pads.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer"):
        tokenizer.encode_special_tokens = True  # "[PAD]" written in a caption is text like any other
        tokenizer.no_padding()
        tokenizer.no_truncation()
        model = json.loads(tokenizer.to_str())["model"]
        pad_id = tokenizer.token_to_id(PAD)
        if model["type"] != "BPE" or pad_id is None:
            raise UserError(
                f"{source}: a BPE model with a {PAD} token is needed, found {model['type']} and "
                f"{'no ' if pad_id is None else ''}{PAD}; learn one with tokenizers/train_text_tokenizer.py"
            )
        if pad_id != 0:
            raise UserError(
                f"{source}: {PAD} is token {pad_id}; models take token 0 for padding, and for captions that "
                "are left out: learn one with tokenizers/train_text_tokenizer.py"
            )
        self.tokenizer = tokenizer
        self.source = source
        self.pad_id: int = pad_id
        self.vocab_size: int = tokenizer.get_vocab_size()
        merges = (
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        )
        self.ranks: dict[tuple[str, str], int] = {merge: rank for rank, merge in enumerate(merges)}

    def is_same(self, other: "TextTokenizer") -> bool:
        """Whether both make the same tokens of every caption."""
        return self.tokenizer.to_str() == other.tokenizer.to_str()

    def __reduce__(self) -> tuple:
        return TextTokenizer, (self.tokenizer, self.source)  # pickling loses encode_special_tokens

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Reads a `tokenizer.json`, or the one in a folder.

        Raises:
            UserError: if it is missing or is not a byte-level BPE tokenizer with a `[PAD]` token.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"no text tokenizer at {path}; the one shipped is tokenizers/emoji-text/tokenizer.json"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises a bare Exception
            raise UserError(f"{path} is not a tokenizer.json of Hugging Face tokenizers: {error}") from None
        return cls(tokenizer, str(path))

    def save(self, path: str | Path) -> None:
        self.tokenizer.save(str(path))

    def encode(
        self, captions: Sequence[str], length: int, dropout: float = 0.0, rng: random.Random | None = None
    ) -> tuple[torch.Tensor, int]:
        """Tokenizes captions.

        Args:
            length: tokens kept of each; longer ones are cut, shorter ones padded.
            dropout: probability that a BPE merge is left out (BPE-dropout, Provilkov et al. 2020), drawn from
                `rng`.

        Returns:
            ids int64 (captions, length), and how many captions were cut.
        """
        ids = torch.full((len(captions), length), self.pad_id, dtype=torch.int64)
        num_cut = 0
        for row, caption in zip(ids, captions, strict=True):
            tokens = self.tokenize(caption, dropout, rng)
            num_cut += len(tokens) > length
            row[: len(tokens)] = torch.tensor(tokens[:length], dtype=torch.int64)
        return ids, num_cut

    def tokenize(self, caption: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The token ids of one caption, however many, without pads."""
        if dropout == 0.0:
            return self.tokenizer.encode(caption, add_special_tokens=False).ids
        if rng is None:
            raise ValueError("BPE dropout needs an rng, so that it can be repeated")
        text = self.tokenizer.normalizer.normalize_str(caption) if self.tokenizer.normalizer else caption
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [
            self.tokenizer.token_to_id(token) for word, _ in words for token in self.merge(word, dropout, rng)
        ]

    def merge(self, word: str, dropout: float, rng: random.Random) -> list[str]:
        """Joins the characters of a word by the learnt merges, best first.

        In every round each possible merge is left out with probability `dropout`. Own code because the
        library's dropout cannot be seeded.
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
        """The normalized caption (NFKC, lower case, single spaces) of ids (length,); pads are left out."""
        numbers = [int(number) for number in ids]
        return self.tokenizer.decode([number for number in numbers if number != self.pad_id]).strip()


def read_caption_file(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, without the empty ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the caption file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not (captions := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} holds no captions; write one on each line")
    return captions


def read_caption(
    sample: Sample, languages: Sequence[str], rng: random.Random, falls_back: bool = True
) -> str:
    """The caption of a sample: in one of `languages`, drawn evenly from those in its `json`, else its `txt`
    if it `falls_back`.

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
    """The captions by language of a sample's `json`, which holds {"captions": {language: caption}}.

    Raises:
        BadSample: not UTF-8, not JSON, or of another form.
    """
    try:
        facts = json.loads(read_text(sample, "json"))
    except json.JSONDecodeError as error:
        raise BadSample("json is invalid", str(error)) from None
    captions = facts.get("captions", {}) if isinstance(facts, dict) else {}
    if not isinstance(captions, dict):
        raise BadSample("json is invalid", 'captions are not {"captions": {language: caption}}')
    return {language: caption for language, caption in captions.items() if isinstance(caption, str)}


def read_text(sample: Sample, extension: str) -> str:
    data = sample.files[extension]
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at position {error.start} of {extension}"
        raise BadSample("caption is not UTF-8", found) from None
