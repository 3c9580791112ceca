"""Words of other languages: found from captions of the same images, and what a model begins them with."""

import random
from collections import defaultdict

import pytest
import torch

from mmvit.core.transformer import TransformerConfig
from mmvit.data.translation import ROUNDS, align_tokens, token_translations
from mmvit.errors import UserError
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer


def random_pairs(words: int, count: int, rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Texts of up to four of `words` words, and the same in another order and as other numbers."""
    texts = [rng.sample(range(words), rng.randint(1, 4)) for _ in range(count)]
    return [([100 + word for word in rng.sample(text, len(text))], text) for text in texts]


def aligned_word_by_word(pairs):
    """Model 1 as the paper has it: a chance for every word of the second text to be written for each of the
    first text's or for None; then every word's share in what was written for it."""
    shares = defaultdict(lambda: 1.0)
    for _ in range(ROUNDS):
        written, total = defaultdict(float), defaultdict(float)
        for first, second in pairs:
            for word in second:
                chances = [shares[other, word] for other in [*first, None]]
                for other, chance in zip([*first, None], chances, strict=True):
                    written[other, word] += chance / sum(chances)
                    total[other] += chance / sum(chances)
        shares = defaultdict(float, {key: count / total[key[0]] for key, count in written.items()})
    return {key: share for key, share in shares.items() if key[0] is not None}


def test_alignment_is_that_of_the_plain_loop():
    pairs = random_pairs(words=8, count=20, rng=random.Random(0))
    pairs.append(([3, 3, 105], [2, 7, 7]))  # words that come twice
    tokens, meanings, shares = align_tokens(pairs)
    expected = aligned_word_by_word(pairs)
    found = dict(zip(zip(tokens.tolist(), meanings.tolist(), strict=True), shares.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    assert tokens.tolist() == sorted(tokens.tolist())
    sums = torch.zeros(200).index_add(0, tokens, shares)
    torch.testing.assert_close(sums[tokens], torch.ones(len(tokens)))


def test_a_dictionary_is_learnt_from_texts_alone():
    pairs = random_pairs(words=20, count=200, rng=random.Random(1))
    tokens, meanings, shares = align_tokens(pairs)
    table = torch.zeros(120, 20)
    table[tokens, meanings] = shares
    assert table[100:].argmax(1).tolist() == list(range(20))
    assert table[100:].max(1).values.min() > 0.8


def test_words_that_the_known_language_has_are_left_out(tiny_shards, tokenizer):
    tokens, meanings, shares = token_translations(f"{tiny_shards}/train-*.tar", tokenizer, "en", ["en", "de"])
    (quadrat,) = tokenizer.tokenize("Quadrat")
    assert {*tokens.tolist()} == {quadrat}  # the colours are called as in English
    found = dict(zip(meanings.tolist(), shares.tolist(), strict=True))
    likeliest = sorted(found, key=lambda token: -found[token])
    assert {*likeliest[:3]} == {*tokenizer.tokenize("square")}  # three tokens


def test_images_without_a_second_language_are_told(tiny_shards, tokenizer):
    with pytest.raises(UserError, match=r"none of the 48 images has captions in en and in ja; found de, en"):
        token_translations(f"{tiny_shards}/train-*.tar", tokenizer, "en", ["en", "ja"])
    with pytest.raises(UserError, match=r"captions in en and in another of data.languages; found de, en"):
        token_translations(f"{tiny_shards}/train-*.tar", tokenizer, "en", ["en"])


def test_new_words_begin_as_mixtures_and_others_stay():
    model = GeneratorTransformer(
        GeneratorConfig(vocab_size=12, text_length=4, core=TransformerConfig(width=16, depth=1, num_heads=1))
    )
    before = model.text_embedding.weight.detach().clone()
    tokens, meanings = torch.tensor([5, 5, 9]), torch.tensor([1, 2, 3])
    assert model.start_from_translations(tokens, meanings, torch.tensor([0.25, 0.75, 1.0])) == 2
    after = model.text_embedding.weight
    torch.testing.assert_close(after[5], 0.25 * before[1] + 0.75 * before[2])
    torch.testing.assert_close(after[9], before[3])
    others = [token for token in range(12) if token not in (5, 9)]
    assert torch.equal(after[others], before[others])
