"""Scripts train, evaluate, draw and export under ZeRO 3 in two processes, of which none has a whole model."""

import json
from pathlib import Path

import pytest
import torch
from generator_scripts import SMALL
from ranks import start_two
from safetensors.torch import load_file

from mmvit.sampling.generator import Generator

SHARDED = Path(__file__).parent / "zero3_in_shards.json"


def held_out(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").open())
    return [record["image_loss"] for record in records if record["kind"] == "held_out"]


@pytest.fixture(scope="module")
def runs(encoded, tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    uneven = ("--train.batch_size", 6)  # one process has more held-out batches than the other
    for name, how in {"ddp": (), "sharded": ("--deepspeed", SHARDED)}.items():
        command = (encoded / "config.toml", *SMALL, *uneven, "--output", folder / name, *how)
        ended = start_two("pipelines/train_caption_to_image.py", *command)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-5000:]
    return folder


def test_a_generator_in_shards_learns_and_draws_as_a_whole_one(runs):
    assert held_out(runs / "sharded") == pytest.approx(held_out(runs / "ddp"), rel=1e-4)
    for part in ("previews/step-000004.png", "best/model.safetensors", "last/text_tokenizer/tokenizer.json"):
        assert (runs / "sharded" / part).is_file()
    Generator.from_pretrained(runs / "sharded/last").generate("apple", seed=0)
    ours, theirs = (load_file(runs / run / "last/model.safetensors") for run in ("sharded", "ddp"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4)
