"""Encoding that is killed, shared out or repeated ends in the same bytes as one that is not."""

import gc
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from generator_scripts import refused
from ranks import start_two
from shard_scripts import contents

from mmvit.data.lock import sole_writer
from mmvit.data.writing import ShardWriter, WholeShard
from mmvit.models.vq import VQConfig, VQModel
from mmvit.places import load_script
from mmvit.streams.shards import Sample, read_shard

SCRIPT = "pipelines/encode_images.py"


@pytest.fixture(scope="module")
def source(tiny_shards, tmp_path_factory) -> Path:
    """Six shards, with a sample in every second one that has no image."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(tiny_shards, folder, dirs_exist_ok=True)
    for number, shard in enumerate(sorted(folder.glob("*.tar"))[::2]):
        with ShardWriter(folder / "other", "train") as writer:
            for sample in read_shard(shard):
                writer.write(sample.key, sample.files)
            writer.write(f"no-image-{number}", {"txt": b"red"})
        (folder / "other" / "train-000000.tar").replace(shard)
        (folder / f"{shard.name}.index").unlink()
    shutil.rmtree(folder / "other")
    return folder


@pytest.fixture(scope="module")
def tokenizer(encoded) -> Path:
    return encoded / "tokenizer"


@pytest.fixture(scope="module")
def whole(source, tokenizer, run_script, tmp_path_factory) -> tuple[dict[str, bytes], str]:
    """What an undisturbed run writes and says."""
    return result(run_script, source, tokenizer, tmp_path_factory.mktemp("whole"))


def arguments(source: Path, tokenizer: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (SCRIPT, source, out, "--tokenizer", tokenizer, "--size", "16x24", *more)


def result(run_script, source, tokenizer, out, *more: object) -> tuple[dict[str, bytes], str]:
    ran = run_script(*arguments(source, tokenizer, out, *more))
    assert ran.returncode == 0, ran.stderr
    return written(out), told(ran.stdout)


def written(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if not name.startswith(".encoded/")}


def told(printed: str) -> str:
    """The closing table, below its title."""
    return re.sub(r"\s+", " ", printed.partition("samples in")[2].partition("\n")[2])


def encoded_again(run_script, source: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    """The shards that a run writes."""
    with mock.patch.object(load_script(SCRIPT), "WholeShard", side_effect=WholeShard) as made:
        result(run_script, source, tokenizer, out, *more)
    return [call.args[0].name for call in made.call_args_list]


def dies_at(place: str, number: int, how: Callable[[], None]) -> mock._patch:
    """Calls `how` before the call of that number of a function."""
    calls = iter(range(number))
    *module, name = place.split(".")
    owner = load_script(SCRIPT) if module == ["script"] else sys.modules[".".join(module)]
    real = getattr(owner, name)

    def call(*values, **options):
        if next(calls, None) is None:
            how()
        return real(*values, **options)

    return mock.patch.object(owner, name, call)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("place", "number", "kept"),
    [
        ("script.pack_codes", 37, 3),
        ("mmvit.data.writing.save_index", 1, 1),
        ("mmvit.data.finished.write_json", 2, 2),
        ("script.write_dataset_card", 0, 6),
    ],
)
def test_an_interrupted_run_keeps_finished_shards_and_goes_on(
    source, tokenizer, whole, run_script, tmp_path, place, number, kept
):
    with dies_at(place, number, interrupt):
        ran = run_script(*arguments(source, tokenizer, tmp_path))
    assert ran.returncode == 130
    assert "interrupted: finished shards are kept, and the same command goes on from there\n" in ran.stderr
    assert not (tmp_path / "dataset.json").exists()
    assert not list(tmp_path.glob(".*.partial"))
    with mock.patch.object(load_script(SCRIPT), "WholeShard", side_effect=WholeShard) as made:
        again = result(run_script, source, tokenizer, tmp_path)
    assert again == whole
    assert made.call_count == 6 - kept


def test_two_processes_go_on_where_one_was_killed(source, tokenizer, whole, run_script, tmp_path):
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with dies_at("mmvit.data.writing.save_index", 3, kill):
            run_script(*arguments(source, tokenizer, tmp_path, "--workers", 2))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((tmp_path / ".encoded").iterdir())) == 3
    ran = start_two(*arguments(source, tokenizer, tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "3 of 6 shards are encoded already\n" in ran.stdout
    assert (written(tmp_path), told(ran.stdout)) == whole


def test_only_what_has_changed_is_encoded_again(source, tokenizer, whole, run_script, tmp_path):
    images, out = Path(shutil.copytree(source, tmp_path / "images")), tmp_path / "codes"
    run = (run_script, images, tokenizer, out)
    assert len(encoded_again(*run)) == 6
    assert encoded_again(*run) == []
    shard, other = images / "train-000001.tar", images / "train-000003.tar"
    times = shard.stat()
    os.utime(other)
    (out / "train-000002.tar").chmod(0o600)
    assert encoded_again(*run) == []
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x89PNG")] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert encoded_again(*run) == ["train-000001.tar"]
    shutil.copy(source / shard.name, shard)
    (out / "held-out-000000.tar").write_bytes(b"")
    (out / ".encoded/train-000000.tar.json").write_bytes(b"\xff")
    (out / ".encoded/train-000004.tar.json").write_text("[1]")
    changed = ["held-out-000000.tar", *(f"train-00000{number}.tar" for number in (0, 1, 4))]
    assert encoded_again(*run) == changed
    assert written(out) == whole[0]
    shutil.copy(images / "train-000004.tar", images / "train-000005.tar")
    assert encoded_again(*run) == ["train-000005.tar"]
    for name in ("train-000004.tar", "train-000005.tar"):
        (images / name).unlink()
    assert encoded_again(*run) == []
    assert {path.name for path in out.glob("train*4.tar*")} == set()
    assert len(list((out / ".encoded").iterdir())) == 5


@pytest.mark.parametrize("is_finished", [True, False])
def test_codes_made_in_another_way_are_not_replaced(source, tokenizer, run_script, tmp_path, is_finished):
    other, out = tmp_path / "other", tmp_path / "codes"
    VQModel(VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16))).save_pretrained(other)
    with nullcontext() if is_finished else dies_at("script.pack_codes", 37, interrupt):
        run_script(*arguments(source, tokenizer, out))
    assert (out / "dataset.json").exists() == is_finished
    before = contents(out)

    def changed(folder: Path, *more: object) -> str:
        ran = run_script(*arguments(source, folder, out, *more))
        refused(
            ran, f"{out} holds shards made with other options (", "): remove that folder, or name another"
        )
        assert contents(out) == before
        return ran.stderr.partition("options (")[2].partition("): remove")[0]

    digits = "[0-9a-f]{16}"
    both = rf"--tokenizer was {tokenizer} \({digits}\), is {other} \({digits}\)"
    assert re.fullmatch(both, changed(other))
    assert changed(tokenizer, "--size", 16) == "--size was 16x24, is 16x16"
    said = "--augmented was 0, is 1; --flip-unless was not given, is left right"
    assert changed(tokenizer, "--augmented", 1, "--flip-unless", "left, right") == said
    moved = shutil.copytree(tokenizer, tmp_path / "moved")
    assert len(encoded_again(run_script, source, moved, out)) == (0 if is_finished else 3)


def test_a_shard_that_is_replaced_while_it_is_read_is_refused(source, tokenizer, run_script, tmp_path):
    images = Path(shutil.copytree(source, tmp_path / "images"))
    shard = images / "train-000002.tar"

    def replace() -> None:
        shutil.copy(images / "train-000003.tar", shard)

    with dies_at("script.pack_codes", 20, replace):
        ran = run_script(*arguments(images, tokenizer, tmp_path / "codes", "--workers", 0))
    refused(ran, f"{shard} changed while it was read")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_any_size_is_encoded_in_the_same_memory(
    tiny_shards, tokenizer, run_script, tmp_path, workers
):
    (sample, *_) = read_shard(tiny_shards / "held-out-000000.tar")
    with ShardWriter(tmp_path / "images", "train", samples_per_shard=300) as writer:
        for number in range(600):
            writer.write(f"{number:04d}", {"png": sample.files["png"]})
    del sample
    live = []

    def encode(model: VQModel, pixels: torch.Tensor) -> torch.Tensor:
        live.append(sum(isinstance(each, Sample) for each in gc.get_objects()))
        return real(model, pixels)

    real = VQModel.encode
    with mock.patch.object(VQModel, "encode", encode):
        result(run_script, tmp_path / "images", tokenizer, tmp_path / "codes", "--workers", workers)
    assert len(live) == 2 * 5  # batches
    assert max(live) <= 64 + (2 * workers + 3) * 16


def test_a_folder_that_another_job_writes_to_is_refused(source, tokenizer, run_script, tmp_path):
    child = os.fork()
    if child == 0:
        with sole_writer(tmp_path):
            os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    try:
        ran = run_script(*arguments(source, tokenizer, tmp_path))
        refused(ran, f"is being written to by process {child} on")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run_script(*arguments(source, tokenizer, tmp_path)).returncode == 0
