"""Mixed and negative captions, choosing among candidates, editing images, and ranking captions."""

from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import TextTokenizer
from mmvit.data.images import decode_image, encode_png, pixels_from_images, to_unit_range
from mmvit.errors import UserError
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.sampling.candidates import CaptionScorer, caption_evidence, log_likelihood, rank_captions
from mmvit.sampling.decoding import draw, filter_logits, sample_codes, uniforms
from mmvit.sampling.editing import complete, edit, kept_codes, variations
from mmvit.sampling.generator import Generator

CORE = TransformerConfig(width=32, depth=2, num_heads=2)
APPLE, PEAR = torch.tensor([[3, 4, 0, 0]]), torch.tensor([[5, 6, 7, 8]])
EMPTY = torch.zeros_like(APPLE)


def randomised(model: nn.Module, std: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.fixture
def transformer() -> GeneratorTransformer:
    config = GeneratorConfig(vocab_size=20, text_length=4, codebook_size=15, grid=(2, 3), core=CORE)
    return randomised(GeneratorTransformer(config))


@pytest.fixture
def generator(tokenizer: TextTokenizer) -> Generator:
    config = GeneratorConfig(
        vocab_size=tokenizer.vocab_size, text_length=6, codebook_size=16, grid=(2, 3), core=CORE
    )
    torch.manual_seed(0)
    image_tokenizer = VQModel(VQConfig(codebook_size=16))
    return Generator(randomised(GeneratorTransformer(config)), tokenizer, image_tokenizer)


@pytest.fixture
def sensitive(generator) -> Generator:
    """One whose logits depend much on its captions, so that an option without effect shows."""
    for parameter in generator.transformer.parameters():
        parameter.data *= 4
    return generator


def test_a_mixture_is_the_weighted_sum_of_what_each_caption_changes(transformer):
    captions = torch.stack([APPLE[0], PEAR[0]]).unsqueeze(0)
    scales = torch.tensor([[1.5, -0.5]])
    codes = sample_codes(transformer, captions, [4], scales, base_ids=EMPTY)
    apple, pear, base = (transformer(ids, codes)[1] for ids in (APPLE, PEAR, EMPTY))
    logits = base + 1.5 * (apple - base) - 0.5 * (pear - base)
    numbers = uniforms([4], 6)
    again = torch.stack([draw(filter_logits(logits[:, i]), numbers[:, i]) for i in range(6)], 1)
    assert torch.equal(codes, again)


def test_a_mixture_of_one_caption_is_the_caption(generator):
    settings = {"guidance_scale": 2.0, "seed": 3}
    alone = generator.generate_codes("red apple", 2, **settings)
    assert torch.equal(generator.generate_codes({"red apple": 1.0}, 2, **settings), alone)
    both = generator.generate_codes(["red apple", {"red apple": 1, "pear": 0}], **settings)
    assert torch.equal(both[0], both[1])
    away = generator.generate_codes({"red apple": 1, "pear": -1}, 8, **settings)
    assert not torch.equal(away, generator.generate_codes("red apple", 8, **settings))


def test_a_negative_caption_takes_the_empty_ones_place(transformer):
    codes = sample_codes(transformer, APPLE, [2], 3.0, base_ids=PEAR)
    wanted, against = transformer(APPLE, codes)[1], transformer(PEAR, codes)[1]
    numbers = uniforms([2], 6)
    logits = against + 3 * (wanted - against)
    again = torch.stack([draw(filter_logits(logits[:, i]), numbers[:, i]) for i in range(6)], 1)
    assert torch.equal(codes, again)
    by_default = sample_codes(transformer, APPLE, [2], 3.0)
    assert torch.equal(sample_codes(transformer, APPLE, [2], 3.0, base_ids=EMPTY), by_default)


@pytest.mark.parametrize(
    ("prompt", "settings", "decoded"),
    [
        ("pear", {"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ("pear", {"temperature": 0.3}, {"temperature": 0.3}),
        ("pear", {"top_k": 2}, {"top_k": 2}),
        ("pear", {"top_p": 0.3}, {"top_p": 0.3}),
        (
            "pear",
            {"guidance_scale": 3.0, "negative": "red apple"},
            {"guidance_scale": 3.0, "base_ids": "red apple"},
        ),
        ({"pear": 0.6, "red apple": 1.7}, {}, {"guidance_scale": [0.6, 1.7]}),
        ({"pear": 0.6, "red apple": -0.5}, {"guidance_scale": 2.0}, {"guidance_scale": [1.2, -1.0]}),
    ],
)
def test_every_setting_reaches_the_codes(sensitive, prompt, settings, decoded):
    """Each alone changes what is drawn, to what decoding with it gives."""

    def encode(*captions):
        return sensitive.text_tokenizer.encode(captions, 6)[0]

    captions = encode(*prompt) if isinstance(prompt, dict) else encode(prompt)[0]
    arguments = {name: value for name, value in decoded.items() if name != "base_ids"}
    if isinstance(prompt, dict):
        arguments["guidance_scale"] = torch.tensor(decoded["guidance_scale"]).expand(4, -1)
    if "base_ids" in decoded:
        arguments["base_ids"] = encode(decoded["base_ids"]).expand(4, -1)
    expected = sample_codes(
        sensitive.transformer, captions.expand(4, *captions.shape), [3, 4, 5, 6], **arguments
    )
    codes = sensitive.generate_codes(prompt, 4, seed=3, **settings)
    assert torch.equal(codes.flatten(1), expected)
    plain = "pear" if isinstance(prompt, str) else dict.fromkeys(prompt, 1.0)
    without = {name: value for name, value in settings.items() if name != "negative"}
    without = without if "negative" in settings else {}
    assert not torch.equal(codes, sensitive.generate_codes(plain, 4, seed=3, **without))


def test_given_codes_stay_and_guide_what_follows(transformer):
    given = torch.tensor([[0, -1, -1, 9, -1, -1]])
    plain = sample_codes(transformer, APPLE, [5])
    assert plain[0, 0] != 0  # so code 0 is kept, not drawn by chance
    codes = sample_codes(transformer, APPLE, [5], given=given)
    assert codes[0, [0, 3]].tolist() == [0, 9]
    logits, numbers = transformer(APPLE, codes)[1], uniforms([5], 6)
    for place in (1, 2, 4, 5):
        assert codes[:, place] == draw(filter_logits(logits[:, place]), numbers[:, place])


def test_likelihood_and_evidence_by_hand(transformer):
    codes = torch.tensor([[1, 2, 3, 4, 5, 6]])
    expected = []
    for ids in (APPLE, EMPTY):
        logs = transformer(ids, codes)[1].log_softmax(-1)
        expected.append(sum(logs[0, place, code] for place, code in enumerate(codes[0].tolist())))
    torch.testing.assert_close(log_likelihood(transformer, APPLE, codes)[0], expected[0])
    torch.testing.assert_close(caption_evidence(transformer, APPLE, codes)[0], expected[0] - expected[1])


def test_the_best_candidates_by_the_models_own_evidence_are_returned(generator):
    every = generator.draw(["red apple", "pear"], 6, seed=10)
    scores = generator.evidence(["red apple"] * 6 + ["pear"] * 6, every.codes).view(2, 6)
    drawn = generator.draw(["red apple", "pear"], 2, candidates=3, seed=10)
    best = scores.topk(2, dim=1).indices
    assert drawn.seeds == (10 + best).flatten().tolist()
    assert torch.equal(drawn.codes, torch.cat([every.codes[:6][best[0]], every.codes[6:][best[1]]]))
    torch.testing.assert_close(drawn.scores, scores.gather(1, best).flatten())


def test_a_mixtures_captions_count_by_weight_in_choosing(sensitive):
    mixture = {"red apple": 0.5, "pear": -0.8}
    every = sensitive.draw(mixture, 12, seed=12)
    apple, pear = (sensitive.evidence([caption] * 12, every.codes) for caption in mixture)
    scores = 0.5 * apple - 0.8 * pear
    assert scores.argmax() not in ((apple + pear).argmax(), apple.argmax())
    drawn = sensitive.draw(mixture, candidates=12, seed=12)
    assert drawn.seeds == [12 + int(scores.argmax())]
    torch.testing.assert_close(drawn.scores, scores.max(0, keepdim=True).values)


def test_candidates_are_chosen_by_a_scorer(generator, tokenizer):
    image = ClassifierConfig(image_size=16, patch_size=8, core=CORE)
    config = CLIPConfig(image=image, text=CORE, vocab_size=tokenizer.vocab_size, text_length=6)
    scorer = CaptionScorer(randomised(CLIP(config)), tokenizer)
    every = generator.draw("pear", 5)
    scores = scorer.scores(generator.decode(every.codes), ["pear"] * 5)
    drawn = generator.draw("pear", candidates=5, scorer=scorer)
    assert drawn.seeds == [int(scores.argmax())]
    assert torch.equal(drawn.codes[0], every.codes[scores.argmax()])


def test_candidates_of_a_completion_are_chosen_by_how_well_they_fit_what_is_kept(generator):
    given = torch.tensor([[[3, -1, 5], [-1, -1, 7]]])
    every = generator.draw("pear", 8, given=given)
    ids, _ = generator.text_tokenizer.encode(["pear"] * 8, 6)
    logs = generator.transformer(ids, every.codes.flatten(1))[1].log_softmax(-1)
    scores = logs[:, 2, 5] + logs[:, 5, 7]  # what stands before all drawn codes says nothing
    drawn = generator.draw("pear", candidates=8, given=given)
    assert drawn.seeds == [int(scores.argmax())] != [int(scores.argmin())]
    torch.testing.assert_close(drawn.scores, scores.max(0, keepdim=True).values)
    assert generator.draw("", candidates=8, given=given).scores.isfinite().all()
    upper = torch.tensor([[[3, 4, 5], [-1, -1, -1]]])  # nothing is kept after what is drawn: by the caption
    by_caption = generator.draw("pear", candidates=4, given=upper)
    torch.testing.assert_close(by_caption.scores, generator.evidence(["pear"], by_caption.codes))


def test_where_memory_is_short_fewer_are_drawn_at_a_time(generator, monkeypatch):
    expected = generator.draw(["red apple", "pear"], 5, candidates=2, seed=3)
    tried = []

    def small(model, rows, *arguments, **settings):
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_codes(model, rows, *arguments, **settings)

    monkeypatch.setattr("mmvit.sampling.generator.sample_codes", small)
    most = 3
    drawn = generator.draw(["red apple", "pear"], 5, candidates=2, seed=3)
    assert tried == [20, 10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert torch.equal(drawn.codes, expected.codes)
    assert drawn.seeds == expected.seeds
    most = 0
    with pytest.raises(UserError, match="out of memory with a single image; use"):
        generator.draw("pear")


def test_where_memory_is_short_fewer_are_decoded_encoded_and_scored_at_a_time(generator, monkeypatch):
    codes = generator.draw(["red apple", "pear"], 4, seed=3).codes
    pixels = generator.decode(codes)
    own, captions = generator.encode(pixels), ["red apple"] * 8
    evidence = generator.evidence(captions, codes)

    def short_of_memory(whole):
        def limited(part, *arguments):
            if len(part) > 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
            return whole(part, *arguments)

        return limited

    for part, name in (
        (generator.image_tokenizer, "decode"), (generator.image_tokenizer, "encode"),
        (generator.transformer, "forward"),
    ):  # fmt: skip
        monkeypatch.setattr(part, name, short_of_memory(getattr(part, name)))
    torch.testing.assert_close(generator.decode(codes), pixels)
    assert torch.equal(generator.encode(pixels), own)
    torch.testing.assert_close(generator.evidence(captions, codes), evidence)
    monkeypatch.setattr(generator.image_tokenizer, "decode", mock.Mock(side_effect=RuntimeError("else")))
    with pytest.raises(RuntimeError, match="else"):
        generator.decode(codes)


def test_a_kept_upper_half_stays_in_every_image(generator):
    (image,) = generator.generate("red apple", seed=1)
    codes, kept = generator.encode([image]), torch.tensor([[True] * 3, [False] * 3])
    images = complete(generator, [image], kept, "pear", num_images=3)
    assert len(images) == 3
    given = codes.masked_fill(~kept, -1)
    drawn = generator.generate_codes("pear", 3, given=given)
    assert (drawn[:, 0] == codes[:, 0]).all()
    assert [one.tobytes() for one in generator.images(drawn)] == [one.tobytes() for one in images]
    given = torch.tensor([[[1, 2, 3], [-1] * 3], [[-1] * 3, [4, 5, 6]]])
    drawn = generator.generate_codes(["pear", "red apple"], 2, given=given)
    assert torch.equal(drawn[:2, 0], given[[0, 0], 0])  # both versions of the first image
    assert torch.equal(drawn[2:, 1], given[[1, 1], 1])


def test_variations_keep_their_share(generator):
    (image,) = generator.generate("red apple", seed=1)
    pixels = pixels_from_images(generator.images(generator.encode([image])), 16, 24)
    (same,) = variations(generator, image, "pear", num_images=1, keep=1.0)
    torch.testing.assert_close(pixels_from_images([same], 16, 24), pixels)
    four = variations(generator, image, "pear", keep=0.5, seed=7)
    assert len({one.tobytes() for one in four}) > 1
    (again,) = variations(generator, image, "pear", num_images=1, keep=0.5, seed=8)
    assert again.tobytes() == four[1].tobytes()


def test_editing_is_one_line(generator, tmp_path):
    """Each way of saying what to keep, against the mask of codes that it means."""
    (image,) = generator.generate("red apple", seed=1)
    settings = {"num_images": 2, "seed": 4}
    top, left = torch.tensor([[True] * 3, [False] * 3]), torch.tensor([[True, False, False]] * 2)
    mask = Image.new("L", (24, 16), 255)
    mask.paste(0, (0, 0, 24, 8))
    mask.save(tmp_path / "mask.png")
    for keep, kept in (
        ("top", top), ("bottom", ~top), ("left", left), ("right", ~left), (top, top), (mask, top),
        (tmp_path / "mask.png", top),
    ):  # fmt: skip
        edited = generator.edit(image, "pear", keep, **settings)
        expected = complete(generator, [image], kept, "pear", **settings)
        assert [one.tobytes() for one in edited] == [one.tobytes() for one in expected]
    shared = [one.tobytes() for one in generator.edit(image, "pear", keep=0.5, **settings)]
    assert shared == [one.tobytes() for one in variations(generator, image, "pear", keep=0.5, **settings)]
    assert generator.edit(image, "pear", **settings)[0].tobytes() not in shared


def test_halves_are_those_of_the_grid():
    row, column = torch.arange(2)[:, None].expand(2, 6), torch.arange(6)[None].expand(2, 6)
    halves = {"top": row < 1, "bottom": row >= 1, "left": column < 3, "right": column >= 3}
    for name, kept in halves.items():
        assert torch.equal(kept_codes(name, (2, 6), (48, 16)), kept), name


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, "keep: expected top, bottom, left, right, a share such as 0.5, or a mask's file, got None"),
        (1, "keep 1 keeps every code, so nothing would change"),
        (-0.1, "keep: expected a share of the codes from 0 to 1, got -0.1"),
        (Image.new("L", (24, 16)), "the mask is mostly black for every code, so nothing would change"),
        (Image.new("L", (8, 8)), "expected a mask of the image's size, 24x16 pixels, got 8x8"),
        (torch.zeros(2, 2, dtype=torch.bool), "expected a boolean mask of 2x3 codes"),
    ],
)
def test_what_cannot_be_kept_is_refused(generator, keep, message):
    with pytest.raises(UserError, match=message):
        generator.edit(Image.new("RGB", (24, 16)), "pear", keep)


def test_captions_are_ranked_by_the_evidence_of_an_image(generator, monkeypatch):
    images = generator.generate(["red apple", "pear"])
    captions = ["red apple", "pear", ""]
    ranked = rank_captions(generator, images, captions)
    codes = generator.encode(images)
    for row in range(2):
        expected = generator.evidence(captions, codes[row].expand(3, -1, -1))
        torch.testing.assert_close(ranked[row], expected)
    assert ranked[:, 2].abs().max() < 1e-4  # the empty caption says nothing
    torch.testing.assert_close(rank_captions(generator, images, captions, torch.bfloat16), ranked)
    monkeypatch.setattr("mmvit.sampling.candidates.SHORTLIST", 1)
    rough = rank_captions(generator, images, captions, torch.bfloat16)
    places = torch.arange(len(images)), rough.argmax(1)
    torch.testing.assert_close(rough[places], ranked[places])
    assert not torch.equal(rough, ranked)


def test_captions_that_are_cut_where_they_are_ranked_are_named(generator):
    with pytest.warns(UserWarning, match="1 of 2 captions have more than 6 tokens and were cut there"):
        rank_captions(generator, generator.generate(["pear"]), ["pear", "apple " * 9])


def test_images_of_another_shape_are_cropped_as_those_of_shards_are():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    (pixels,) = pixels_from_images([wide], 8, 8)
    torch.testing.assert_close(pixels.numpy(), to_unit_range(decode_image(encode_png(wide), (8, 8))))
    assert pixels[2].min() > 0.8  # the middle alone, which is blue


def test_the_scripts_edit_and_name(generator, run_script, tmp_path):
    model = generator.save_pretrained(tmp_path / "model")
    Image.new("RGB", (24, 16), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (24, 16), 0)
    mask.paste(255, (0, 8, 24, 16))
    mask.save(tmp_path / "mask.png")
    small = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(small)
    black = tmp_path / "black.png"
    Image.new("L", (24, 16)).save(black)
    sheets = []
    for keep in ("top", tmp_path / "mask.png", 0.5):
        out = tmp_path / f"{len(sheets)}.png"
        arguments = (tmp_path / "red.png", "red apple", "--keep", keep, "--num", 2, "--out", out)
        ran = run_script("pipelines/edit_images.py", "--model", model, *arguments)
        assert ran.returncode == 0, ran.stderr
        sheets.append(out.read_bytes())
        names = ["000-red-apple.png", "001-red-apple.png"]
        assert [path.name for path in sorted(out.with_suffix("").iterdir())] == names
    assert sheets[0] == sheets[1] != sheets[2]
    captions = tmp_path / "captions.txt"
    captions.write_text("red apple\npear\n")
    image = tmp_path / "red.png"
    ran = run_script(
        "pipelines/caption_images.py", "--model", model, image, "--captions-file", captions, "--top", 1
    )
    assert ran.returncode == 0, ran.stderr
    best = rank_captions(generator, [Image.open(image)], ["red apple", "pear"])[0]
    assert ["red apple", "pear"][best.argmax()] in ran.stdout
    out = tmp_path / "best.png"
    arguments = ("pear", "--num", 2, "--candidates", 3, "--negative", "red apple", "--out", out)
    ran = run_script("pipelines/sample_images.py", "--model", model, *arguments, "--guidance-scale", 2)
    assert ran.returncode == 0, ran.stderr
    drawn = generator.draw("pear", 2, candidates=3, negative="red apple", guidance_scale=2.0)
    names = {f"000-pear-seed{seed}.png" for seed in drawn.seeds}
    assert {path.name for path in out.with_suffix("").iterdir()} == names
    for arguments, words in (
        (("gone.png",), "cannot read gone.png"),
        (
            (image, "--keep", "middle"),
            "or a mask's file, got middle",
        ),
        ((captions,), "captions.txt as an image (undecodable image)"),
        (
            (image, "--keep", image),
            "(is drawn again), got colours",
        ),
        ((image, "--keep", black), "the mask is mostly black for every code, so nothing would change"),
        ((image, "--keep", 1), "keep 1 keeps every code, so nothing would change"),
        ((image, "--num", 100_000), "a grid of 1 x 100,001 images would have"),
        ((image, "--keep", small), "expected a mask of the image's size, 24x16 pixels, got 8x8"),
        ((image, "pear", "--scorer", model), "holds a generator, not a CLIP"),
        ((image, "pear", "--negative", "apple"), "has no effect at guidance_scale 1"),
        ((image, "pear", "--out", image), "is the source itself; name another place"),
    ):
        ran = run_script("pipelines/edit_images.py", "--model", model, *arguments)
        assert ran.returncode == 2
        assert words in ran.stderr


def test_images_become_pixels_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pixels_from_images([clear, Image.new("RGB", (9, 9), "white")], 2, 3) == 1).all()
    assert pixels_from_images([clear], 2, 3).shape == (1, 3, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (({"a": float("nan")},), {}, "the weight of 'a': expected a number from -1000 to 1000, got nan"),
        (({},), {}, "an empty mixture of captions"),
        (
            ({"a": 0, "b": -1},),
            {},
            "to lead away from a caption, use `negative`",
        ),
        (("a",), {"candidates": 0}, "candidates: expected a whole number of at least 1, got 0"),
        (("a",), {"guidance": 2.0}, "unknown key guidance: did you mean guidance_scale"),
        (("a",), {"guidance_scale": float("inf")}, "guidance_scale = Infinity: expected 0"),
        (("a",), {"batch_size": 0}, "batch_size = 0: expected a number of at least 1"),
        (("a",), {"seed": 2**64}, "seed = 18446744073709551616: expected a number"),
        (("a",), {"negative": "b"}, "the negative caption 'b' has no effect at guidance_scale 1"),
        (
            ("a",),
            {"negative": "b", "guidance_scale": 0.5},
            "the negative caption 'b' is drawn, not avoided, at guidance_scale 0.5",
        ),
        (({"a": 0.3, "c": 0.7},), {"negative": "b"}, "'b' has no effect at guidance_scale 1 and these wei"),
        (("a",), {"scorer": object()}, "a scorer chooses among candidates: set candidates to 2"),
        (
            ("a",),
            {"scorer": "runs/clip", "candidates": 2},
            "scorer: expected a CaptionScorer, got str: load one",
        ),
        (("a",), {"seed": None}, "seed = null: expected a whole number"),
        (("a",), {"seed": 1.5}, "seed = 1.5: expected a whole number"),
        (("a",), {"top_k": 1.5}, "top_k = 1.5: expected a whole number"),
        (("a",), {"temperature": "hot"}, 'temperature = "hot": expected a number'),
        (("a",), {"guidance_scale": -3}, "guidance_scale = -3.*: expected 0"),
        (("a", 1.5), {}, "num_images: expected a whole number of at least 1, got 1.5"),
        ((None,), {}, r"expected a caption \(str\) or .*dict.*, got None"),
        (([None],), {}, r"expected a caption \(str\) or .*dict.*, got None"),
        ((3,), {}, r"expected a caption \(str\) or .*dict.*, got 3"),
        (("a",), {"negative": None}, r"negative: expected a caption \(str\), got None"),
        (([b"a"],), {}, r"expected a caption \(str\) .*, got b'a'"),
        (({1: 0.5},), {}, "a mixture's captions must be str, got 1"),
        ((["a", ""],), {"candidates": 2}, "candidates for an empty caption cannot"),
        (
            ("a",),
            {"given": torch.zeros(1, 3, 3, dtype=torch.long)},
            r"given: expected codes \(images, 2, 3\), got \(1, 3, 3\)",
        ),
        (("a",), {"given": torch.full((1, 2, 3), 16)}, "given: expected codes from 0 to 15, .* got 16 to 16"),
    ],
)
def test_what_cannot_be_drawn_is_refused(generator, arguments, settings, message):
    with pytest.raises(UserError, match=message):
        generator.generate(*arguments, **settings)


