"""Fine-tuning: positions for another grid as in the sources, a new head, frozen parts, and a run from a
start."""

from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmvit.config import build_config
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.fine_tuning import fine_tuned, freeze, resize_table
from mmvit.models.resnet import ResNet, ResNetConfig
from mmvit.places import load_script
from mmvit.recipes.classifier import ClassifierRecipe

CORE = TransformerConfig(width=16, depth=2, num_heads=2)
CONFIG = ClassifierConfig(image_size=16, patch_size=4, num_classes=4, core=CORE)
GRIDS = [((4, 4), (7, 7)), ((4, 4), (3, 5)), ((3, 6), (6, 4))]


def trained(config: ClassifierConfig = CONFIG) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def table(prefix: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(prefix + grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("grid", "new"), GRIDS)
def test_the_official_way_is_scipys_zoom(grid, new):
    from scipy.ndimage import zoom

    positions = table(1, grid)
    square = positions[1:].view(*grid, 6).numpy()
    expected = zoom(square, (new[0] / grid[0], new[1] / grid[1], 1), order=1)
    found = resize_table(positions, 1, grid, new, "official")
    assert torch.equal(found[0], positions[0])
    np.testing.assert_allclose(found[1:].view(*new, 6), expected, atol=1e-6)


@pytest.mark.parametrize(("grid", "new"), GRIDS)
def test_timms_way_is_timms(timm, grid, new):
    positions = table(2, grid)
    expected = timm.layers.resample_abs_pos_embed(positions[None], list(new), list(grid), num_prefix_tokens=2)
    torch.testing.assert_close(resize_table(positions, 2, grid, new, "timm"), expected[0])


@pytest.mark.parametrize(("grid", "new"), [pair for pair in GRIDS if pair[0][0] == pair[0][1]])
def test_transformers_way_is_transformers(grid, new):
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = ViTConfig(hidden_size=6, image_size=4 * grid[0], patch_size=4, num_attention_heads=2)
    embeddings, positions = ViTEmbeddings(config), table(1, grid)
    with torch.no_grad():
        embeddings.position_embeddings.copy_(positions[None])
        patches = torch.zeros(1, 1 + new[0] * new[1], 6)
        expected = embeddings.interpolate_pos_encoding(patches, 4 * new[0], 4 * new[1])
    torch.testing.assert_close(resize_table(positions, 1, grid, new, "transformers"), expected[0])


@pytest.mark.parametrize("positions", ["learned_1d", "learned_2d", "sincos_2d", "rotary_2d", "none"])
def test_a_fine_tuned_classifier_is_the_trained_one_with_another_head(positions):
    source = trained(CONFIG.model_copy(update={"positions": positions, "representation_width": 8}))
    config = CONFIG.model_copy(update={"positions": positions, "num_classes": 7})
    model = fine_tuned(source, config).eval()
    assert torch.equal(model.head.weight, torch.zeros(7, 16))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        inner = source.core(
            source.positions.add(torch.cat([source.cls_token.expand(2, -1, -1), source.stem(pixels)], 1)),
            positions=source.positions.in_layers(0, 17),
        )
        torch.testing.assert_close(model.features(pixels), inner[:, 0])
    wide = fine_tuned(source, config.model_copy(update={"image_size": (24, 12)}))
    assert wide.features(torch.randn(2, 3, 24, 12)).shape == (2, 16)
    assert torch.equal(wide.core.norm.weight, source.core.norm.weight)


def test_positions_of_every_layer_are_resized_and_relative_ones_cannot_be():
    settings = {"positions": "learned_2d_concat", "positions_at": "every_layer"}
    source = trained(CONFIG.model_copy(update=settings))
    model = fine_tuned(source, CONFIG.model_copy(update={**settings, "image_size": (24, 12)}))
    (own,), (theirs,) = model.layer_positions, source.layer_positions
    assert (len(own.row_table), len(own.column_table)) == (6, 3)
    for end in (0, -1):  # the official way keeps the corners
        torch.testing.assert_close(own.row_table[end], theirs.row_table[end])
        torch.testing.assert_close(own.column_table[end], theirs.column_table[end])
    assert torch.equal(own.prefix_table, theirs.prefix_table)
    relative = CONFIG.model_copy(update={"positions": "relative_1d"})
    tables = [m.relative.tables for m in (trained(relative), fine_tuned(trained(relative), relative))]
    assert all(torch.equal(theirs, own) for theirs, own in zip(*tables, strict=True))
    with pytest.raises(UserError, match=r"positions of \(4, 4\) patches cannot be resized to \(6, 3\)"):
        fine_tuned(trained(relative), relative.model_copy(update={"image_size": (24, 12)}))


def test_weights_of_another_model_are_refused_by_what_differs():
    config = CONFIG.model_copy(update={"patch_size": 8, "core": CORE.model_copy(update={"width": 32})})
    with pytest.raises(UserError, match=r"patch_size = 4, the recipe 8; they have core\.width = 16"):
        fine_tuned(trained(), config)


def test_frozen_parts_do_not_train_and_unknown_ones_are_named():
    model = trained()
    freeze(model, ["stem", "core.blocks.0"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("stem.", "core.blocks.0."))}
    with pytest.raises(
        UserError, match=r"unknown part 'blocks' in start\.freeze; .* cls_token, .*core\.blocks\.1$"
    ):
        freeze(model, ["blocks"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(model, ["cls_token", "stem", "positions", "core", "head"])


def test_the_statistics_of_a_frozen_stem_stay():
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"stem": "residual", "stem_width": 8, "stem_blocks": (1, 1)})
    model, pixels = Classifier(config), torch.randn(4, 3, *config.height_width)
    model.train()(pixels)  # statistics that are not those of the beginning
    freeze(model, ["stem.layers", "head"])
    before = {name: tensor.clone() for name, tensor in model.stem.state_dict().items()}
    model.train()(pixels + 1)
    after = model.stem.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.fixture
def fine_tune(run_script, tiny_shards, tmp_path):
    trained().save_pretrained(tmp_path / "start")
    ResNet(ResNetConfig(num_classes=4, width=32, depths=(1,))).save_pretrained(tmp_path / "resnet")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        output = "{tmp_path / "run"}"
        [start]
        model = "{tmp_path / "start"}"
        freeze = ["stem"]
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = "{tiny_shards}/held-out-*.tar"
        [model]
        image_size = 24
        core.dropout = 0.1
        [train]
        steps = 4
        batch_size = 8
        num_workers = 0
        precision = "fp32"
        checkpoint_every = 2
        [optimizer]
        name = "sgd"
        lr = 0.01
        weight_decay = 0
        layer_decay = 0.7
        """
    )
    return lambda *arguments: run_script("pipelines/train_classifier.py", recipe, *arguments)


def test_a_run_begins_from_trained_weights_and_resumes(fine_tune, tmp_path, assert_same_state):
    mixing = "{rand_augment = 2, mixup = 0.2, cutmix = 1.0}"
    ran = fine_tune("--data.mixing", mixing)
    assert ran.returncode == 0, ran.stderr
    changes = "a new head of zeros, positions of 4x4 patches resized to 6x6"
    assert f"starting from {tmp_path / 'start'}: {changes}\n" in ran.stdout
    model = Classifier.from_pretrained(tmp_path / "run")
    assert model.config == build_config(
        ClassifierConfig,
        {**CONFIG.model_dump(), "image_size": 24, "core": {**CORE.model_dump(), "dropout": 0.1}},
        source="x",
    )
    start = trained().state_dict()
    assert torch.equal(model.stem.proj.weight, start["stem.proj.weight"])
    assert not torch.equal(model.core.norm.weight, start["core.norm.weight"])
    assert model.head.weight.any()
    last = tmp_path / "run/checkpoints/step-00000004"
    weights = load_file(last / "model.safetensors")
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    ran = fine_tune("--data.mixing", mixing, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "resuming at step 2 of 4" in ran.stdout
    assert_same_state(load_file(last / "model.safetensors"), weights)
    kept = (tmp_path / "run/config.toml").read_text()
    ran = fine_tune("--data.mixing", mixing, "--resume", "--optimizer.lr", 0.5)
    assert ran.returncode == 0, ran.stderr
    assert "nothing left to train; raise train.steps" in ran.stdout
    assert (tmp_path / "run/config.toml").read_text() == kept
    longer = ("--data.mixing", mixing, "--resume", "--train.steps", 6)
    ran = fine_tune(*longer, "--start.freeze", '["core.norm"]')
    assert ran.returncode == 2
    assert "set start.freeze back to what config.toml says" in ran.stderr
    ran = fine_tune(*longer, "--optimizer.layer_decay", 1.0)  # other rates for the same parameters
    assert ran.returncode == 0, ran.stderr


def test_positions_are_resized_in_the_way_of_the_recipe(tmp_path):
    source = trained()
    start = {"model": str(source.save_pretrained(tmp_path)), "resize": "timm"}
    model = {**CONFIG.model_dump(), "image_size": 24}
    values = {"output": "run", "data": {"train": "a", "held_out": "b"}, "model": model, "start": start}
    recipe = build_config(ClassifierRecipe, values, "recipe")
    begun = load_script("pipelines/train_classifier.py").starting_model(
        mock.Mock(recipe=recipe, continues=False)
    )
    tables = {mode: fine_tuned(source, recipe.model, mode).positions.table for mode in ("timm", "official")}
    assert torch.equal(begun.positions.table, tables["timm"])
    assert not torch.equal(begun.positions.table, tables["official"])


def test_the_layer_in_front_of_the_trained_head_is_left_behind(fine_tune, tmp_path):
    config = CONFIG.model_copy(update={"representation_width": 12})
    trained(config).save_pretrained(tmp_path / "start")
    ran = fine_tune()
    assert ran.returncode == 0, ran.stderr
    assert Classifier.from_pretrained(tmp_path / "run").config.representation_width is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start.model", "/no/folder"], "no model at /no/folder"),
        (["--start.model", "generator/emojis"], "did you mean generators/emoji?"),
        (["--start.model", "{tmp_path}/resnet"], "holds a resnet, expected a classifier"),
        (["--model.image_size", 25], "patch_size 4 does not divide image_size 25"),
        (["--model.core.width", 32], "they have core.width = 16, the recipe 32; set the same in the recipe"),
        (["--start.freeze", '["heads"]'], "unknown part 'heads' in start.freeze"),
        (["--start.resize", "nearest"], "start.resize"),
    ],
)
def test_starts_that_do_not_fit_are_explained(fine_tune, arguments, message, tmp_path):
    ran = fine_tune(*(str(argument).format(tmp_path=tmp_path) for argument in arguments))
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
