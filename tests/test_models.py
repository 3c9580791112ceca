"""Classifier and generator: exact sizes, losses by hand, and one core for both."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from mmvit.core.masks import additive, sparse_causal
from mmvit.core.positions import LayerPositions
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.evaluation.likelihood import generator_loss
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import (
    GeneratorConfig,
    GeneratorTransformer,
    caption_loss,
    dalle_layers,
)
from mmvit.models.presets import PRESETS, preset
from mmvit.models.registry import build_model
from mmvit.models.stems import PatchStem
from mmvit.weights import write_weights

CORE = TransformerConfig(width=32, depth=2, num_heads=2)
POSITIONS = ["none", "learned_1d", "learned_2d", "learned_2d_concat", "sincos_2d", "rotary_2d"]


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def small_generator(**parts) -> GeneratorTransformer:
    settings = {
        "vocab_size": 50,
        "text_length": 5,
        "codebook_size": 30,
        "grid": (3, 4),
        "attention": "causal",
        "positions": "rotary_2d",
        "text_loss_weight": 1.0,
        "core": CORE,
        **parts,
    }
    return randomise(GeneratorTransformer(GeneratorConfig(**settings)))


def captions_and_codes(batch: int = 2):
    torch.manual_seed(1)
    captions = torch.randint(1, 50, (batch, 5))
    captions[0, 3:] = 0
    return captions, torch.randint(30, (batch, 12))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit-b16", 86_567_656),
        ("vit-b32", 88_224_232),
        ("vit-l16", 304_326_632),
        ("vit-l32", 306_535_400),
        ("vit-h14", 632_045_800),
    ],
)
def test_published_vits_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = Classifier(preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_preset_builds_on_the_meta_device():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = build_model(config)
        assert sum(p.numel() for p in model.parameters()) > 1e6, name


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean vit-b16"):
        preset("vit-b-16")


def test_patch_stem_equals_a_strided_convolution():
    stem, pixels = PatchStem(4, 3, 8), torch.randn(2, 3, 8, 12)
    weight = stem.proj.weight.view(8, 3, 4, 4)
    expected = nn.functional.conv2d(pixels, weight, stem.proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(pixels), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("stem", "positions"),
    [*(("patch", kind) for kind in (*POSITIONS, "relative_1d")), ("conv", "none"), ("residual", "none")],
)
def test_classifier_learns_one_batch(stem, pooling, positions):
    torch.manual_seed(0)
    config = ClassifierConfig(
        image_size=(8, 12),
        patch_size=4,
        num_classes=3,
        stem=stem,
        pooling=pooling,
        positions=positions,
        core=CORE,
    )
    model = Classifier(config)
    batch = {"pixels": torch.randn(6, 3, 8, 12), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    assert model.loss(batch)[0].item() == pytest.approx(math.log(3))  # the head starts at zero
    for _ in range(60):
        loss, metrics = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["learned_2d", "rotary_2d"])
def test_patch_dropout_is_the_core_on_the_patches_that_are_left(pooling, positions):
    torch.manual_seed(0)
    config = ClassifierConfig(
        image_size=(8, 12), patch_size=4, pooling=pooling, positions=positions, patch_dropout=0.5, core=CORE
    )
    model = Classifier(config)
    seen = []
    model.core.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    pixels, prefix = torch.randn(2, 3, 8, 12), int(pooling == "cls")
    whole = model.eval().features(pixels)
    left_out = model.train().features(pixels)
    every, kept = seen
    assert kept.shape[1] == 3 + prefix  # of 6 patches
    assert torch.equal(kept[:, :prefix], every[:, :prefix])
    for image in range(2):
        places = [(every[image] == token).all(-1).nonzero().item() for token in kept[image]]
        assert len({*places}) == len(places)
        at_places = model.positions.in_layers(0, 6 + prefix)
        if at_places.rotations is not None:
            at_places = LayerPositions(rotations=tuple(table[places] for table in at_places.rotations))
        alone = model.core(every[image : image + 1, places], positions=at_places)
        expected = alone[:, 0] if prefix else alone.mean(1)
        torch.testing.assert_close(left_out[image : image + 1], expected)
    assert not torch.allclose(left_out, whole)


def test_patch_dropout_leaves_its_share_out_by_a_draw_for_each_image():
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(image_size=16, patch_size=4, patch_dropout=0.25, core=CORE)).train()
    with mock.patch.object(model, "choose_patches", wraps=model.choose_patches) as choose:
        tokens = model.tokens(model.stem(torch.randn(8, 3, 16, 16)))
    assert tokens.shape[1] == 1 + 12  # [CLS] and 3 of 4 patches
    chosen = model.choose_patches(*choose.call_args.args)
    assert len({frozenset(places) for places in chosen.tolist()}) > 1


@pytest.mark.parametrize("positions", ["learned_1d", "learned_2d_concat", "sincos_2d"])
@pytest.mark.parametrize("positions_at", ["every_layer", "shared"])
def test_positions_at_every_layer_are_added_in_front_of_every_block(positions, positions_at):
    torch.manual_seed(0)
    config = ClassifierConfig(
        image_size=8, patch_size=4, positions=positions, positions_at=positions_at, core=CORE
    )
    model, pixels = Classifier(config), torch.randn(2, 3, 8, 8)
    tables = [model.positions, *model.layer_positions]
    if positions_at == "shared":
        tables *= CORE.depth
    assert len(tables) == CORE.depth
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.stem(pixels)], dim=1)
    for block, table in zip(model.core.blocks, tables, strict=True):
        x = block(table.add(x))
    torch.testing.assert_close(model.features(pixels), model.core.norm(x)[:, 0])
    dropping = Classifier(config.model_copy(update={"patch_dropout": 0.5}))
    dropping.load_state_dict(model.state_dict())
    x, chosen = dropping.positions.add(x), torch.tensor([[0, 2, 3], [0, 1, 4]])
    places = torch.arange(2)[:, None], chosen
    left = x[places]
    for layer, (block, table) in enumerate(zip(dropping.core.blocks, tables, strict=True)):
        left = block(left + table.vectors()[chosen] if layer else left)
    torch.testing.assert_close(dropping.read(x, chosen), dropping.core.norm(left))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_registers_stand_between_the_class_token_and_the_patches_and_are_not_read(pooling):
    torch.manual_seed(0)
    config = ClassifierConfig(
        image_size=(8, 12), patch_size=4, pooling=pooling, registers=2, patch_dropout=0.5, core=CORE
    )
    model, pixels = randomise(Classifier(config)), torch.randn(2, 3, 8, 12)
    prefix = [model.cls_token] if pooling == "cls" else []
    x = torch.cat([part.expand(2, -1, -1) for part in (*prefix, model.registers)], dim=1)
    x = torch.cat([x, model.stem(pixels)], dim=1) + model.positions.table
    tokens = model.core(x)
    expected = tokens[:, 0] if pooling == "cls" else tokens[:, 2:].mean(1)
    torch.testing.assert_close(model.eval().features(pixels), expected)
    chosen = model.choose_patches(2, 3, pixels.device)
    assert torch.equal(chosen[:, : model.num_prefix], torch.arange(model.num_prefix).expand(2, -1))
    assert chosen[:, model.num_prefix :].min() >= model.num_prefix
    model.train().loss({"pixels": pixels, "labels": torch.tensor([0, 1])})[0].backward()
    assert model.registers.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "rotary_2d", "positions_at": "shared"}, "'rotary_2d' are not added to tokens"),
        (
            {"positions": "relative_1d", "patch_dropout": 0.5},
            "relative_1d positions do not work with patch_dropout",
        ),
    ],
)
def test_positions_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**settings)


def test_classifier_refuses_other_sizes():
    with pytest.raises(ValueError, match="patch_size 5 does not divide"):
        ClassifierConfig(image_size=28, patch_size=5)
    with pytest.raises(
        ValueError, match="'residual' needs a patch_size that is a power of two, 4 or more; got 2"
    ):
        ClassifierConfig(image_size=8, patch_size=2, stem="residual")
    with pytest.raises(
        ValueError, match="'conv' needs a patch_size that is a power of two, 2 or more; got 6"
    ):
        ClassifierConfig(image_size=12, patch_size=6, stem="conv")
    model = Classifier(ClassifierConfig(image_size=8, patch_size=4, num_classes=2, core=CORE))
    with pytest.raises(ValueError, match=r"expected pixels of shape \(3, 8, 8\), got \(1, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("attention", ["causal", "prefix", "dalle"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_decoding_equals_uncached_logits_at_every_step(attention, positions, together):
    model = small_generator(
        attention=attention, positions=positions, text_loss_weight=float(attention != "prefix"),
        convolution=3, core=CORE.model_copy(update={"depth": 3}),
    )  # fmt: skip
    captions, codes = captions_and_codes()
    with torch.inference_mode():
        expected = model(captions, codes)[1]
        cache = model.new_cache(2)
        logits = [model.prefill(captions, cache).unsqueeze(1)]
        logits += [model.step(part, cache) for part in codes[:, :11].split(together, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-5)
    assert cache.length == cache.capacity == 17


def test_dalles_layers_see_by_column_by_row_and_at_last_by_convolution():
    assert dalle_layers(64) == [*(["row", "column", "row", "row"] * 16)[:63], "convolution"]
    model = small_generator(attention="dalle", convolution=3, core=CORE.model_copy(update={"depth": 3}))
    captions, codes = captions_and_codes()
    x = torch.cat([model.embed_captions(captions), model.code_embedding(codes[:, :-1])], dim=1)
    expected, positions = x, model.positions.in_layers(0, x.shape[1])
    for block, kind in zip(model.core.blocks, ("row", "column", "convolution"), strict=True):
        mask = sparse_causal(kind, 6, (3, 4), kernel=3)[:-1, :-1]
        expected = block(expected, additive(mask, x.dtype), positions=positions)
    torch.testing.assert_close(model.run_core(x), model.core.norm(expected))
    with pytest.raises(ValueError, match="convolution must be at most the grid's 4 columns, got 11"):
        small_generator(attention="dalle")
    with pytest.raises(ValueError, match="convolution must be odd, a square around each code, got 4"):
        small_generator(attention="dalle", convolution=4)
    GeneratorConfig(attention="dalle", convolution=11)  # its grid is that of the data, and checked there


@pytest.mark.parametrize("attention", ["causal", "prefix", "dalle"])
def test_permuting_caption_tokens_changes_image_logits(attention):
    model = small_generator(attention=attention, text_loss_weight=0, convolution=3)
    captions, codes = captions_and_codes()
    permuted = captions.clone()
    permuted[1] = captions[1, [1, 0, 2, 4, 3]]
    before, after = model(captions, codes)[1], model(permuted, codes)[1]
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().min(1).values.max() > 1e-4


def test_image_logits_do_not_see_their_own_code_or_later_ones():
    model = small_generator()
    captions, codes = captions_and_codes()
    changed = codes.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 30
    before, after = model(captions, codes)[1], model(captions, changed)[1]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_losses_are_weighted_one_to_seven():
    model = small_generator(caption_dropout=0.0)
    captions, codes = captions_and_codes()
    loss, metrics = model.loss({"caption_ids": captions, "codes": codes})
    assert loss.item() == pytest.approx(
        (metrics["text_loss"] + 7 * metrics["image_loss"]).item() / 8, rel=1e-6
    )
    image_logits = model(captions, codes)[1]
    assert metrics["image_loss"].item() == pytest.approx(
        nn.functional.cross_entropy(image_logits.flatten(0, 1), codes.flatten()).item()
    )


def test_every_place_of_a_caption_has_a_padding_of_its_own():
    model = small_generator().eval()
    captions, codes = captions_and_codes(2)
    captions[0, -2:], captions[1] = 0, 1
    with torch.no_grad():
        before = model(captions, codes)[1]
        model.padding[0] += 1  # where both have a token
        assert torch.equal(model(captions, codes)[1], before)
        model.padding[-2] += 1
        after = model(captions, codes)[1]
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_a_held_out_loss_does_not_depend_on_the_batches():
    config = GeneratorConfig(
        vocab_size=9, text_length=4, codebook_size=7, grid=(2, 2), attention="causal", text_loss_weight=1,
        core=TransformerConfig(width=16, depth=1, num_heads=2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = GeneratorTransformer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    captions = torch.tensor([[3, 4, 5, 6], [7, 0, 0, 0], [8, 2, 0, 0]])
    batch = {"caption_ids": captions, "codes": torch.randint(7, (3, 4))}
    whole = generator_loss(model, [batch])
    with torch.no_grad():
        _, metrics = model.loss(batch)
    assert whole == pytest.approx({name: value.item() for name, value in metrics.items()})
    parts = [{name: value[part] for name, value in batch.items()} for part in ([0], [1, 2])]
    assert generator_loss(model, parts) == pytest.approx(whole)


def test_caption_loss_counts_tokens_and_the_padding_that_ends_them():
    captions = torch.tensor([[7, 8, 0, 0, 0], [1, 2, 3, 4, 5], [3, 0, 0, 0, 0]])
    logits = torch.randn(3, 5, 50)
    dropped = torch.tensor([[False], [False], [True]])
    each = -logits.log_softmax(-1).gather(-1, captions.unsqueeze(-1)).squeeze(-1)
    expected = (each[0, :3].sum() + each[1].sum()) / 8
    assert caption_loss(logits, captions, dropped).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_dropped_caption_is_the_empty_one():
    model = small_generator(caption_dropout=0.999).train()
    captions, codes = captions_and_codes(64)
    loss = model.loss({"caption_ids": captions, "codes": codes})[1]["image_loss"]
    model.eval()
    empty = model.loss({"caption_ids": torch.zeros_like(captions), "codes": codes})[1]["image_loss"]
    full = model.loss({"caption_ids": captions, "codes": codes})[1]["image_loss"]
    assert loss.item() == pytest.approx(empty.item(), rel=1e-5)
    assert full.item() != pytest.approx(empty.item(), rel=1e-4)


def loss_and_what_was_read(model: GeneratorTransformer, captions: torch.Tensor, codes: torch.Tensor):
    """The loss's metrics, the captions and codes that the model read, and its logits for them."""
    with mock.patch.object(model, "forward", wraps=model.forward) as forward:
        metrics = model.loss({"caption_ids": captions, "codes": codes})[1]
    read = forward.call_args.args
    return metrics, *read, *model(*read)


