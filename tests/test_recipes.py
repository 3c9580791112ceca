"""Recipes: every source of a setting wins over the one before, and mistakes are explained."""

import contextlib
import shutil
from pathlib import Path

import pytest

import mmvit
from mmvit.config import split_settings
from mmvit.data.captions import TextTokenizer
from mmvit.data.writing import Outcome, write_dataset_card
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.presets import preset
from mmvit.models.vq import VQConfig
from mmvit.recipes.resolve import resolve
from mmvit.sampling.generator import Generator

DATA = '[data]\ntrain = "train-*.tar"\nheld_out = "held-out-*.tar"\n'


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with this `[model]`, and resolves it without data under these settings."""

    def resolved(model: str = "", settings: dict | None = None, task: str = "classifier", more: str = ""):
        path = tmp_path / "recipe.toml"
        text = f'task = "{task}"\noutput = "{tmp_path}/run"\n{more}\n{DATA}[model]\n{model}\n'
        path.write_text(text)
        return resolve(path, settings, read_data=False).recipe

    return resolved


def test_a_preset_is_what_the_recipe_starts_from(recipe):
    shape = preset("vit-s16").core.model_copy(update={"depth": 3})
    assert recipe('preset = "vit-s16"').model == preset("vit-s16")
    changed = recipe('preset = "vit-s16"\nimage_size = 32\ncore = {depth = 3}').model
    assert changed == preset("vit-s16").model_copy(update={"image_size": 32, "core": shape})
    assert recipe('preset = "bit-r101"').model == preset("bit-r101")


def test_the_command_line_wins_over_the_recipe(recipe):
    changed = recipe('preset = "vit-s16"', {"model.core.depth": 3, "train.steps": 7, "optimizer.lr": 0.5})
    assert (changed.model.core.depth, changed.train.steps, changed.optimizer.lr) == (3, 7, 0.5)


PLAIN = """
image_size = 32
patch_size = 4
label_smoothing = 0.1
stem = "residual"
stem_blocks = [1, 1]
core = {width = 96, depth = 2, num_heads = 3, mlp = "swiglu", dropout = 0.2}
"""


def test_a_preset_of_the_command_line_replaces_the_architecture_alone(recipe):
    """Image size, label smoothing and dropout are of the data and of training, and stay the recipe's."""
    plain = recipe(PLAIN, {"model.preset": "vit-s16"}).model
    core = preset("vit-s16").core.model_copy(update={"dropout": 0.2})
    kept = {"image_size": 32, "label_smoothing": 0.1, "core": core}
    assert plain == preset("vit-s16").model_copy(update=kept)
    deeper = recipe(PLAIN, {"model.preset": "vit-s16", "model.core.depth": 5}).model
    assert deeper.core.depth == 5
    other = recipe(PLAIN, {"model.preset": "bit-r101"}).model
    assert other == preset("bit-r101").model_copy(update={"image_size": 32, "label_smoothing": 0.1})


def test_another_kind_of_model_keeps_what_both_have(recipe):
    resnet = recipe(PLAIN, {"model.kind": "resnet", "model.depths": [1, 1, 1]}).model
    assert (resnet.kind, resnet.image_size, resnet.label_smoothing) == ("resnet", 32, 0.1)
    assert recipe("", task="image-tokenizer").model == VQConfig()


def test_a_presets_vocabulary_and_grid_are_left_to_the_data(recipe, encoded):
    without_data = recipe('preset = "dalle-12b"', task="generator").model
    assert (without_data.vocab_size, without_data.grid) == (16384, (32, 32))
    settings = {"model.preset": "dalle-12b", "model.convolution": 1}
    model = resolve(encoded / "config.toml", settings).recipe.model
    assert (model.vocab_size, model.codebook_size, model.grid) == (4096, 16, (2, 2))
    assert (model.attention, model.text_length) == ("dalle", 256)


