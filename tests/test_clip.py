"""CLIP: its loss by hand, alone and over two processes; captions without their padding; training by the
script."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.multiprocessing import start_processes

from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import TextTokenizer
from mmvit.data.images import decode_image, to_unit_range
from mmvit.data.writing import ShardWriter
from mmvit.errors import UserError
from mmvit.evaluation.clip_report import retrieval
from mmvit.evaluation.retrieval import caption_ranks
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.sampling.candidates import CaptionScorer
from mmvit.streams.shards import expand_shards, read_shard

ROOT = Path(__file__).resolve().parent.parent
CORE = TransformerConfig(width=16, depth=1, num_heads=2)
CONFIG = CLIPConfig(
    image=ClassifierConfig(image_size=16, patch_size=8, core=CORE),
    text=CORE,
    vocab_size=20,
    text_length=5,
    embedding_width=8,
)
IDS = torch.tensor([[3, 4, 0, 0, 0], [5, 6, 7, 0, 0], [3, 4, 0, 0, 0], [8, 0, 0, 0, 0]])  # one comes twice


def small() -> CLIP:
    torch.manual_seed(0)
    model = CLIP(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixels": pixels, "caption_ids": IDS}


def test_the_loss_by_hand():
    model = small()
    with torch.no_grad():
        model.log_scale.fill_(math.log(3))
    images, captions = model.embed_images(batch()["pixels"]), model.embed_captions(IDS)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(4))
    cosines = 3 * images @ captions.T
    belongs = [[0, 2], [1], [0, 2], [3]]
    expected = 0
    for logits in (cosines, cosines.T):
        rows = F.log_softmax(logits, dim=1)
        expected = expected - sum(rows[i, own].mean() for i, own in enumerate(belongs)) / 4 / 2
    loss, metrics = model.loss(batch())
    torch.testing.assert_close(loss, expected)
    found = [cosines[i].argmax().item() in own for i, own in enumerate(belongs)]
    assert metrics["accuracy"] == sum(found) / 4
    assert metrics["temperature"].item() == pytest.approx(1 / 3)
    with torch.no_grad():
        model.log_scale.fill_(9)
    assert model.scale == 100


def test_padding_does_not_change_a_caption():
    model = small()
    longer = CLIP(CONFIG.model_copy(update={"text_length": 9}))
    weights = model.state_dict()
    table = torch.cat([weights["positions.table"], torch.randn(4, 16)])
    longer.load_state_dict({**weights, "positions.table": table})
    padded = F.pad(IDS, (0, 4))
    torch.testing.assert_close(longer.embed_captions(padded), model.embed_captions(IDS))
    assert not torch.allclose(model.embed_captions(IDS[:, [1, 0, 2, 3, 4]]), model.embed_captions(IDS))
    with pytest.raises(ValueError, match="expected captions of 5 tokens, got 4"):
        model.embed_captions(IDS[:, :4])


def part_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = small()
    own = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch().items()}
    loss, _ = model.loss(own)
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        gradients = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": total / 2, **gradients}, Path(folder) / "result.pt")
    dist.destroy_process_group()


def test_two_processes_compare_all_their_pairs(tmp_path):
    start_processes(part_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    model = small()
    loss, _ = model.loss(batch())
    loss.backward()
    torch.testing.assert_close(found.pop("loss"), loss.detach())
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    assert "log_scale" in found


def test_ranks_of_what_belongs_together():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4], [0.5, 0.5, 0.5]])
    belongs = torch.tensor([[False, True, True], [True, False, False], [False, False, True]])
    assert caption_ranks(scores, belongs).tolist() == [1, 2, 1]


class Nearly(torch.nn.Linear):
    """Two images, each a hair nearer to its own caption: less than bfloat16 tells apart."""

    def embed_images(self, pixels):
        return torch.tensor([[1, 0.001], [1, -0.001]])

    def embed_captions(self, caption_ids):
        return torch.tensor([[1, 0.001], [1, -0.001]])


def test_near_captions_do_not_tie_in_bfloat16():
    batch = {"pixels": torch.zeros(2, 1), "caption_ids": torch.tensor([[1], [2]])}
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval(Nearly(1, 1), [batch])["caption_at_1"] == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, tiny_shards) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""
        output = "{folder / "run"}"
        [data]
        train = "{tiny_shards}/train-*.tar"
        held_out = "{tiny_shards}/held-out-*.tar"
        [model]
        text_length = 4
        embedding_width = 16
        text = {{ width = 32, depth = 2, num_heads = 2 }}
        [model.image]
        image_size = 16
        patch_size = 8
        core = {{ width = 32, depth = 2, num_heads = 2 }}
        [train]
        steps = 120
        batch_size = 16
        num_workers = 0
        evaluate_every = 60
        precision = "fp32"
        [optimizer]
        lr = 3e-3
        warmup_steps = 2
        """
    )
    ran = run_script("pipelines/train_clip.py", recipe)
    assert ran.returncode == 0, ran.stderr
    return folder / "run"