def test_each_caption_is_dropped_by_a_draw_of_its_own_and_then_not_predicted():
    model = small_generator(caption_dropout=0.5).train()
    captions, codes = captions_and_codes(64)
    metrics, read, _, text_logits, _ = loss_and_what_was_read(model, captions, codes)
    dropped = (read == 0).all(1, keepdim=True)
    assert torch.equal(read, captions.masked_fill(dropped, 0))
    assert 16 < dropped.sum() < 48  # 4 standard deviations
    torch.testing.assert_close(metrics["text_loss"], caption_loss(text_logits, captions, dropped))
    metrics, read, _, text_logits, _ = loss_and_what_was_read(model.eval(), captions, codes)
    assert torch.equal(read, captions)
    kept = torch.zeros(64, 1, dtype=torch.bool)
    torch.testing.assert_close(metrics["text_loss"], caption_loss(text_logits, captions, kept))


def test_code_noise_changes_what_training_reads_not_what_it_predicts():
    model = small_generator(code_noise=0.25, caption_dropout=0.0).train()
    captions, codes = captions_and_codes(64)
    metrics, _, read, _, logits = loss_and_what_was_read(model, captions, codes)
    changed = read != codes
    assert changed.float().mean().item() == pytest.approx(0.25 * 29 / 30, abs=0.06)  # 4 standard deviations
    assert len({tuple(row) for row in changed.tolist()}) > 32
    clean = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(metrics["image_loss"], clean)
    assert torch.equal(loss_and_what_was_read(model.eval(), captions, codes)[2], codes)


