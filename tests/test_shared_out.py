"""Two processes of torchrun make the indexes and the shards that one makes, and end together."""

import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
from generator_scripts import refused
from ranks import start_two
from shard_scripts import contents, save_image

from mmvit.data.finished import FinishedShards
from mmvit.data.writing import WholeShard
from mmvit.places import load_script
from mmvit.streams.index import beside

INDEX, SHARDS = "pipelines/index_shards.py", "pipelines/make_shards.py"
OPTIONS = ("--held-out-share", 0.3, "--samples-per-shard", 3, "--fit", "pad")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Images of seven shards, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("pets")
    for number in range(20):
        save_image(folder / ("cat", "dog")[number % 2] / f"{number}.png", (10 + number, 12))
    (folder / "cat" / "8.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def shards(tiny_shards, tmp_path) -> list[Path]:
    """Six shards without indexes, of which one is damaged."""
    folder = tmp_path / "shards"
    folder.mkdir()
    found = [Path(shutil.copy(shard, folder)) for shard in sorted(tiny_shards.glob("*.tar"))]
    found[3].write_bytes(found[3].read_bytes()[:-9000])
    return found


def table(printed: str) -> str:
    return printed.partition("┏")[2]


def errors_of(ran) -> list[str]:
    assert ran.returncode == 1, ran.stdout
    assert "Traceback" not in ran.stderr
    return re.findall("(?m)^error: .*", ran.stderr)


def test_two_processes_write_the_indexes_of_one(shards, run_script):
    folder = shards[0].parent
    one = run_script(INDEX, folder)
    whole = contents(folder)
    for shard in shards[1:]:
        beside(shard).unlink()
    (folder / "shards.json").unlink()
    kept = beside(shards[0]).stat().st_mtime_ns
    two = start_two(INDEX, folder)
    assert (two.returncode, two.stdout) == (0, one.stdout), two.stderr
    assert "warning: " in one.stdout
    assert contents(folder) == whole
    assert beside(shards[0]).stat().st_mtime_ns == kept


def test_an_index_that_one_of_two_processes_cannot_write_ends_both(shards):
    beside(shards[1]).mkdir()  # the second process' share
    assert errors_of(start_two(INDEX, shards[0].parent)) == [
        f"error: cannot write {beside(shards[1])}: Is a directory"
    ]
    assert not (shards[0].parent / "shards.json").exists()


def test_two_processes_go_on_packing_where_one_was_killed(source, run_script, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = run_script(SHARDS, source, whole, *OPTIONS)
    if (child := os.fork()) == 0:
        left, real = iter([True] * 3), WholeShard.publish

        def publish(shard: WholeShard) -> None:
            if not next(left, None):
                os.kill(os.getpid(), signal.SIGKILL)
            real(shard)

        with mock.patch.object(WholeShard, "publish", publish):
            run_script(SHARDS, source, out, *OPTIONS, "--workers", 0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    ran = start_two(SHARDS, source, out, *OPTIONS)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("an interrupted run, which finished 3 of 7 shards\n") == 1
    assert contents(out) == contents(whole)
    assert table(ran.stdout) == table(expected.stdout)


def test_a_shard_that_one_of_two_processes_cannot_write_ends_both(source, tmp_path):
    (tmp_path / ".packed" / "train-000001.tar").mkdir(parents=True)  # in the way of the second process
    (error,) = errors_of(start_two(SHARDS, source, tmp_path, *OPTIONS))
    assert "train-000001.tar" in error
    assert {path.name for path in tmp_path.iterdir()} == {".packed"}


def test_files_that_another_machine_wrote_to_a_disk_of_its_own_are_missed(
    source, shards, run_script, tmp_path
):
    said = "is not there: see that all processes write to the same disk, and start the same command again"
    out, packed = tmp_path / "indexes", tmp_path / "packed"
    with mock.patch("mmvit.streams.remote_index.write_index", return_value=(10, "")):
        refused(run_script(INDEX, shards[0].parent, "--out", out, "--workers", 0), f"tar.index {said}")
    assert not (out / "shards.json").exists()
    assert run_script(SHARDS, source, packed, *OPTIONS).returncode == 0
    before = contents(packed)
    with mock.patch.object(FinishedShards, "add"):
        refused(run_script(SHARDS, source, packed, *OPTIONS, "--workers", 0), f"0.tar {said}")
    assert {name: data for name, data in contents(packed).items() if not name.startswith(".")} == before
    with mock.patch.object(load_script(SHARDS), "make_room"):
        refused(run_script(SHARDS, source, tmp_path / "new", *OPTIONS, "--workers", 0), f".packed {said}")


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        (SHARDS, ("--max-side", 0), "--max-side: expected 1 or more"),
        ("pipelines/encode_images.py", ("--tokenizer", "none"), "none"),
    ],
)
def test_a_mistake_is_said_by_one_of_two_processes(source, tmp_path, script, option, message):
    (error,) = errors_of(start_two(script, source, tmp_path, *option))
    assert message in error
