"""The generator trained on tiny data by its script, and what it says to mistakes in a recipe."""

import json
import shutil
from unittest import mock

import pytest
import torch
from generator_scripts import SMALL, refused
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_generator

from mmvit.config import build_config
from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.vq import VQConfig, VQModel
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.places import load_script
from mmvit.recipes.generator import GeneratorRecipe
from mmvit.sampling.generator import Generator
from mmvit.sampling.grids import sheet_size


def test_a_run_leaves_models_curves_and_samples(generator_run):
    for name in ("config.toml", "metrics.jsonl", "curves.png", "previews/step-000004.png"):
        assert (generator_run / name).is_file(), name
    for part in ("model.safetensors", "text_tokenizer/tokenizer.json", "image_tokenizer/model.safetensors"):
        assert (generator_run / "best" / part).is_file(), part
        assert (generator_run / "last" / part).is_file(), part
    assert Image.open(generator_run / "previews/step-000004.png").size == sheet_size(1, 4)
    held_out = [
        line
        for line in map(json.loads, (generator_run / "metrics.jsonl").open())
        if line["kind"] == "held_out"
    ]
    assert [line["step"] for line in held_out] == [2, 4]
    assert held_out[1]["image_loss"] < held_out[0]["image_loss"]


def test_codes_start_from_the_codebook_unless_the_recipe_says_no():
    small = {"codebook_size": 16, "grid": (2, 2), "core": {"width": 16, "depth": 1, "num_heads": 2}}
    values = {"output": "run", "data": {"train": "a", "held_out": "b"}, "model": small}
    start = load_script("pipelines/train_caption_to_image.py").starting_model
    data = mock.Mock(image_tokenizer=VQModel(VQConfig(codebook_size=16)))
    for section, starts in (({}, True), ({"codebook": False}, False)):
        recipe = build_config(GeneratorRecipe, {**values, "start": section}, "recipe")
        model = start(mock.Mock(recipe=recipe, continues=False), data)
        assert bool(model.image_head.weight.any()) == starts  # a head of zeros otherwise


def test_a_start_with_another_image_tokenizer_is_refused(tokenizer, tmp_path):
    generator = tiny_generator(tokenizer)
    values = {"output": "run", "data": {"train": "a", "held_out": "b"}, "start": {"model": str(tmp_path)}}
    values["model"] = generator.transformer.config.model_dump()
    generator.save_pretrained(tmp_path)
    session = mock.Mock(recipe=build_config(GeneratorRecipe, values, "recipe"), continues=False)
    start = load_script("pipelines/train_caption_to_image.py").starting_model
    data = mock.Mock(text_tokenizer=tokenizer, image_tokenizer=generator.image_tokenizer)
    start(session, data)
    data.image_tokenizer = VQModel(VQConfig(codebook_size=16))
    with pytest.raises(UserError, match="was trained with another image_tokenizer: set data"):
        start(session, data)


def test_codes_of_another_tokenizer_are_refused(encoded, run_script, tmp_path):
    VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16))).save_pretrained(
        tmp_path / "other"
    )
    ran = run_script(
        "pipelines/train_caption_to_image.py", encoded / "config.toml", *SMALL,
        "--data.image_tokenizer", tmp_path / "other", "--output", tmp_path / "run",
    )  # fmt: skip
    refused(ran, "fingerprint", "mmvit encode")