def test_labels_are_smoothed_in_training_alone():
    model = small_generator(label_smoothing=0.2, caption_dropout=0.0)
    captions, codes = captions_and_codes(8)
    with torch.no_grad():
        logs = model(captions, codes)[1].log_softmax(-1)
    sharp = -logs.gather(-1, codes.unsqueeze(-1)).mean()
    for training, expected in ((True, 0.8 * sharp - 0.2 * logs.mean()), (False, sharp)):
        metrics = model.train(training).loss({"caption_ids": captions, "codes": codes})[1]
        torch.testing.assert_close(metrics["image_loss"], expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda core: small_generator(core=core),
        lambda core: randomise(Classifier(ClassifierConfig(image_size=16, num_classes=4, core=core))),
    ],
)
def test_dropout_reaches_the_embedded_tokens(build):
    model, read = build(CORE.model_copy(update={"dropout": 0.5})), []
    model.core.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    captions, codes = captions_and_codes(32)
    pixels, labels = torch.randn(32, 3, 16, 16), torch.zeros(32, dtype=torch.long)
    for training, share in ((True, 0.5), (False, 0.0)):
        model.train(training).loss(
            {"caption_ids": captions, "codes": codes, "pixels": pixels, "labels": labels}
        )
        assert (read.pop() == 0).float().mean().item() == pytest.approx(share, abs=0.05)


