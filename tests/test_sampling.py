"""Sampling: filters by hand, guidance, seeds, and captions to images in one folder."""

import shutil
from threading import Thread

import pytest
import torch
from PIL import Image
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError
from mmvit.evaluation.retrieval import pixel_ranks, recall
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.sampling.decoding import GuidedBatch, decode, draw, filter_logits, sample_codes, uniforms
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import font, labelled_grid, readable, wrapped
from mmvit.sampling.settings import SamplingSettings

CAPTIONS = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])


@pytest.fixture
def transformer() -> GeneratorTransformer:
    torch.manual_seed(0)
    core = TransformerConfig(width=32, depth=2, num_heads=2)
    config = GeneratorConfig(vocab_size=20, text_length=4, codebook_size=15, grid=(2, 3), core=core)
    model = GeneratorTransformer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(filter_logits(logits), logits.exp())
    torch.testing.assert_close(filter_logits(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    torch.testing.assert_close(filter_logits(logits, top_k=0), logits.exp())
    torch.testing.assert_close(filter_logits(logits, top_p=0.5), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(filter_logits(logits, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))
    for nothing in (0, 1e-40, 1e-300):
        torch.testing.assert_close(filter_logits(logits, nothing), torch.tensor([[1.0, 0, 0, 0]]))
    squared = logits.exp().square()
    torch.testing.assert_close(filter_logits(logits, temperature=0.5), squared / squared.sum())


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    codes = draw(probabilities.expand(10_000, -1), (torch.arange(10_000) + 0.5) / 10_000)
    assert torch.bincount(codes, minlength=4).tolist() == [5000, 0, 3000, 2000]
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0.0])).item() == 1


def test_guidance_one_is_plain_conditional_sampling(transformer):
    """Drawn here without cache, batch or guidance, one code at a time."""
    codes = sample_codes(transformer, CAPTIONS, [7, 8], guidance_scale=1.0)
    for row, seed in enumerate((7, 8)):
        numbers, so_far = uniforms([seed], 6), torch.zeros(1, 6, dtype=torch.long)
        for place in range(6):
            logits = transformer(CAPTIONS[row : row + 1], so_far)[1][:, place]
            so_far[:, place] = draw(filter_logits(logits), numbers[:, place])
        assert torch.equal(codes[row], so_far[0])


def test_guidance_by_hand():
    conditional, base = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2.0, 2.0, 1.0]])
    guided = GuidedBatch(CAPTIONS[:1], 3.0)
    assert guided.ids.tolist() == [[3, 4, 0, 0], [0, 0, 0, 0]]
    expected = torch.tensor([[-1.0, 2.0, 10.0]])  # base + 3 (conditional - base)
    assert torch.equal(guided.combine(torch.cat([conditional, base])), expected)
    mixed = GuidedBatch(CAPTIONS.unsqueeze(0), torch.tensor([[0.5, -1.0]]), torch.tensor([[9, 9, 0, 0]]))
    assert mixed.ids.tolist() == [*CAPTIONS.tolist(), [9, 9, 0, 0]]
    other = torch.tensor([[3.0, 2.0, 0.0]])
    expected = torch.tensor([[0.5, 2.0, 3.5]])  # base + 0.5 (conditional - base) - (other - base)
    assert torch.equal(mixed.combine(torch.cat([conditional, other, base])), expected)
    alone = GuidedBatch(CAPTIONS, 1.0)
    assert torch.equal(alone.ids, CAPTIONS)
    assert torch.equal(alone.combine(conditional), conditional)


def test_both_branches_of_guidance_equal_their_uncached_selves(transformer):
    scale, codes = 3.0, sample_codes(transformer, CAPTIONS, [1, 2], guidance_scale=3.0)
    conditional = transformer(CAPTIONS, codes)[1]
    unconditional = transformer(torch.zeros_like(CAPTIONS), codes)[1]
    logits = unconditional + scale * (conditional - unconditional)
    numbers = uniforms([1, 2], 6)
    again = torch.stack([draw(filter_logits(logits[:, i]), numbers[:, i]) for i in range(6)], 1)
    assert torch.equal(codes, again)
    assert not torch.equal(codes, sample_codes(transformer, CAPTIONS, [1, 2]))