def test_a_run_leaves_captions_out_before_and_after_evaluations(encoded, run_script, tmp_path):
    shares, forward = [], GeneratorTransformer.forward

    def watched(model, captions, codes):
        if model.training:
            shares.append((captions == 0).all(1).double().mean().item())
        return forward(model, captions, codes)

    settings = ("--train.steps", 4, "--train.evaluate_every", 1, "--output", tmp_path / "run")
    for dropout, least, most in ((0.9, 0.5, 1), (0, 0, 0)):
        shares.clear()
        more = ("--model.caption_dropout", dropout, "--preview.guidance_scale", 1)
        with mock.patch.object(GeneratorTransformer, "forward", watched):
            ran = run_script(
                "pipelines/train_caption_to_image.py", encoded / "config.toml", *SMALL, *settings, *more
            )
        assert ran.returncode == 0, ran.stderr
        assert len(shares) == 4
        assert least <= min(shares) <= max(shares) <= most
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("attention", ["full", "prefix"])
def test_a_generator_of_any_order_is_trained_drawn_edited_and_measured(
    encoded, tiny_shards, run_script, tmp_path, attention
):
    settings = ("--model.order", "any", "--model.attention", attention, "--preview.num_steps", 3)
    run = tmp_path / "run"
    trained = run_script(
        "pipelines/train_caption_to_image.py", encoded / "config.toml", *SMALL, *settings, "--output", run
    )
    assert trained.returncode == 0, trained.stderr
    generator = Generator.from_pretrained(run)
    assert generator.transformer.config.order == "any"
    assert generator.defaults.num_steps == 3
    drawn, captions = tmp_path / "drawn.png", tmp_path / "captions.txt"
    captions.write_text("red square\nblue square\n")
    with mock.patch.object(
        GeneratorTransformer, "read_codes", autospec=True, side_effect=GeneratorTransformer.read_codes
    ) as forwards:
        ran = run_script(
            "pipelines/sample_images.py", "red square", "--model", run, "--num-steps", 2, "--out", drawn
        )
    assert ran.returncode == 0, ran.stderr
    assert forwards.call_count == 2
    for arguments in (
        ("edit_images.py", drawn, "blue square", "--model", run, "--keep", "left", "--candidates", 2,
         "--num-steps", 2, "--out", tmp_path / "edited.png"),
        ("evaluate.py", run, tiny_shards, "--split", "held-out", "--captioned", 2, "--num-steps", 2,
         "--out", tmp_path / "sheet.png"),
        ("caption_images.py", drawn, "--captions-file", captions, "--model", run),
    ):  # fmt: skip
        ran = run_script(f"pipelines/{arguments[0]}", *arguments[1:])
        assert ran.returncode == 0, ran.stderr
    assert json.loads((run / "evaluation-held-out.json").read_text())["num_steps"] == 2
    refused(run_script("pipelines/sample_images.py", "a", "--num-steps", 3), "raster order: leave it out")


def test_a_changed_architecture_cannot_resume(generator_run, encoded, run_script):
    ran = run_script(
        "pipelines/train_caption_to_image.py",
        encoded / "config.toml",
        *SMALL,
        "--model.core.width",
        64,
        "--resume",
    )
    refused(ran, "model.core.width")