def test_a_run_of_fewer_steps_shrinks_what_is_counted_in_steps(recipe, tmp_path):
    more = "[train]\nsteps = 1000\nevaluate_every = 200\n[optimizer]\nwarmup_steps = 50\n"
    settings = {"train.steps": 100, "train.checkpoint_every": 30}
    short = recipe("", settings, more=more)
    assert (short.train.evaluate_every, short.train.checkpoint_every) == (20, 30)
    (note,) = resolve(tmp_path / "recipe.toml", settings, read_data=False).notes
    expected = "so train.evaluate_every is 20, optimizer.warmup_steps is 5"
    assert note == f"100 steps instead of the recipe's 1000, {expected}"
    assert short.optimizer.warmup_steps == 5
    assert recipe("", {"train.steps": 2000}, more=more).train.evaluate_every == 200
    tokenizer = recipe(
        'kind = "dvae"\ntemperature_steps = 500', {"train.steps": 100}, "image-tokenizer", more
    )
    assert (tokenizer.model.temperature_steps, tokenizer.model.kl_warmup) == (50, 5000)


def test_an_image_size_is_one_number_or_two(recipe):
    assert recipe("", {"data.image_size": 100}, "image-tokenizer").data.image_size == (100, 100)
    assert recipe("", {"data.image_size": [64, 96]}, "image-tokenizer").data.image_size == (64, 96)


def test_the_data_say_classes_vocabulary_and_grid(encoded, tiny_shards):
    generator = resolve(encoded / "config.toml").recipe.model
    assert (generator.vocab_size, generator.codebook_size, generator.grid) == (4096, 16, (2, 2))
    with pytest.raises(UserError, match=r"model\.grid is \(4, 4\), but .*dataset\.json has \(2, 2\); leave"):
        resolve(encoded / "config.toml", {"model.grid": [4, 4]})


def test_classes_that_nobody_names_are_asked_for(tmp_path, tiny_shards):
    data = {"data.train": f"{tiny_shards}/train-*.tar", "data.held_out": f"{tiny_shards}/held-out-*.tar"}
    with pytest.raises(UserError, match=r"dataset\.json does not say num_classes: set model\.num_classes"):
        resolve("fashion_mnist", data)
    assert resolve("fashion_mnist", {**data, "model.num_classes": 4}).recipe.model.num_classes == 4


def test_another_number_of_classes_than_a_data_set_names_is_refused(tmp_path):
    for name in ("silent", "named"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-0.tar").write_bytes(b"")
    write_dataset_card(tmp_path / "named", Outcome(), classes=["x", "y"])
    patterns = [f"{tmp_path}/silent/train-*.tar", f"{tmp_path}/named/train-*.tar"]

    def num_classes(shards: list[str], number: int) -> int:
        settings = {"data.train": shards, "data.held_out": shards, "model.num_classes": number}
        return resolve("fashion_mnist", settings).recipe.model.num_classes

    assert num_classes(patterns[:1], 3) == 3
    assert num_classes(patterns, 2) == 2
    with pytest.raises(UserError, match=r"model\.num_classes is 3, but .*named.dataset\.json has 2; leave"):
        num_classes(patterns, 3)
    write_dataset_card(tmp_path / "silent", Outcome(), classes=["y", "x"])
    with pytest.raises(UserError, match=r"different classes in dataset\.json: y, x; x, y\."):
        num_classes(patterns, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.step": 3}, r"^the command line: unknown key train\.step: did you mean train\.steps\?"),
        ({"train.steps": "many"}, r"train\.steps = \"many\""),
        ({"train.batch_size": 9, "train.accumulation": 2}, r"^the command line: \[train\]: .*accumulation 2"),
        ({"optimizer.schedule": "cosin"}, r"optimizer\.schedule"),
        ({"model.kind": "resnett"}, r"unknown model\.kind 'resnett': did you mean resnet\?"),
        ({"model.preset": "vit-s17"}, r"no preset 'vit-s17': did you mean vit-s16\?"),
        (
            {"model.preset": "generator-b"},
            r'preset generator-b does not fit task "classifier"; choose from vit',
        ),
        ({f"train.{name}": 1 for name in "bcde"}, r"train\.b: valid keys: steps, .*; and 1 more$"),
    ],
)
def test_mistakes_in_settings_are_explained(recipe, settings, message):
    with pytest.raises(UserError, match=message):
        recipe("", settings)