def test_codes_that_look_alike_start_alike():
    model = small_generator()
    vectors = torch.randn(30, 8)
    vectors[7] = vectors[3] + 0.01
    model.start_from_codebook(vectors)
    for table in (model.code_embedding.weight, model.image_head.weight):
        distances = torch.cdist(table[3:4], table)[0]
        assert distances.argsort()[:2].tolist() == [3, 7]
        assert table.std().item() == pytest.approx(0.02, rel=0.3)


def test_prefix_captions_cannot_be_predicted():
    with pytest.raises(ValueError, match="text_loss_weight = 0"):
        GeneratorConfig(attention="prefix", text_loss_weight=1.0)


def test_classifier_and_generator_exchange_core_weights():
    classifier = Classifier(ClassifierConfig(image_size=8, patch_size=4, num_classes=3, core=CORE))
    generator = small_generator()
    generator.core.load_state_dict(classifier.core.state_dict())
    x = torch.randn(1, 4, 32)
    torch.testing.assert_close(generator.core(x), classifier.eval().core(x))


@pytest.mark.parametrize(
    "build",
    [
        small_generator,
        lambda: randomise(Classifier(ClassifierConfig(image_size=16, num_classes=4, core=CORE))),
    ],
)
def test_a_saved_model_comes_back_the_same(build, tmp_path):
    model = build()
    again = type(model).from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path):
    model = small_generator()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a generator, not a classifier"):
        Classifier.from_pretrained(tmp_path)
    weights = model.state_dict()
    weights["core.norm.weighty"] = weights.pop("core.norm.weight")
    weights["start"] = torch.zeros(1, 1, 7)
    write_weights(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"missing: core.norm.weight; unexpected: core.norm.weighty; start is \[1, 1, 7\]"
    ):
        GeneratorTransformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="damaged"):
        GeneratorTransformer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        Classifier.from_pretrained(tmp_path.parent)