def test_a_trained_generator_is_trained_on(generator_run, encoded, run_script, tmp_path):
    def train_on(*overrides):
        script, out = "pipelines/train_caption_to_image.py", tmp_path / "more"
        return run_script(script, recipe, "--start.model", start, "--output", out, *overrides)

    recipe, start = tmp_path / "more.toml", tmp_path / "start"
    text = (encoded / "config.toml").read_text()
    recipe.write_text(text[: text.index("[data]")] + "[train]\nsteps = 1\nbatch_size = 8\nnum_workers = 0\n"
        "[optimizer]\nlr = 1e-9\n" + text[text.index("[data]") :])  # fmt: skip
    Generator.from_pretrained(generator_run).save_pretrained(start, torch.bfloat16)  # as one that is shipped
    refused(
        train_on("--model.core.depth", 3), "the trained weights are of another model: they have core.depth = "
    )
    refused(train_on("--model.positions", "none"), "they have positions = 'learned_2d', the recipe 'none'")
    refused(train_on("--start.core", generator_run), "start.model includes a core")
    other = TextTokenizer.from_file(start / "text_tokenizer").tokenizer
    other.add_tokens(["squ"])
    (tmp_path / "text").mkdir()
    other.save(str(tmp_path / "text/tokenizer.json"))
    refused(train_on("--data.text_tokenizer", tmp_path / "text"), "tokenizer")
    ran = train_on(
        "--model.caption_dropout", 0.3, "--start.translate_from", "en", "--data.languages", '["en", "de"]'
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 tokens that no caption in en uses start as mixtures" in ran.stdout
    found, begun = (
        load_file(tmp_path / "more/last/model.safetensors"),
        load_file(start / "model.safetensors"),
    )
    texts = TextTokenizer.from_file(start / "text_tokenizer")
    (quadrat,), square = texts.tokenize("quadrat"), texts.tokenize("square")
    words = begun["text_embedding.weight"] = begun["text_embedding.weight"].float()
    assert torch.cosine_similarity(words[quadrat], words[square].mean(0), dim=0) < 0.5
    words[quadrat] = found["text_embedding.weight"][quadrat]
    assert torch.cosine_similarity(words[quadrat], words[square].mean(0), dim=0) > 0.9
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, begun[name].float(), atol=1e-6, rtol=0)
    assert GeneratorTransformer.from_pretrained(tmp_path / "more").config.caption_dropout == 0.3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.stepz", "3"], ["unknown key train.stepz", "did you mean train.steps"]),
        (["--preview.captions", "one"], ["preview.captions", 'expected a list, such as ["one", "two"]']),
        (["--model.vocab_size", "77"], ["model.vocab_size is 77", "4096"]),
        (["--data.train", "nowhere/train-*.tar"], ["nowhere"]),
        (["--model.text_loss_weight", 1], ["text_loss_weight = 0", "or attention = 'causal'"]),
        (["--model.grid", "[4,4]"], ["model.grid is (4, 4), but", "dataset.json has (2, 2); leave it out"]),
        (["--model.attention", "dalle"], ["convolution must be at most", "the grid's 2 columns, got 11"]),
        (["--start.translate_from", "en"], ["start.translate_from needs a model", "set start.model"]),
        (["--data.text_tokenizer", "nowhere"], ["no text tokenizer at nowhere"]),
        (
            ["--model.preset", "vit-b16"],
            ['preset vit-b16 does not fit task "generator"', "generator-tiny"],
        ),
        (
            ["--preview.guidance_scale", "-1"],
            ["preview.guidance_scale = -1: expected 0"],
        ),
    ],
)
def test_mistakes_in_a_config_are_named(encoded, run_script, tmp_path, overrides, words):
    ran = run_script(
        "pipelines/train_caption_to_image.py",
        encoded / "config.toml",
        *SMALL,
        "--output",
        tmp_path / "run",
        *overrides,
    )
    refused(ran, *words)


def test_a_generator_trains_on_a_foreign_tokenizer_of_another_grid(
    encoded, tiny_shards, run_script, tmp_path
):
    config = VQGANConfig(
        codebook_size=16, code_width=4, latent_width=4, stem_width=8, widths=(8, 8, 8, 8), num_groups=4,
        encoder_attention=(), decoder_attention=(), blocks_per_level=1,
    )  # fmt: skip
    VQGAN(config).save_pretrained(tmp_path / "theirs")
    size = ("--size", "16x24")
    arguments = (tiny_shards, tmp_path / "codes", "--tokenizer", tmp_path / "theirs", *size)
    ran = run_script("pipelines/encode_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    ran = run_script(
        "pipelines/train_caption_to_image.py", encoded / "config.toml", *SMALL,
        "--data.train", f"{tmp_path}/codes/train-*.tar",
        "--data.held_out", f"{tmp_path}/codes/held-out-*.tar",
        "--data.image_tokenizer", tmp_path / "theirs", "--output", tmp_path / "run",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    picture = Generator.from_pretrained(tmp_path / "run").generate(["red square"], seed=0)[0]
    assert picture.size == (24, 16)
