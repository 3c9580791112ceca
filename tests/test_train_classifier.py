"""The classifier trained on tiny data by its script: resuming, mistakes, and what evaluations skip."""

import json
from pathlib import Path


def classifier_recipe(run: Path, shards: Path, held_out: Path | None = None) -> str:
    """A recipe of three steps of a tiny classifier."""
    return f"""
output = "{run}"
data = {{train = "{shards}/train-*.tar", held_out = "{held_out or shards / "held-out-*.tar"}"}}
model = {{image_size = 16, patch_size = 8, num_classes = 4, core = {{width = 16, depth = 1, num_heads = 2}}}}
train = {{steps = 3, batch_size = 8, log_every = 1}}
"""


def test_classifier_script_trains_resumes_and_reports_mistakes(tmp_path, tiny_shards, run_script):
    config = tmp_path / "config.toml"
    config.write_text(classifier_recipe(tmp_path / "run", tiny_shards))
    script = "pipelines/train_classifier.py"
    first = run_script(script, config)
    assert first.returncode == 0, first.stderr
    assert "step 3/3  held-out  loss" in first.stdout
    more = run_script(script, tmp_path / "run" / "config.toml", "--resume", "--train.steps", 4)
    assert more.returncode == 0, more.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 4]
    assert "resuming at step 3 of 4; train.steps was 3 and is now 4\n" in more.stdout
    before = (tmp_path / "run" / "config.toml").read_text()
    other = run_script(script, config, "--resume", "--model.patch_size", 4)
    assert other.returncode == 2
    assert "model.patch_size was 8 and is now 4" in other.stderr
    assert (tmp_path / "run" / "config.toml").read_text() == before
    again = run_script(script, config)
    assert again.returncode == 2
    assert "is not empty: add --resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_evaluations_skip_is_counted_at_the_end(tmp_path, tiny_shards, run_script):
    shard = tmp_path / "held-out-000000.tar"
    shard.write_bytes((tiny_shards / "held-out-000000.tar").read_bytes()[:-15_000])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(classifier_recipe(tmp_path / "run", tiny_shards, held_out=shard))
    plain = ("--train.num_workers", 0, "--train.precision", "fp32")
    ran = run_script("pipelines/train_classifier.py", recipe, *plain)
    assert ran.returncode == 0, ran.stderr
    assert "3 steps of 8 samples in float32, a line every 1\n" in ran.stdout
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("all evaluations: ")]
    assert f"0 skipped, and parts of 1 broken shard, the first: {shard} is truncated" in line