def test_masks_and_captions_that_do_not_fit_are_refused(generator):
    (image,) = generator.generate("red apple")
    with pytest.raises(UserError, match=r"expected a boolean mask of 2x3 codes, got \(3, 3\) of torch.bool"):
        complete(generator, [image], torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(
        UserError, match=r"expected a boolean mask of 2x3 codes, got \(2, 3\) of torch.float32"
    ):
        complete(generator, [image], torch.ones(2, 3))
    with pytest.raises(UserError, match="2 captions for 1 images"):
        complete(generator, [image], torch.ones(2, 3, dtype=torch.bool), ["a", "b"])
    with pytest.raises(UserError, match="keep: expected a share of the codes from 0 to 1, got 2"):
        variations(generator, image, keep=2)
    with pytest.raises(UserError, match=r"expected pixels \(images, 3, 16, 24\), got \(images, 3, 8, 8\)"):
        generator.encode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (({"a": 0.5},), {}, "a mixture of captions needs a model trained with caption dropout"),
        (("a",), {"negative": "b"}, "the negative caption 'b' needs a model trained with"),
        (("a",), {"candidates": 2}, "choosing candidates without a scorer needs"),
    ],
)
def test_what_needs_caption_dropout_says_so(generator, arguments, settings, message):
    config = generator.transformer.config.model_copy(update={"caption_dropout": 0.0})
    unguided = Generator(GeneratorTransformer(config), generator.text_tokenizer, generator.image_tokenizer)
    with pytest.raises(UserError, match=message):
        unguided.generate(*arguments, **settings)


def test_a_file_is_no_image_to_edit():
    with pytest.raises(
        UserError, match=r"expected a Pillow image, got str: open files with PIL\.Image\.open"
    ):
        edit(None, "apple.png", "pear")
