"""Generators of any order: what they see, their loss as a likelihood, and drawing many codes at a time."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generator_scripts import refused
from PIL import Image
from tiny_models import drawn_weights, tiny_generator
from torch import nn

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.fine_tuning import continued
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.hidden_codes import hidden_loss, hide_by_codes, hide_for_training
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.sampling.any_order import group_bounds
from mmvit.sampling.candidates import any_order_likelihoods, log_likelihood
from mmvit.sampling.decoding import decode, default_steps, draw, filter_logits, sample_codes, uniforms
from mmvit.sampling.generator import Generator
from mmvit.sampling.settings import SamplingSettings

CORE = TransformerConfig(width=32, depth=2, num_heads=2)
CAPTIONS = torch.tensor([[3, 4, 0], [5, 0, 0]])
ATTENTION = ("full", "prefix")


def any_order(grid=(3, 4), **settings) -> GeneratorTransformer:
    torch.manual_seed(0)
    config = {"order": "any", "attention": "full", "vocab_size": 8, "text_length": 3, "codebook_size": 6}
    model = GeneratorTransformer(GeneratorConfig(**{**config, "grid": grid, "core": CORE, **settings}))
    return drawn_weights(model).eval()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", ["learned_2d", "rotary_2d"])
def test_a_code_depends_on_all_codes_that_are_not_hidden(attention, positions):
    model = any_order(attention=attention, positions=positions)
    codes, hidden = torch.randint(6, (2, 12)), torch.rand(2, 12) < 0.5
    logits = model(CAPTIONS, codes, hidden)[1]
    changed = torch.where(hidden, (codes + 1) % 6, codes)
    torch.testing.assert_close(model(CAPTIONS, changed, hidden)[1], logits, rtol=0, atol=0)
    seen = (~hidden[0]).nonzero()[-1].item()
    changed = codes.clone()
    changed[0, seen] = (codes[0, seen] + 1) % 6
    moved = (model(CAPTIONS, changed, hidden)[1] - logits).abs().amax(-1)
    assert (moved[0] > 1e-6).all()
    assert (moved[1] == 0).all()


def test_captions_see_codes_with_full_attention_alone():
    """Which lets `prefix` read captions once for all steps."""
    seen = []
    for attention in ATTENTION:
        model = any_order(attention=attention)
        model.core.register_forward_hook(lambda core, inputs, output: seen.append(output[:, : 1 + 3]))
        for code in (1, 2):
            model(CAPTIONS, torch.full((2, 12), code), torch.zeros(2, 12, dtype=torch.bool))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])


def test_every_image_hides_some_codes_by_a_cosine_and_batches_hardly_differ():
    torch.manual_seed(0)
    shares = torch.stack([hide_for_training(64, 64, torch.device("cpu")).float().mean(1) for _ in range(50)])
    assert shares.min() >= 1 / 64
    assert shares.max() == 1
    assert shares.mean().item() == pytest.approx(2 / torch.pi, abs=0.02)
    assert shares.mean(1).std() < 0.01
    alone = torch.stack([hide_for_training(1, 64, torch.device("cpu")).float().mean() for _ in range(400)])
    assert alone.mean().item() == pytest.approx(2 / torch.pi, abs=0.06)
    assert len(alone.unique()) > 30


def test_hidden_codes_are_anywhere_and_elsewhere_in_every_image():
    torch.manual_seed(0)
    hidden = hide_for_training(2000, 16, torch.device("cpu"))
    assert (hidden.float().mean(0) - hidden.float().mean()).abs().max() < 0.05
    of_half = hidden[hidden.sum(1) == 8]
    assert len(of_half.unique(dim=0)) > 0.9 * len(of_half)


def test_only_hidden_codes_count_in_training_alike_and_in_evaluation_by_image():
    logits, codes = torch.randn(2, 3, 5), torch.tensor([[1, 2, 0], [4, 4, 3]])
    hidden = torch.tensor([[True, False, False], [True, True, True]])
    first, *others = -logits[hidden].log_softmax(-1).gather(1, codes[hidden].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(hidden_loss(logits, codes, hidden), (first + sum(others)) / 4)
    by_image = (first + sum(others) / 3) / 2
    torch.testing.assert_close(hidden_loss(logits, codes, hidden, per_image=True), by_image)


def test_the_loss_reads_and_counts_what_it_should():
    """In training noisy codes and dropped captions, with smoothed labels; in evaluation neither."""
    model = any_order(caption_dropout=0.5, code_noise=0.25, label_smoothing=0.2, codebook_size=30)
    captions, codes = torch.randint(1, 8, (64, 3)), torch.randint(30, (64, 12))
    batch = {"caption_ids": captions, "codes": codes}

    def loss_and_what_was_read():
        with mock.patch.object(model, "forward", wraps=model.forward) as forward:
            metrics = model.loss(batch)[1]
        read = forward.call_args.args
        return metrics["image_loss"], *read, -model(*read)[1].log_softmax(-1)

    loss, read_captions, read_codes, hidden, nats = loss_and_what_was_read()
    assert torch.equal(read_captions, captions)
    assert torch.equal(read_codes, codes)
    assert torch.equal(hidden, hide_by_codes(codes))
    own = nats.gather(2, codes.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(loss, ((own * hidden).sum(1) / hidden.sum(1)).mean())
    assert loss_and_what_was_read()[0] == loss

    loss, read_captions, read_codes, hidden, nats = model.train() and loss_and_what_was_read()
    dropped = (read_captions == 0).all(1)
    assert 16 < dropped.sum() < 48
    assert torch.equal(read_captions[~dropped], captions[~dropped])
    assert 0.1 < (read_codes != codes).float().mean() < 0.4
    assert len(hidden.sum(1).unique()) > 6
    smoothed = 0.8 * nats.gather(2, codes.unsqueeze(2)).squeeze(2) + 0.2 * nats.mean(2)
    torch.testing.assert_close(loss, smoothed[hidden].mean())


def test_the_held_out_loss_is_the_nats_of_one_code_at_a_time_in_random_orders():
    """By all sets of hidden codes, and by all orders of drawing, of a grid of four."""
    model, codes = any_order(grid=(2, 2)), torch.tensor([[1, 5, 0, 2]])
    caption, losses, nats = CAPTIONS[:1], [], []
    with torch.no_grad():
        for count in range(1, 5):
            of_count = []
            for places in itertools.combinations(range(4), count):
                hidden = torch.zeros(1, 4, dtype=torch.bool)
                hidden[0, list(places)] = True
                of_count.append(hidden_loss(model(caption, codes, hidden)[1], codes, hidden, per_image=True))
            losses.append(torch.stack(of_count).mean())
        for order in itertools.permutations(range(4)):
            hidden = torch.ones(1, 4, dtype=torch.bool)
            for place in order:
                logits = model(caption, codes, hidden)[1]
                nats.append(-logits[0, place].log_softmax(-1)[codes[0, place]])
                hidden[0, place] = False
    torch.testing.assert_close(torch.stack(losses).mean(), torch.stack(nats).mean())


def test_held_out_codes_are_hidden_alike_in_batches_of_any_size():
    codes = torch.randint(1024, (2000, 16), generator=torch.Generator().manual_seed(0))
    hidden = hide_by_codes(codes)
    assert torch.equal(hidden[700:900], hide_by_codes(codes[700:900]))
    counts = torch.bincount(hidden.sum(1), minlength=17)
    assert counts[0] == 0
    assert (counts[1:] - 125).abs().max() < 50  # four standard deviations
    assert (hidden.float().mean(0) - 17 / 32).abs().max() < 0.04


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", ["learned_1d", "learned_2d", "sincos_2d", "rotary_2d", "none"])
def test_drawing_equals_a_plain_loop_over_whole_forwards(attention, positions):
    """With guidance: the same codes, and the same number of them, after every step."""
    model, seeds = any_order(attention=attention, positions=positions), [5, 9]
    drawn = [
        (codes.clone(), known.clone())
        for codes, known in decode(model, CAPTIONS, seeds, 2.0, num_steps=5, temperature=0.7, top_k=4)
    ]
    assert len(drawn) == 5
    numbers = uniforms(seeds, 24)
    order = numbers[:, 12:].argsort(1)
    codes, hidden = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.bool)
    done = 0
    for share, (found, known) in zip((1, 2, 5, 8, 12), drawn, strict=True):
        with torch.no_grad():
            caption = model(CAPTIONS, codes, hidden)[1]
            base = model(torch.zeros_like(CAPTIONS), codes, hidden)[1]
        logits = base + 2 * (caption - base)
        for image in range(2):
            for place in order[image, done:share].tolist():
                probabilities = filter_logits(logits[image, place].unsqueeze(0), 0.7, 4)
                codes[image, place] = draw(probabilities, numbers[image, place].unsqueeze(0))
                hidden[image, place] = False
        done = share
        assert torch.equal(found, codes)
        assert torch.equal(known, ~hidden)


def test_one_code_a_step_in_raster_order_is_one_at_a_time(monkeypatch):
    model = any_order()
    monkeypatch.setattr("mmvit.sampling.decoding.draw_order", lambda known, _: torch.arange(12).expand(2, 12))
    found = sample_codes(model, CAPTIONS, [5, 9], num_steps=12)
    codes, hidden, numbers = (
        torch.zeros(2, 12, dtype=torch.long),
        torch.ones(2, 12, dtype=torch.bool),
        uniforms([5, 9], 12),
    )
    for place in range(12):
        with torch.no_grad():
            logits = model(CAPTIONS, codes, hidden)[1][:, place]
        codes[:, place] = draw(filter_logits(logits), numbers[:, place])
        hidden[:, place] = False
    assert torch.equal(found, codes)


def test_codes_do_not_depend_on_the_rest_of_the_batch():
    model = any_order()
    given = torch.full((3, 12), -1)
    given[1, 2:9] = 3
    given[2, 4] = 1
    captions = CAPTIONS[[0, 1, 0]]
    for first in range(20):
        assert_same_alone(model, captions, [first, first + 9, first + 2], given)


def assert_same_alone(model, captions, seeds, given) -> None:
    together = sample_codes(model, captions, seeds, 2.0, given=given, num_steps=6)
    alone = [
        sample_codes(model, captions[i : i + 1], [seed], 2.0, given=given[i : i + 1], num_steps=6)
        for i, seed in enumerate(seeds)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[given >= 0], given[given >= 0])


def test_given_codes_stay_and_guide_what_is_drawn_before_them():
    model, captions = any_order(), CAPTIONS[:1].expand(50, -1)
    given = torch.full((50, 12), -1)
    drawn = []
    for kept in ([1, 2, 3, 4, 5, 0], [0, 0, 5, 5, 1, 1]):
        given[:, 6:] = torch.tensor(kept)
        drawn.append(sample_codes(model, captions, [*range(50)], given=given, num_steps=1))
        assert torch.equal(drawn[-1][:, 6:], given[:, 6:])
    assert not torch.equal(drawn[0][:, :6], drawn[1][:, :6])
    whole = sample_codes(model, captions, [*range(50)], given=drawn[0])  # nothing is left to draw
    assert torch.equal(whole, drawn[0])


@pytest.mark.parametrize(
    ("unknown", "steps"), [(64, 8), (64, 64), (256, 16), (5, 8), (1, 1), (0, 1), (12, 5)]
)
def test_groups_grow_and_are_complete(unknown, steps):
    bounds = [int(bound) for bound in group_bounds(torch.tensor([unknown]), steps)]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    assert sum(sizes) == unknown
    assert len(sizes) == steps
    if unknown >= steps:
        assert sizes[0] == 1 or steps == 1
        assert all(later - earlier >= -1 for earlier, later in itertools.pairwise(sizes))  # but for rounding
    else:
        assert sizes == [1] * unknown + [0] * (steps - unknown)


def test_default_steps():
    assert [default_steps(places) for places in (1, 4, 64, 256, 1024)] == [1, 2, 8, 16, 32]


class PairsThatDiffer:
    """Draws (0, 1) or (1, 0), with probability 1/2 each: a law by which two codes contradict each other."""

    config = SimpleNamespace(order="any", attention="full", num_codes=2)
    image_head = nn.Identity()

    def embed_captions(self, ids):
        return ids

    def read_codes(self, codes, hidden, captions):
        one_is_known = ~hidden.flip(1)
        other = codes.flip(1)
        probabilities = torch.where(one_is_known, (other == 0).double(), 0.5)
        return torch.stack([1 - probabilities, probabilities], -1).log()


def test_codes_drawn_together_contradict_each_other_as_often_as_the_law_says():
    """Half of the time where both are drawn at once, never one after the other."""
    captions, seeds = torch.zeros(4000, 1, dtype=torch.long), list(range(4000))
    together = sample_codes(PairsThatDiffer(), captions, seeds, num_steps=1)
    assert (together[:, 0] == together[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.03)
    one_by_one = sample_codes(PairsThatDiffer(), captions, seeds, num_steps=2)
    assert (one_by_one[:, 0] != one_by_one[:, 1]).all()
    assert one_by_one[:, 0].float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_likelihoods_are_those_of_the_groups():
    model = any_order()
    codes = torch.randint(6, (2, 12), generator=torch.Generator().manual_seed(1))
    found = any_order_likelihoods(model, CAPTIONS, codes, num_steps=12)
    order = uniforms([0], 12)[0].argsort()
    hidden, expected = torch.ones(2, 12, dtype=torch.bool), torch.empty(2, 12)
    with torch.no_grad():
        for place in order:
            logits = model(CAPTIONS, codes, hidden)[1][:, place].log_softmax(-1)
            expected[:, place] = logits.gather(1, codes[:, place : place + 1])[:, 0]
            hidden[:, place] = False
    torch.testing.assert_close(found, expected)
    whole = any_order_likelihoods(model, CAPTIONS, codes).sum(1)
    torch.testing.assert_close(log_likelihood(model, CAPTIONS, codes, batch_size=1), whole)


def test_likelihoods_of_all_images_sum_to_one():
    model = any_order(grid=(1, 3), codebook_size=3)
    codes = torch.tensor([*itertools.product(range(3), repeat=3)])
    for steps in (1, 2, 3):
        likelihoods = any_order_likelihoods(model, CAPTIONS[:1].expand(27, -1), codes, num_steps=steps).sum(1)
        torch.testing.assert_close(likelihoods.exp().sum(), torch.tensor(1.0))


def test_settings_that_do_not_fit_the_order_are_refused():
    for settings, message in (
        ({"order": "any", "attention": "causal"}, r"order = 'any' needs attention = 'full' or 'prefix'"),
        ({"attention": "full"}, r"order = 'raster' needs attention = 'prefix' or 'causal' or 'dalle'"),
        (
            {"order": "any", "attention": "full", "text_loss_weight": 1.0},
            r"cannot be predicted: set text_loss",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build_config(GeneratorConfig, settings, "recipe")


def test_a_raster_generator_goes_on_in_any_order():
    raster = GeneratorTransformer(
        any_order().config.model_copy(update={"order": "raster", "attention": "prefix"})
    )
    model = continued(raster, any_order().config)
    weights = model.state_dict()
    assert weights.pop("mask_token").abs().sum() > 0
    for name, tensor in raster.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    with pytest.raises(UserError, match=r"order = 'any', the recipe 'raster'"):
        continued(any_order(), raster.config)


def test_an_edit_keeps_the_pixels_outside_its_mask(tokenizer):
    generator = tiny_generator(tokenizer)
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    kept = torch.tensor([[True, False, True], [True, True, False]])
    for version in generator.edit(image, "pear", kept, num_images=2, guidance_scale=2):
        changed = (np.asarray(version) != np.asarray(image)).any(-1)
        cells = changed.reshape(2, 8, 3, 8).any((1, 3))
        assert not cells[kept].any()
        assert cells[~kept].all()


@pytest.mark.parametrize("order", ["any", "raster"])
def test_an_image_is_extended_where_positions_go_on(tokenizer, order, run_script, tmp_path):
    generator = tiny_generator(tokenizer, order, positions="rotary_2d")
    generator.defaults = SamplingSettings(temperature=0.9)
    assert generator.with_grid((3, 5)).defaults == generator.defaults
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    codes = []
    draw = Generator.draw
    with mock.patch.object(
        Generator, "draw", lambda *a, **k: codes.append(draw(*a, **k).codes) or draw(*a, **k)
    ):
        images = generator.extend(image, "pear", 2, top=1, right=2, seed=3)
    assert [each.size for each in images] == [(40, 24)] * 2
    assert torch.equal(codes[0][:, 1:, :3], generator.encode([image]).expand(2, -1, -1))
    assert not torch.equal(*codes[0])
    if order == "any":
        assert np.array_equal(np.asarray(images[0])[8:, :24], np.asarray(image))
    generator.save_pretrained(tmp_path / "model")
    image.save(tmp_path / "image.png")
    arguments = ("pipelines/edit_images.py", tmp_path / "image.png", "pear", "--model", tmp_path / "model")
    ran = run_script(
        *arguments, "--extend", "top=1,right=2", "--num", 2, "--seed", 3, "--out", tmp_path / "e.png"
    )
    assert ran.returncode == 0, ran.stderr
    written = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "e").iterdir())]
    assert all(np.array_equal(*pair) for pair in zip(written, map(np.asarray, images), strict=True))
    refused(run_script(*arguments, "--extend", "up=1"), "expected sides with a number of codes")
    refused(run_script(*arguments, "--extend", "top=0"), "at least one in all")


class GreyBlocks(ImageTokenizer):
    """Blocks of 8x8 pixels in one of four greys."""

    factor = 8

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(codebook_size=4)
        self.greys = nn.Parameter(torch.linspace(-1, 1, 4))

    def codes_of(self, pixels):
        return ((F.avg_pool2d(pixels, 8).mean(1) + 1) * 1.5).round().long()

    def pixels_of(self, codes):
        return self.greys[codes].kron(torch.ones(8, 8)).unsqueeze(1).expand(-1, 3, -1, -1)


def test_what_is_drawn_around_an_image_follows_the_rule_of_its_codes(tokenizer):
    """After training on stripes, every row of one random grey, an image's stripes go on to both sides, and
    what is new below it is a stripe, on a grid that was never trained on."""
    core = CORE.model_copy(update={"depth": 1})
    sizes = {"vocab_size": tokenizer.vocab_size, "codebook_size": 4, "text_length": 6}
    model = any_order((3, 4), core=core, positions="rotary_2d", **sizes)
    model = GeneratorTransformer(model.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, 250)
    caption_ids = tokenizer.encode(["stripes"] * 32, 6)[0]
    for _ in range(250):
        codes = torch.randint(4, (32, 3, 1)).expand(-1, -1, 4).flatten(1)
        model.loss({"caption_ids": caption_ids, "codes": codes})[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    generator = Generator(model, tokenizer, GreyBlocks())
    for codes in torch.randint(4, (4, 3, 1)):
        (image,) = generator.images(codes.expand(1, 3, 4))
        (larger,) = generator.extend(image, "stripes", left=2, right=3, bottom=1, num_steps=21, temperature=0)
        assert larger.size == (72, 32)
        rows = np.asarray(larger)[..., 0]
        assert (rows == rows[:, :1]).all()
        assert (rows[:24, 0] == np.asarray(image)[:, 0, 0]).all()


def test_learnt_positions_do_not_go_on(tokenizer):
    image = Image.new("RGB", (24, 16))
    with pytest.raises(UserError, match=r"know no more than the 2x3 codes"):
        tiny_generator(tokenizer).extend(image, "pear", top=1)


def test_edits_are_chosen_by_the_caption_not_by_what_is_kept(tokenizer):
    """All codes were drawn from what is kept, wherever it is, so that its likelihood weighs nothing."""
    generator = tiny_generator(tokenizer)
    given = torch.full((1, 2, 3), -1)
    given[0, 1, 1:] = 3
    drawn = generator.draw("pear", 2, candidates=3, given=given)
    expected = generator.evidence(["pear"] * 2, drawn.codes)
    torch.testing.assert_close(drawn.scores, expected)


def test_what_stays_and_what_is_drawn_have_numbers_of_their_own(tokenizer):
    """With most codes kept, the few that are drawn still take all values."""
    generator = tiny_generator(tokenizer)
    for parameter in generator.transformer.image_head.parameters():
        nn.init.zeros_(parameter)  # all codes are as likely
    drawn, complete = [], Generator.generate_codes
    image = Image.new("RGB", (24, 16))

    def watched(images, num_images=1, *, given, **settings):
        codes = complete(generator, images, num_images, given=given, **settings)
        drawn.extend(codes[given < 0].tolist())
        return [image] * num_images  # decoded, they would take seconds

    with mock.patch.object(generator, "generate", watched):
        generator.edit(image, "pear", 0.9, num_images=300)
    counts = torch.bincount(torch.tensor(drawn), minlength=16)
    assert len(drawn) > 125
    assert counts.min() > len(drawn) / 16 / 3