def test_a_recipe_says_its_task(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('output = "run"\n')
    with pytest.raises(UserError, match=r'put task = "\.\.\." on its first line, with one of classifier, '):
        resolve(path)
    path.write_text('task = "clasifier"\n')
    with pytest.raises(UserError, match=r"unknown task 'clasifier': did you mean classifier\?"):
        resolve(path)
    path.write_text('task = ["classifier"]\n')
    with pytest.raises(UserError, match=r"unknown task \['classifier'\]: did you mean classifier\?"):
        resolve(path)
    with pytest.raises(UserError, match=r"no recipe emoji_dmeo: did you mean emoji_demo\?"):
        resolve("emoji_dmeo")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected one recipe, got none"),
        ("one two", "expected one recipe, got one and two"),
        ("emoji_demo --resum", "unknown option --resum: did you mean --resume?"),
        ("emoji_demo --train.steps", "--train.steps needs a value"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(mmvit_command, line, message):
    refused = mmvit_command("train", *line.split())
    assert refused.returncode == 2
    assert message in refused.stderr


def test_dry_run_prints_recipe_and_cost_and_trains_nothing(mmvit_command, encoded, tmp_path):
    shown = mmvit_command("train", encoded / "config.toml", "--output", tmp_path / "run", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert 'task = "generator"' in shown.stdout
    assert "grid = [2, 2]" in shown.stdout
    for word in (" parameters", " examples", " GFLOP an example", " GB of activations"):
        assert word in shown.stdout
    assert not (tmp_path / "run").exists()


def test_every_setting_and_recipe_is_listed(mmvit_command):
    assert "  optimizer.warmup_steps = 100" in mmvit_command("train", "emoji_demo", "--settings").stdout
    listed = mmvit_command("train", "--list").stdout
    assert "  emoji_demo " in listed
    assert "image-tokenizer\n  image_tokenizer_emoji " in listed


def test_a_recipe_is_copied_for_editing(mmvit_command, tmp_path):
    mine = tmp_path / "new" / "mine.toml"
    assert mmvit_command("copy", "emoji_demo", mine).returncode == 0
    assert resolve(mine, read_data=False).recipe == resolve("emoji_demo", read_data=False).recipe
    again = mmvit_command("copy", "emoji_demo", mine)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert Path(mine).is_file()


def test_a_mistyped_tokenizer_is_not_replaced_by_the_runs_own(mmvit_command, generator_run):
    refused = mmvit_command("train", generator_run, "--resume", "--data.text_tokenizer", "typo")
    assert refused.returncode == 2
    assert "no text tokenizer at typo" in refused.stderr


def test_a_run_folder_resumes_alone_though_its_start_has_moved(
    mmvit_command, generator_run, encoded, tmp_path
):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(generator_run / "last", start)
    recipe = tmp_path / "recipe.toml"
    text = (encoded / "config.toml").read_text().replace("[data]", f'[start]\nmodel = "{start}"\n[data]')
    lines = [line for line in text.splitlines() if "_tokenizer = " not in line]  # the start's are used
    recipe.write_text("\n".join(lines))
    settings = ("--train.steps=2", "--train.batch_size=8", "--train.num_workers=0", "--output", run)
    first = mmvit_command("train", recipe, *settings)
    assert first.returncode == 0, first.stderr
    start.rename(tmp_path / "moved")
    recipe.unlink()
    more = mmvit_command("train", run, "--resume", "--train.steps", 3)
    assert more.returncode == 0, more.stderr
    assert "resuming at step 2 of 3" in more.stdout
    said = f"data.text_tokenizer: {start}/text_tokenizer is not on this disk, so the run's own copy is used"
    assert said in " ".join(more.stdout.split())
    refused = mmvit_command("train", run)
    assert refused.returncode == 2
    assert "is a run folder: add --resume to continue it" in refused.stderr


def test_a_start_brings_its_architecture_and_tokenizers(generator_run, encoded, tmp_path):
    """None of the recipe's defaults (depth, vocabulary, tokenizers) stands in the way of going on."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'task = "generator"\noutput = "run"\n[data]\ntrain = "{encoded}/codes/train-*.tar"\n'
        f'held_out = "{encoded}/codes/held-out-*.tar"\n[model]\ncore = {{depth = 5}}\ncaption_dropout = 0.3\n'
    )
    model = resolve(recipe, {"start.model": str(generator_run)}).recipe
    assert (model.model.core.width, model.model.core.depth) == (32, 1)
    assert model.model.caption_dropout == 0.3
    assert model.data.image_tokenizer == str(generator_run / "best" / "image_tokenizer")
    assert model.data.text_tokenizer == str(generator_run / "best" / "text_tokenizer")


def test_training_on_held_out_shards_is_warned_of(encoded):
    resolved = resolve(encoded / "config.toml", {"data.held_out": [f"{encoded}/codes/*.tar"]})
    assert "warning: data.held_out has 5 of the shards in data.train" in resolved.notes[-1]
    assert not resolve(encoded / "config.toml").notes


def test_the_start_of_a_run_says_what_does_not_fit(mmvit_command, encoded, tmp_path):
    settings = (
        "--train.steps=2",
        "--train.batch_size=8",
        "--train.num_workers=0",
        "--output",
        tmp_path / "run",
    )
    ran = mmvit_command("train", encoded / "config.toml", "--model.text_length=2", *settings)
    assert ran.returncode == 0, ran.stderr
    assert "100.0% of the first 48 captions are longer than model.text_length (2 tokens)" in ran.stdout
    assert "epoch 0.33" in ran.stdout  # 16 of 48 samples


def test_python_trains_and_evaluates_as_the_command_does(encoded, tiny_shards, tmp_path):
    settings = {"train.steps": 2, "train.batch_size": 8, "train.num_workers": 0, "output": tmp_path / "run"}
    run = mmvit.train(encoded / "config.toml", settings)
    assert run.path == tmp_path / "run"
    assert run.read_metrics()[-1]["step"] == 2
    figures = mmvit.evaluate(run.path, tiny_shards, "held-out")
    assert 0 <= figures["retrieval@1"] <= 1
    with pytest.raises(UserError, match="is not empty"):
        mmvit.train(encoded / "config.toml", settings)


def test_a_copied_run_folder_is_resumed_where_it_is(mmvit_command, encoded, tmp_path):
    settings = ("--train.steps=2", "--train.batch_size=8", "--train.num_workers=0")
    first = mmvit_command("train", encoded / "config.toml", *settings, "--output", tmp_path / "run")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    more = mmvit_command("train", tmp_path / "copy", "--resume", "--train.steps", 3)
    assert more.returncode == 0, more.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert '"step": 3' in (tmp_path / "copy" / "metrics.jsonl").read_text()


def test_a_section_of_the_command_line_is_resolved_as_its_keys_are(recipe, generator_run, encoded):
    more = "[train]\nsteps = 400\nevaluate_every = 100\nbatch_size = 8\n"
    short = recipe("", {"train": {"steps": 40}}, more=more).train
    assert (short.steps, short.evaluate_every, short.batch_size) == (40, 10, 8)
    assert recipe("", {"model": {"preset": "vit-b16"}}).model == preset("vit-b16")
    start = resolve(encoded / "config.toml", {"start": {"model": str(generator_run)}}).recipe
    assert start == resolve(encoded / "config.toml", {"start.model": str(generator_run)}).recipe
    words = [
        "--model.core.width",
        "32",
        "--model.core",
        "{width = 64, depth = 1}",
        "--model.core.width",
        "16",
    ]
    assert split_settings(words)[1] == {"model.core.depth": 1, "model.core.width": 16}


def test_how_to_make_the_data_is_said_where_they_are_missing_alone(encoded, tmp_path):
    with (
        contextlib.chdir(tmp_path),
        pytest.raises(UserError, match=r"data are made by: mmvit prepare fashion-"),
    ):
        resolve("fashion_mnist")
    with pytest.raises(UserError, match=r"^no shards match mine;(?!.*are made by)"):
        resolve("fashion_mnist", {"data.train": "mine"})
    codes = {"data.train": f"{encoded}/codes/train-*.tar", "data.held_out": f"{encoded}/codes/held-out-*.tar"}
    with pytest.raises(UserError, match=r"vocab_size is 7, but .*; leave it out$"):
        resolve("emoji_demo", {**codes, "model.vocab_size": 7})


@pytest.mark.parametrize("steps", [4e1, "40", 40])
def test_however_steps_are_written_schedules_shrink(recipe, steps):
    more = "[train]\nsteps = 400\nevaluate_every = 100\n"
    assert recipe("", {"train.steps": steps}, more=more).train.evaluate_every == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 5}, "the command line: train is a section with settings of its own, got 5"),
        ({"model.preset": "vit-b16", "start.model": "x"}, "each name a model: give one of them"),
        ({"model.preset": "bit-r50", "model.kind": "vit"}, "remove --model.kind"),
        ({"model.image_size": "big"}, r'model\.image_size = "big": expected a whole number$'),
        ({"output": 2024}, "output = 2024: expected a path"),
    ],
)
def test_contradictions_are_refused(recipe, settings, message):
    with pytest.raises(UserError, match=message):
        recipe("", settings)


def test_a_value_for_a_section_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="train is a section with settings of its own"):
        recipe("", more="[[train]]\nsteps = 4\n")


def test_a_start_of_another_kind_is_refused(tiny_shards, tmp_path):
    folder = tmp_path / "start"
    Classifier(
        ClassifierConfig(image_size=16, patch_size=8, core={"width": 16, "num_heads": 2})
    ).save_pretrained(folder)
    data = {"data.train": f"{tiny_shards}/train-*.tar", "data.held_out": f"{tiny_shards}/held-out-*.tar"}
    with pytest.raises(UserError, match=r"is of kind vit, not resnet: remove model\.kind"):
        resolve("fashion_mnist", {**data, "start.model": str(folder), "model.kind": "resnet"})


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--lr", "did you mean --optimizer.lr?"),
        ("--batch-size", "did you mean --train.batch_size?"),
        ("--steps", "did you mean --train.steps?"),
        ("--epochs", "set --train.steps"),
    ],
)
def test_an_option_without_its_section_is_found(mmvit_command, option, advice):
    refused = mmvit_command("train", "emoji_demo", option, "4")
    assert refused.returncode == 2
    assert advice in refused.stderr


def test_dry_run_refuses_what_the_run_would(mmvit_command, encoded, tmp_path):
    refused = mmvit_command("train", encoded / "config.toml", "--model.grid", "[4, 4]", "--dry-run")
    assert refused.returncode == 2
    assert "dataset.json has (2, 2); leave it out" in refused.stderr


def test_a_start_that_training_would_refuse_is_refused_before(generator_run, encoded, tmp_path):
    """With the data and without, by resolving the recipe alone."""
    start, recipe = tmp_path / "start", encoded / "config.toml"
    source = Generator.from_pretrained(generator_run)
    values = {**source.transformer.config.model_dump(), "order": "any", "attention": "full"}
    parts = GeneratorTransformer(GeneratorConfig(**values)), source.text_tokenizer, source.image_tokenizer
    Generator(*parts).save_pretrained(start)
    for read_data in (True, False):
        for settings, message in (
            (
                {"model.order": "raster", "model.attention": "prefix"},
                "they have order = 'any', the recipe 'r",
            ),
            ({"model.core.depth": 3}, "they have core.depth = 1, the recipe 3"),
        ):
            with pytest.raises(UserError, match=message):
                resolve(recipe, {"start.model": str(start), **settings}, read_data=read_data)
        any_order = {"start.model": str(generator_run), "model.order": "any", "model.attention": "full"}
        assert resolve(recipe, any_order, read_data=read_data).recipe.model.order == "any"
    other = TextTokenizer.from_file(start / "text_tokenizer").tokenizer
    other.add_tokens(["squ"])
    (tmp_path / "text").mkdir()
    other.save(str(tmp_path / "text" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"was trained with another text_tokenizer: set data.text_tokenizer"):
        resolve(recipe, {"start.model": str(start), "data.text_tokenizer": str(tmp_path / "text")})
