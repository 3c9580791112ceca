"""One core for two tasks: its weights are there once, each part is what it would be alone, the script trains
both, and one model's core becomes another's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmvit.core.transformer import TransformerConfig
from mmvit.data.samples import PixelsSample
from mmvit.data.writing import ShardWriter
from mmvit.errors import UserError
from mmvit.evaluation.evaluate import evaluate
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.fine_tuning import take_core
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.joint import Joint, JointConfig
from mmvit.models.resnet import ResNet, ResNetConfig
from mmvit.models.vq import VQConfig, VQModel
from mmvit.recipes.resolve import resolve
from mmvit.sampling.generator import Generator
from mmvit.streams.paired import PairedStream
from mmvit.streams.shards import read_shard, shards_of
from mmvit.streams.stream import ShardStream
from mmvit.training.engine import WeightAverage
from mmvit.training.optim import layer_scales

ROOT = Path(__file__).resolve().parent.parent
CORE = TransformerConfig(width=32, depth=2, num_heads=2)
CLASSIFIER = {"image_size": 16, "patch_size": 8, "num_classes": 4}
GENERATOR = {
    "vocab_size": 40,
    "text_length": 6,
    "codebook_size": 16,
    "grid": (2, 2),
    "attention": "causal",
    "text_loss_weight": 1.0,
}


def small() -> Joint:
    torch.manual_seed(0)
    model = Joint(
        JointConfig.model_validate({"core": CORE, "classifier": CLASSIFIER, "generator": GENERATOR})
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "pixels": torch.randn(3, 3, 16, 16, generator=rng),
        "labels": torch.tensor([0, 3, 1]),
        "caption_ids": torch.tensor([[3, 4, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]]),
        "codes": torch.randint(16, (3, 4), generator=rng),
    }


def test_the_core_is_there_once_and_each_part_reads_it_as_its_own(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(".attention.out.weight" in name for name in names) == CORE.depth
    classifier, generator = (
        Classifier.from_pretrained(tmp_path),
        GeneratorTransformer.from_pretrained(tmp_path),
    )
    again, given = Joint.from_pretrained(tmp_path), batch()
    assert again.classifier.core is again.generator.core is again.core
    with torch.no_grad():
        seen = model.classifier(given["pixels"])
        drawn = model.generator(given["caption_ids"], given["codes"])[1]
        for part in (classifier, again.classifier):
            assert torch.equal(part(given["pixels"]), seen)
        for part in (generator, again.generator):
            assert torch.equal(part(given["caption_ids"], given["codes"])[1], drawn)
        expected = classifier.loss(given)[0] + generator.loss(given)[0]
        torch.testing.assert_close(model.loss(given)[0], expected)


def test_layers_of_both_parts_learn_the_slower_the_lower_they_are():
    model = small()
    scales = layer_scales(model, 0.5)
    names = dict(model.named_parameters())
    below = {"core.blocks.0": 2, "core.blocks.1": 1, "core.norm": 0, "classifier.head": 0}
    below |= {"generator.text_head": 0, "generator.image_head": 0}
    below |= {"generator.code_embedding": 3, "classifier.stem": 3}
    for start, layers in below.items():
        found = {scales[id(parameter)] for name, parameter in names.items() if name.startswith(start)}
        assert found == {0.5**layers}, start


def test_both_losses_train_the_core():
    model, given = small(), batch()
    gradients = []
    for loss in (model.classifier.loss, model.generator.loss, model.loss):
        model.zero_grad()
        loss(given)[0].backward()
        gradients.append(model.core.blocks[0].mlp.up.weight.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_the_weight_is_that_of_the_classifiers_loss():
    model, given = small(), batch()
    weighted = Joint(model.config.model_copy(update={"classification_weight": 3.0})).eval()
    weighted.load_state_dict(model.state_dict())
    expected = 3 * model.classifier.loss(given)[0] + model.generator.loss(given)[0]
    torch.testing.assert_close(weighted.loss(given)[0], expected)


def test_averaged_weights_share_the_core_too():
    average = WeightAverage(small(), 0.9).model
    assert average.classifier.core is average.generator.core is average.core
    assert len(average.state_dict()) == len(small().state_dict())


def test_two_cores_are_refused():
    other = {**CLASSIFIER, "core": {**CORE.model_dump(), "depth": 3}}
    with pytest.raises(ValueError, match=r"classifier\.core differs from core"):
        JointConfig.model_validate({"core": CORE.model_dump(), "classifier": other, "generator": GENERATOR})


def test_paired_batches_resume_where_they_were(tiny_shards):
    def paired() -> PairedStream:
        sizes = {"pixels": 16, "small_pixels": 8}
        streams = []
        for name, side in sizes.items():
            decode = Renamed((side, side), name)
            streams.append(ShardStream(f"{tiny_shards}/train-*.tar", decode, 5, seed=side, shuffle_buffer=9))
        return PairedStream(streams)

    stream = paired()
    batches = iter(stream)
    for _ in range(3):
        next(batches)
    state, expected = stream.state_dict(), next(batches)
    assert expected["pixels"].shape == (5, 3, 16, 16)
    assert expected["small_pixels"].shape == (5, 3, 8, 8)
    assert len(expected["keys"]) == 10
    assert stream.tally.read >= 40
    resumed = paired()
    resumed.load_state_dict(state)
    found = next(iter(resumed))
    assert found["keys"] == expected["keys"]
    assert torch.equal(found["small_pixels"], expected["small_pixels"])


class Renamed(PixelsSample):
    def __init__(self, size: tuple[int, int], name: str):
        super().__init__(size)
        self.name = name

    def __call__(self, sample, rng):
        return {self.name: super().__call__(sample, rng)["pixels"]}


def test_streams_with_the_same_entry_are_refused(tiny_shards):
    streams = [ShardStream(f"{tiny_shards}/train-*.tar", PixelsSample((8, 8)), 4) for _ in range(2)]
    with pytest.raises(ValueError, match="two streams have the entry pixels"):
        next(iter(PairedStream(streams)))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_shards, encoded, run_script) -> Path:
    """A run of the script for both tasks."""
    place = tmp_path_factory.mktemp("joint")
    (place / "config.toml").write_text(
        f"""
        output = "{place / "run"}"
        [classes]
        train = "{tiny_shards}/train-*.tar"
        held_out = "{tiny_shards}/held-out-*.tar"
        [captions]
        train = "{encoded}/codes/train-*.tar"
        held_out = "{encoded}/codes/held-out-*.tar"
        image_tokenizer = "{encoded}/tokenizer"
        text_tokenizer = "{ROOT}/tokenizers/emoji-text"
        [model]
        core = {{ width = 32, depth = 2, num_heads = 2 }}
        classifier = {{ image_size = 16, patch_size = 8, num_classes = 4 }}
        generator = {{ text_length = 8 }}
        [preview]
        captions = ["red square"]
        [train]
        steps = 6
        batch_size = 8
        num_workers = 0
        evaluate_every = 3
        checkpoint_every = 3
        ema_decay = 0.9
        """
    )
    ran = run_script("pipelines/train_joint.py", place / "config.toml")
    assert ran.returncode == 0, ran.stderr
    return place / "run"


def test_one_run_classifies_draws_and_captions(run, tiny_shards, run_script, tmp_path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if record["kind"] == "held_out"]
    assert {"loss", "accuracy", "classification_loss", "image_loss"} <= held_out[-1].keys()
    assert (run / "previews" / "step-000006.png").is_file()
    assert Generator.from_pretrained(run).generate("red square", seed=1)[0].size == (16, 16)
    out = tmp_path / "sheet.png"
    arguments = ("pipelines/evaluate.py", run, tiny_shards, "--out", out)
    ran = run_script(*arguments, "--limit", 4)
    assert ran.returncode == 0, ran.stderr
    assert "(the classifier and the generator of a joint model) on held-out of" in ran.stdout
    assert (tmp_path / "sheet-classifier.png").is_file()
    assert (tmp_path / "sheet-generator.png").is_file()
    assert not out.exists()
    assert json.loads((run / "evaluation-held-out-4.json").read_text())["captions"] == 4
    ran = run_script(*arguments, "--as", "classifier")
    assert ran.returncode == 0, ran.stderr
    assert out.is_file()
    assert json.loads(out.with_suffix(".json").read_text())["images"] == 8
    assert evaluate(run, without_classes(tiny_shards, tmp_path), limit=2).keys() == {"generator"}
    captions, image = tmp_path / "captions.txt", tmp_path / "red.png"
    captions.write_text("red square\nblue square\n")
    Image.new("RGB", (16, 16), "red").save(image)
    named = ("--model", run, image, "--captions-file", captions)
    ran = run_script("pipelines/caption_images.py", *named)
    assert ran.returncode == 0, ran.stderr
    assert "red square" in ran.stdout
    assert "blue square" in ran.stdout


def without_classes(shards: Path, folder: Path) -> Path:
    """A copy of shards without their classes."""
    for split in ("train", "held-out"):
        with ShardWriter(folder / "captions", split) as writer:
            for shard in shards_of(shards, split):
                for sample in read_shard(shard):
                    files = {name: data for name, data in sample.files.items() if name != "cls"}
                    writer.write(sample.key, files)
    return folder / "captions"


def test_a_killed_joint_run_resumes_bit_identically(run, run_script, tmp_path):
    config = run.parent / "config.toml"
    whole = load_file(run / "last" / "model.safetensors")
    short = ("--output", tmp_path / "run")
    assert run_script("pipelines/train_joint.py", config, *short).returncode == 0
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    ran = run_script("pipelines/train_joint.py", config, *short, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "resuming at step 3" in ran.stdout
    again = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_core_goes_from_one_task_to_the_other(run, tmp_path):
    classifier = Classifier(ClassifierConfig(**CLASSIFIER, core=CORE))
    classifier.save_pretrained(tmp_path / "classifier")
    dropped = CORE.model_copy(update={"dropout": 0.1})  # a free setting
    generator = GeneratorTransformer(GeneratorConfig(**GENERATOR, core=dropped))
    take_core(generator, str(tmp_path / "classifier"))
    pairs = zip(generator.core.parameters(), classifier.core.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    generator.save_pretrained(tmp_path / "generator")
    other = Classifier(ClassifierConfig(**CLASSIFIER, core=CORE))
    take_core(other, str(tmp_path / "generator"))
    pairs = zip(other.core.parameters(), classifier.core.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    take_core(classifier, str(run))
    trained = Generator.from_pretrained(run).transformer.core
    pairs = zip(classifier.core.parameters(), trained.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_core_of_another_shape_is_refused(tmp_path):
    classifier = Classifier(ClassifierConfig(**CLASSIFIER, core=CORE))
    classifier.save_pretrained(tmp_path / "classifier")
    VQModel(VQConfig(codebook_size=16)).save_pretrained(tmp_path / "tokenizer")
    wide = CORE.model_copy(update={"width": 64})
    generator = GeneratorTransformer(GeneratorConfig(**GENERATOR, core=wide))
    with pytest.raises(UserError, match=r"they have core\.width = 32, the recipe 64"):
        take_core(generator, str(tmp_path / "classifier"))
    with pytest.raises(UserError, match=r"holds an image tokenizer \(vq\), which has no core"):
        take_core(generator, str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="of kind 'resnet' has no core, so it cannot take"):
        take_core(ResNet(ResNetConfig(width=32, depths=(1,))), str(tmp_path / "classifier"))


def test_the_script_begins_with_anothers_core(run, tiny_shards, run_script, tmp_path):
    settings = [
        ("data.train", f"{tiny_shards}/train-*.tar"), ("data.held_out", f"{tiny_shards}/held-out-*.tar"),
        ("model.image_size", 16), ("model.patch_size", 8), ("model.num_classes", 4), ("model.core.width", 32),
        ("model.core.depth", 2), ("model.core.num_heads", 2), ("train.steps", 1), ("train.num_workers", 0),
        ("train.batch_size", 8), ("optimizer.lr", 1e-12), ("optimizer.weight_decay", 0),
        ("start.core", run / "last"), ("output", tmp_path / "run"),
    ]  # fmt: skip
    arguments = [word for key, value in settings for word in (f"--{key}", value)]
    ran = run_script("pipelines/train_classifier.py", ROOT / "configs/fashion_mnist_vit.toml", *arguments)
    assert ran.returncode == 0, ran.stderr
    began, source = Classifier.from_pretrained(tmp_path / "run" / "last"), Joint.from_pretrained(run / "last")
    for own, theirs in zip(began.core.parameters(), source.core.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-9, rtol=0)


def test_a_runs_own_config_is_read_again_with_another_core(run):
    assert resolve(run, resume=True).recipe.model.classifier.core == CORE
    changed = resolve(run, {"model.core.depth": 3}, resume=True).recipe.model
    assert (changed.core.depth, changed.classifier.core.depth, changed.generator.core.depth) == (3, 3, 3)
    with pytest.raises(UserError) as refused:
        resolve(run, {"model.core.widht": 3}, resume=True)
    assert "did you mean model.core.width" in str(refused.value)
    assert "classifier" not in str(refused.value)


def test_what_a_joint_run_cannot_do_is_refused(run, run_script, tmp_path):
    arguments = ("pipelines/train_joint.py", run.parent / "config.toml", "--output", tmp_path / "run")
    ran = run_script(*arguments, "--deepspeed", ROOT / "configs/deepspeed/zero3.json")
    assert ran.returncode == 2
    assert "a joint model runs its core twice in a pass, which ZeRO 3 cannot" in ran.stderr
    ran = run_script(*arguments, "--preview.guidance_scale", 2, "--model.generator.caption_dropout", 0)
    assert ran.returncode == 2
    assert "with caption_dropout = 0 the model learns no guidance" in ran.stderr
    ran = run_script(*arguments, "--model.generator.vocab_size", 77)
    assert ran.returncode == 2
    assert "model.generator.vocab_size is 77, but" in ran.stderr