def test_inputs_are_never_changed(transformer):
    before = CAPTIONS.clone()
    sample_codes(transformer, CAPTIONS, [0, 0], guidance_scale=2.0, top_k=3, top_p=0.9)
    assert torch.equal(CAPTIONS, before)


def test_a_seed_gives_its_image_in_any_batch(transformer):
    together = sample_codes(transformer, CAPTIONS, [5, 6])
    assert torch.equal(together[1:], sample_codes(transformer, CAPTIONS[1:], [6]))
    assert not torch.equal(together[1:], sample_codes(transformer, CAPTIONS[1:], [7]))


@pytest.mark.parametrize("ahead", [2, 3, 16])
@pytest.mark.parametrize("attention", ["causal", "prefix", "dalle"])
def test_drafts_change_no_code(transformer, attention, ahead, monkeypatch):
    """Also where some codes are given, and images keep different numbers of drafts."""
    config = transformer.config.model_copy(update={"attention": attention, "convolution": 3})
    model = GeneratorTransformer(config).eval()
    model.load_state_dict(transformer.state_dict())
    given = torch.tensor([[-1, 3, -1, -1, 9, -1], [-1] * 6])
    how = {"guidance_scale": 1.5, "given": given, "temperature": 0.2, "top_k": 9}
    for seed in range(10):
        monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: 1)
        *one_by_one, (expected, _) = decode(model, CAPTIONS, [seed, seed + 1], **how)
        monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: ahead)
        *shown, (codes, known) = decode(model, CAPTIONS, [seed, seed + 1], **how)
        assert torch.equal(codes, expected)
        assert known.all()
        assert len(one_by_one) == 5
        assert len(shown) <= 5


def test_nothing_is_drafted_in_lower_precision(transformer):
    """There, a forward of several codes rounds unlike several of one."""
    lengths = []
    transformer.core.register_forward_pre_hook(lambda core, inputs: lengths.append(inputs[0].shape[1]))
    with torch.autocast("cpu", torch.bfloat16):
        sample_codes(transformer, CAPTIONS, [0, 1])
    assert lengths == [5, 1, 1, 1, 1, 1]


