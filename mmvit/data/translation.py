"""Which tokens of one language mean those of another, learnt from captions of the same images."""

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvit.data.captions import TextTokenizer, read_captions
from mmvit.errors import UserError
from mmvit.streams.shards import Sample, ShardPatterns
from mmvit.streams.stream import ShardStream

ROUNDS = 8  # of expectation and maximization
NOTHING = -1  # the counterpart of a token that translates none of the other text


class TranslationsSample:
    """→ {"json": str}, the captions of one image by language."""

    needs = (("json",),)

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        return {"json": json.dumps(read_captions(sample))}


class Translations(NamedTuple):
    """For tokens of new languages, the tokens of a known language that they mean.

    Three tensors (entries,): `tokens` int64 in ascending order, each repeated for every one of its
    `meanings`, int64; and `shares`, float32, which sum to 1 for each token.
    """

    tokens: Tensor
    meanings: Tensor
    shares: Tensor


def token_translations(
    shards: ShardPatterns, tokenizer: TextTokenizer, known: str, languages: Iterable[str]
) -> Translations:
    """What tokens of `languages` mean in tokens of the language `known`, from the captions in `shards`.

    Tokens that occur in `known` are left out.

    Raises:
        UserError: if no image has captions in both `known` and another of `languages`.
    """
    stream = ShardStream(shards, TranslationsSample(), batch_size=256, shuffle_buffer=0, repeat=False)
    images: list[dict[str, str]] = [json.loads(text) for batch in stream for text in batch["json"]]
    others = sorted({*languages} - {known})
    texts = [(captions, tokenizer.tokenize(captions[known])) for captions in images if known in captions]
    pairs = [
        (tokenizer.tokenize(captions[language]), text)
        for captions, text in texts
        for language in others
        if language in captions
    ]
    if not pairs:
        found = sorted({language for captions in images for language in captions})
        raise UserError(
            f"none of the {len(images):,} images has captions in {known} and in "
            f"{' or '.join(others) or 'another of data.languages'}; found {', '.join(found) or 'no language'}"
        )
    own = {token for _, text in texts for token in text}
    found = align_tokens(pairs)
    is_new = ~torch.isin(found.tokens, torch.tensor(sorted(own), dtype=torch.int64))
    return Translations(*(column[is_new] for column in found))


def align_tokens(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Translations:
    """IBM's translation model 1 (Brown et al. 1993, section 4.1), by expectation and maximization from even
    chances: each token of a pair's second text translates one token of the first, or none. A share is the
    part of all translations of a token."""
    spoken, written, occasions = [], [], []
    occasion = 0
    for first, second in pairs:
        candidates = [*first, NOTHING]
        for token in second:
            spoken += candidates
            written += [token] * len(candidates)
            occasions += [occasion] * len(candidates)
            occasion += 1
    base = 1 + max(written)
    entries, entry_of = torch.unique(torch.tensor(spoken) * base + torch.tensor(written), return_inverse=True)
    tokens, meanings = entries // base, entries % base
    _, token_of = torch.unique_consecutive(tokens, return_inverse=True)
    occasion_of = torch.tensor(occasions)
    shares = torch.ones(len(entries), dtype=torch.float64)
    for _ in range(ROUNDS):
        chances = shares[entry_of]
        chances /= torch.bincount(occasion_of, chances)[occasion_of]
        counts = torch.bincount(entry_of, chances)
        shares = counts / torch.bincount(token_of, counts)[token_of]
    is_token = tokens != NOTHING
    return Translations(tokens[is_token], meanings[is_token], shares[is_token].float())