def test_the_script_trains_what_finds_captions(trained, tiny_shards):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["caption_at_1"] == last["image_at_1"] == 1
    scorer = CaptionScorer.from_pretrained(trained)
    samples = [s for shard in expand_shards(f"{tiny_shards}/held-out-*.tar") for s in read_shard(shard)]
    pixels = torch.stack(
        [torch.from_numpy(to_unit_range(decode_image(s.files["png"], (32, 32)))) for s in samples]
    )
    captions = [sample.files["txt"].decode() for sample in samples]
    own, others = scorer.scores(pixels, captions), scorer.scores(pixels, captions[1:] + captions[:1])
    assert (own > others).all()


def test_images_are_named_from_the_command_line(trained, run_script, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("red square\nblue square\n\n")
    Image.new("RGB", (20, 20), (0, 0, 250)).save(tmp_path / "blue.png")
    arguments = ("--model", trained, tmp_path / "blue.png", "--captions-file", captions)
    ran = run_script("pipelines/caption_images.py", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[-2] for line in ran.stdout.splitlines()[1:]] == ["blue", "red"]
    captions.write_text("\n")
    ran = run_script("pipelines/caption_images.py", *arguments)
    assert (ran.returncode, "holds no captions" in ran.stderr) == (2, True)


def test_evaluation_finds_captions_and_images(trained, tiny_shards, run_script, tmp_path):
    with ShardWriter(tmp_path / "data", "held-out", 10) as writer:
        for sample in read_shard(tiny_shards / "held-out-000000.tar"):
            caption = sample.files["txt"].decode()
            wrong = "blue square" if caption == "red square" else "red square"
            captions = {"captions": {"en": caption, "de": wrong}}
            writer.write(sample.key, sample.files | {"json": json.dumps(captions).encode()})
    arguments = ("pipelines/evaluate.py", trained, tmp_path / "data", "--out", tmp_path / "clip.png")
    ran = run_script(*arguments, "--language", "en,de")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "clip.json").read_text())
    assert (figures["split"], figures["pairs"], figures["language"]) == ("held-out", 8, "en")
    assert figures["caption_at_1"] == figures["image_at_1"] == 1
    assert figures["languages"]["de"]["caption_at_1"] < 1  # they are those of other images
    ran = run_script(*arguments, "--language", "xx")
    assert (ran.returncode, "no caption in xx" in ran.stderr) == (2, True)


def test_a_clip_of_another_tokenizer_is_refused(trained, tokenizer):
    clip = CLIP.from_pretrained(trained / "best")
    assert isinstance(CaptionScorer(clip, tokenizer).text_tokenizer, TextTokenizer)
    with pytest.raises(UserError, match="has 4096 tokens, but the CLIP was built for 20"):
        CaptionScorer(small(), tokenizer)
    with pytest.raises(ValueError, match="representation_width belongs to a classifier's head"):
        CLIPConfig(image=ClassifierConfig(representation_width=4))