def test_threads_of_a_server_leave_the_number_of_threads_alone(transformer):
    """It is the whole process's, and two requests would restore each other's."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        transformer.core.register_forward_pre_hook(lambda core, inputs: seen.append(torch.get_num_threads()))
        thread = Thread(target=sample_codes, args=(transformer, CAPTIONS[:1], [0]))
        thread.start()
        thread.join()
        assert {*seen} == {2}
        seen.clear()
        sample_codes(transformer, CAPTIONS[:1], [0])
        assert {*seen} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_likely_drafts_save_forwards_and_known_codes_are_final(transformer, monkeypatch):
    """A model that draws one code all over is right with every draft."""
    transformer.image_head.bias.data[4] = 100
    codes = sample_codes(transformer, CAPTIONS, [0, 1])
    assert (codes == 4).all()
    forwards = []
    transformer.core.register_forward_pre_hook(lambda core, inputs: forwards.append(inputs[0].shape[1]))
    for drawn, known in decode(transformer, CAPTIONS, [0, 1]):
        assert torch.equal(drawn[known], codes[known])
    assert forwards == [5, 5]


def test_each_step_reads_one_token_whatever_came_before(transformer, monkeypatch):
    lengths = []
    monkeypatch.setattr("mmvit.sampling.decoding.window", lambda rows, device: 1)
    transformer.core.register_forward_pre_hook(lambda core, inputs: lengths.append(inputs[0].shape[1]))
    sample_codes(transformer, CAPTIONS, [0, 1])
    assert lengths == [5, 1, 1, 1, 1, 1]


def test_codes_are_reported_as_they_are_drawn(transformer):
    codes, before = sample_codes(transformer, CAPTIONS, [0, 1]), 0
    for drawn, known in decode(transformer, CAPTIONS, [0, 1]):
        done = int(known[0].sum())
        assert torch.equal(drawn[:, :done], codes[:, :done])
        assert torch.equal(known, (torch.arange(6) < done).expand(2, 6))
        assert done > before
        before = done
    assert done == 6


@pytest.fixture
def generator(tokenizer: TextTokenizer) -> Generator:
    torch.manual_seed(0)
    core = TransformerConfig(width=32, depth=1, num_heads=2)
    image_tokenizer = VQModel(VQConfig(codebook_size=16))
    config = GeneratorConfig(
        vocab_size=tokenizer.vocab_size, text_length=6, codebook_size=16, grid=(2, 3), core=core
    )
    return Generator(GeneratorTransformer(config), tokenizer, image_tokenizer)


def test_one_folder_is_all_that_sampling_needs(generator, tmp_path):
    images = generator.generate(["red apple", ""], num_images=2, seed=3)
    assert [image.size for image in images] == [(24, 16)] * 4
    again = Generator.from_pretrained(generator.save_pretrained(tmp_path / "model"))
    same = again.generate(["red apple", ""], num_images=2, seed=3)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in same]
    codes = generator.generate_codes(["red apple", ""], num_images=2, seed=3)
    assert torch.equal(codes, again.generate_codes(["red apple", ""], num_images=2, seed=3, batch_size=3))
    assert torch.equal(codes[1:2], again.generate_codes("red apple", seed=4))


def test_a_folder_says_how_it_is_sampled(generator, tmp_path):
    nn.init.normal_(generator.transformer.image_head.weight)
    generator.defaults = SamplingSettings(guidance_scale=2.0, temperature=0.5, top_k=3)
    again = Generator.from_pretrained(generator.save_pretrained(tmp_path))
    assert again.defaults == generator.defaults
    settings = {"guidance_scale": 2.0, "temperature": 0.5, "top_k": 3}
    expected = Generator(generator.transformer, generator.text_tokenizer, generator.image_tokenizer)
    drawn = again.generate_codes("red apple", 8)
    assert torch.equal(drawn, expected.generate_codes("red apple", 8, **settings))
    assert not torch.equal(drawn, again.generate_codes("red apple", 8, temperature=2.0, top_k=None))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[", r"generation_config\.json is not"),
        (
            '{"temperature": "warm"}',
            r'generation_config\.json: temperature = "warm": expected a number',
        ),
        (
            '{"temprature": 1}',
            r"config\.json: unknown .* temprature: did you mean temp",
        ),
        ("[1]", r"generation_config\.json: expected \{guidance_scale, .* with numbers, got \[1\]"),
        ('{"temperature": -1}', r"generation_config\.json: temperature = -1"),
    ],
)
def test_a_broken_generation_config_is_named(generator, tmp_path, written, message):
    (generator.save_pretrained(tmp_path) / "generation_config.json").write_text(written)
    with pytest.raises(UserError, match=message):
        Generator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "image_tokenizer",
    [
        DiscreteVAE(DiscreteVAEConfig(codebook_size=16, width=8, blocks_per_group=1, code_width=4)),
        VQGAN(
            VQGANConfig(
                codebook_size=16, code_width=4, latent_width=4, stem_width=4, widths=(4, 4), num_groups=2,
                blocks_per_level=1, encoder_attention=(), decoder_attention=(),
            )
        ),
        VQModel(VQConfig(quantizer="fsq", levels=(4, 4), codebook_size=16)),
    ],
    ids=["dvae", "vqgan", "fsq"],
)  # fmt: skip
def test_a_generator_draws_with_any_image_tokenizer(image_tokenizer, generator, tmp_path):
    generator.transformer.start_from_codebook(image_tokenizer.code_vectors())
    other = Generator(generator.transformer, generator.text_tokenizer, image_tokenizer)
    (image,) = other.generate("red apple")
    assert image.size == (3 * image_tokenizer.factor, 2 * image_tokenizer.factor)
    again = Generator.from_pretrained(other.save_pretrained(tmp_path))
    assert type(again.image_tokenizer) is type(image_tokenizer)
    assert again.generate("red apple")[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        ([], {}, "no captions"),
        (["a"], {"num_images": 0}, "num_images: expected a whole number of at least 1, got 0"),
        (
            ["a"],
            {"temperature": -1.0},
            r"sampling settings: temperature = -1\.0: expected",
        ),
        (["a"], {"top_k": -1}, "top_k = -1: expected a number of at least 0"),
        (["a"], {"top_p": 0.0}, r"top_p = 0\.0: expected a number greater than 0"),
    ],
)
def test_bad_settings_are_refused(generator, captions, settings, message):
    with pytest.raises(UserError, match=message):
        generator.generate(captions, **settings)


def test_guidance_needs_a_model_that_learnt_it(generator):
    config = generator.transformer.config.model_copy(update={"caption_dropout": 0.0})
    unguided = Generator(GeneratorTransformer(config), generator.text_tokenizer, generator.image_tokenizer)
    with pytest.raises(UserError, match="needs a model trained with caption dropout"):
        unguided.generate("a", guidance_scale=2.0)


def test_what_a_model_cannot_know_is_said(generator):
    config = generator.transformer.config.model_copy(update={"caption_dropout": 0.0})
    unguided = Generator(GeneratorTransformer(config), generator.text_tokenizer, generator.image_tokenizer)
    with pytest.warns(UserWarning, match="so it never saw an empty caption"):
        unguided.generate("")
    with pytest.warns(UserWarning, match="has no letter or digit: models read words"):
        generator.generate("🍎🍏")


def test_a_folder_that_lacks_a_tokenizer_is_named(generator, tmp_path):
    folder = generator.save_pretrained(tmp_path / "model")
    shutil.rmtree(folder / "image_tokenizer")
    with pytest.raises(UserError, match=r"model has no image_tokenizer/, the tokenizer that"):
        Generator.from_pretrained(folder)


def test_tokenizers_that_do_not_fit_are_refused(generator):
    other = VQModel(VQConfig(codebook_size=32))
    with pytest.raises(UserError, match="has 32 codes, but the generator was built for 16"):
        Generator(generator.transformer, generator.text_tokenizer, other)


def test_long_and_strange_captions_are_drawn(generator):
    with pytest.warns(UserWarning, match="and were cut there"):
        assert len(generator.generate(["apple " * 10_000, "🍎🍏", "赤リンゴ", "\x00"])) == 4


def test_retrieval_by_hand():
    references = torch.tensor([[0.0], [1.0], [1.0], [5.0]]).view(4, 1, 1, 1)
    generated = torch.tensor([[0.9], [2.9], [-3.0]]).view(3, 1, 1, 1)
    ranks = pixel_ranks(generated, references, torch.tensor([2, 3, 1]))
    assert ranks.tolist() == [
        0,
        2,
        1,
    ]  # equal images do not outrank each other; 2.9 is nearer to both ones than to 5
    assert recall(ranks, 1) == pytest.approx(1 / 3)
    assert recall(ranks, 2) == pytest.approx(2 / 3)


def test_labels_that_no_font_shows_are_code_points(monkeypatch):
    monkeypatch.setattr("mmvit.sampling.grids.system_fonts", lambda: [])
    assert readable("rød æble – красное яблоко") == "rød æble – красное яблоко"
    with pytest.warns(UserWarning, match="no font can show 赤い; labels show code points"):
        assert readable("赤い apple\n") == "U+8D64 U+3044 apple"
    for label in ("U+8D64 U+30EA U+30F3 U+30B4 " * 3, "W" * 100, "i i " * 3000, "apple"):
        lines = wrapped(label, 192)
        assert max(font().getlength(line) for line in lines) <= 192
        assert "".join(lines).replace(" ", "") == label[:768].replace(" ", "")


def test_grid_has_a_row_for_each_caption():
    image = Image.new("RGB", (8, 8), "red")
    sheet = labelled_grid([[image, image], [image]], ["one", "two " * 50], ["caption", "a", "b"], cell=32)
    assert sheet.width == 200 + 2 * 36 + 4
    assert sheet.getpixel((200 + 16, sheet.height - 20)) == (255, 0, 0)


def test_every_filter_reaches_the_codes(monkeypatch):
    """A setting that is checked and saved, but not passed on, would be ignored in silence."""
    seen = {}

    def spy(transformer, ids, seeds, scale, base, given, **filters):
        seen.update(filters)
        return torch.zeros(len(ids), 64, dtype=torch.long)

    monkeypatch.setattr("mmvit.sampling.generator.sample_codes", spy)
    settings = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "num_steps": 3}
    generator = Generator.from_pretrained(device="cpu")
    generator.transformer.config = generator.transformer.config.model_copy(update={"order": "any"})
    generator.draw("red apple", **settings)
    assert seen == settings
    left = {*SamplingSettings.model_fields} - {*settings} - {"guidance_scale", "seed", "batch_size"}
    assert not left, f"does {left} change how codes are drawn? Then it belongs into SamplingSettings.decoding"
