"""`mmvit shards` finds splits and classes in folders and columns, and holds images out by a rule."""

import json
import re
import shutil
from unittest import mock

import pytest
from generator_scripts import refused
from PIL import Image
from shard_scripts import contents, make_shards, read_split, save_image

from mmvit.data.sources import find_entries
from mmvit.data.writing import Outcome
from mmvit.errors import UserError


def test_folders_of_one_class_are_refused_and_numbered_ones_keep_their_names(run_script, tmp_path):
    for name in ("0010", "1999", "2"):
        (tmp_path / "years" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "years" / name / "a.png")
    done = run_script("pipelines/make_shards.py", tmp_path / "years", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == ["2", "0010", "1999"]
    for name in ("0010", "1999"):
        shutil.rmtree(tmp_path / "years" / name)
    done = run_script("pipelines/make_shards.py", tmp_path / "years", tmp_path / "out")
    assert done.returncode == 2
    assert "years has only one class, '2'" in done.stderr


def test_a_class_of_which_no_image_can_be_read_is_refused(run_script, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        save_image(tmp_path / "pets" / name / "1.png")
    (tmp_path / "pets" / "dog" / "1.png").write_bytes(b"no image")
    done = run_script("pipelines/make_shards.py", tmp_path / "pets", tmp_path / "out")
    assert done.returncode == 2
    assert "no image of the class dog could be used: 1 x undecodable image" in done.stderr
    assert not list((tmp_path / "out").glob("*.tar"))


def test_folder_names_in_two_unicode_forms_are_one_class(run_script, tmp_path):
    for name in ("caf\u00e9/1.png", "cafe\u0301/2.png", "dog/1.png"):
        save_image(tmp_path / "pets" / name)
    make_shards(run_script, tmp_path / "pets", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["classes"] == ["caf\u00e9", "dog"]


def test_held_out_share_is_a_rule_of_the_key(run_script, tmp_path):
    for number in range(200):
        save_image(tmp_path / "source" / "all" / f"{number}.png", (1, 1))
    for out in ("a", "b"):
        options = ("--held-out-share", 0.2, "--unlabelled")
        done = run_script("pipelines/make_shards.py", tmp_path / "source", tmp_path / out, *options)
        assert done.returncode == 0, done.stderr
    held_out = read_split(tmp_path / "a", "held-out")
    assert all({*sample.files} == {"png"} for sample in held_out.values())
    assert 20 < len(held_out) < 60
    assert not held_out.keys() & read_split(tmp_path / "a", "train").keys()
    for split in ("held-out", "train"):
        shard = f"{split}-000000.tar"
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_where_the_one_to_hold_out_cannot_be_read_the_next_one_is_held_out(run_script, tmp_path):
    for number in range(4):
        save_image(tmp_path / "source" / f"{number}.png", (1, 1))
    options = ("pipelines/make_shards.py", tmp_path / "source", tmp_path / "out", "--unlabelled")
    assert run_script(*options).returncode == 0
    (held_out,) = read_split(tmp_path / "out", "held-out")
    (tmp_path / "source" / f"{held_out}.png").write_bytes(b"damaged")
    assert run_script(*options).returncode == 0
    (other,) = read_split(tmp_path / "out", "held-out")
    assert other != held_out
    assert len(read_split(tmp_path / "out", "train")) == 2


def test_each_class_keeps_an_image_to_train_on(run_script, tmp_path):
    for name in range(12):
        for number in range(1 + name % 2):
            save_image(tmp_path / "source" / f"class{name}" / f"{number}.png", (1, 1))
    options = ("--held-out-share", 0.9)
    done = run_script("pipelines/make_shards.py", tmp_path / "source", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out" / "dataset.json").read_text())["samples_per_class"]
    assert len(counts["train"]) == 12
    assert counts["held-out"]


def test_classes_of_only_one_split_are_named(run_script, tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/owl/1.png"):
        save_image(tmp_path / "pets" / name)
    done = run_script("pipelines/make_shards.py", tmp_path / "pets", tmp_path / "out")
    told = " ".join(done.stdout.split())
    assert "Warning: no training image of owl." in told
    assert "Warning: no image outside train of dog." in told


def test_of_few_images_one_is_held_out_and_empty_captions_are_told(run_script, tmp_path):
    for number in range(3):
        save_image(tmp_path / "source" / f"{number}.png", (1, 1))
        (tmp_path / "source" / f"{number}.txt").write_text("a dot" if number else " \n")
    for share, held_out in ((0.001, 1), (0.999, 2), (0, 0)):
        out = tmp_path / str(share)
        done = run_script("pipelines/make_shards.py", tmp_path / "source", out, "--held-out-share", share)
        assert done.returncode == 0, done.stderr
        assert len(read_split(out, "train")) == 3 - held_out
        assert json.loads((out / "dataset.json").read_text())["samples"].get("held-out", 0) == held_out
        assert "of these: the caption is empty" in done.stdout


@pytest.mark.parametrize(
    "folders",
    [
        ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat"),
        ("Train/cat", "Train/dog", "validation/cat", "validation/dog", "testing/cat"),
        ("train2017/cat", "train2017/dog", "val2017/cat", "val2017/dog", "test_set/cat"),
        ("cat/train", "dog/train", "cat/dev", "dog/dev", "cat/test"),
    ],
)
def test_folders_named_like_splits_are_splits_and_not_classes(run_script, tmp_path, folders):
    for folder in folders:
        save_image(tmp_path / "pets" / folder / "1.png")
    done = run_script("pipelines/make_shards.py", tmp_path / "pets", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["classes"] == ["cat", "dog"]
    assert card["samples"] == {"train": 2, "held-out": 2, "test": 1}
    assert card["samples_per_class"]["held-out"] == {"cat": 1, "dog": 1}
    assert [sample.files["cls"] for sample in read_split(tmp_path / "out", "test").values()] == [b"0"]
    assert "The source has splits of its own: train 2, held-out 2, test 1." in done.stdout
    assert re.search(r"2 classes *\n.*\n.*class .* train .* held-out .* test", done.stdout)
    assert re.search(r"cat +│ +1 │ +1 │ +1 │\n│ dog +│ +1 │ +1 │ +0 │", done.stdout)
    refused = run_script(
        "pipelines/make_shards.py", tmp_path / "pets", tmp_path / "new", "--held-out-share", 0.5
    )
    assert "2 held-out images of its own; leave --held-out-share out" in refused.stderr


def test_a_class_may_be_called_train_but_splits_beside_other_folders_are_refused(run_script, tmp_path):
    for folder in ("train", "car"):
        save_image(tmp_path / "vehicles" / folder / "1.png")
    _, printed = make_shards(run_script, tmp_path / "vehicles", tmp_path / "out")
    assert "The folder train is not taken for a split, as there are others beside it: car." in printed
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["classes"] == ["car", "train"]
    save_image(tmp_path / "vehicles" / "test" / "1.png")
    done = run_script("pipelines/make_shards.py", tmp_path / "vehicles", tmp_path / "new")
    assert done.returncode == 2
    assert (
        "holds folders of splits (test, train) beside others (car): move them, or list the images"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "holdout", "held-out"),
        ("training", "Hold_Out", "held-out"),
        ("trainval", "evaluation", "held-out"),
        ("train1", "val1", "held-out"),
        ("seg_train", "seg_test", "test"),
        ("training set", "tests", "test"),
    ],
)
def test_common_names_of_splits_are_no_classes(tmp_path, train, other, split):
    for name in (f"{train}/cat/1.png", f"{train}/dog/1.png", f"{other}/cat/2.png"):
        save_image(tmp_path / name)
    entries = find_entries(tmp_path, Outcome())
    assert {(entry.label, entry.split) for entry in entries} == {
        ("cat", "train"), ("dog", "train"), ("cat", split),
    }  # fmt: skip


@pytest.mark.parametrize("stray", ["bear/x.png", "bear/old/x.png"])
def test_an_image_beside_the_splits_of_a_class_is_named(tmp_path, stray):
    for name in ("apple/train/1.png", "apple/val/2.png", "bear/train/1.png", stray):
        save_image(tmp_path / name)
    with pytest.raises(UserError, match=f"splits in those of classes, but also images in {stray[:-6]}: move"):
        find_entries(tmp_path, Outcome())


def test_a_folder_around_the_splits_is_no_class(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
        save_image(tmp_path / "source" / "photos" / "all" / name)
    entries = find_entries(tmp_path / "source", Outcome())
    assert {(entry.label, entry.split) for entry in entries} == {
        ("cat", "train"), ("dog", "train"), ("cat", "held-out"),
    }  # fmt: skip


def test_a_folder_around_the_classes_is_named(run_script, tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        save_image(tmp_path / "source" / "photos" / name)
    done = run_script("pipelines/make_shards.py", tmp_path / "source", tmp_path / "out")
    assert done.returncode == 2
    assert f"use mmvit shards {tmp_path / 'source' / 'photos'}" in done.stderr


def test_a_random_held_out_share_is_taken_of_a_source_that_has_only_a_train_folder(run_script, tmp_path):
    for number in range(8):
        save_image(tmp_path / "photos" / "train" / f"{number}.png", (number + 1, 1))
        (tmp_path / "photos" / "train" / f"{number}.txt").write_text("a line")
    done = run_script("pipelines/make_shards.py", tmp_path / "photos", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "out" / "dataset.json").read_text())["samples"]
    assert samples["held-out"] >= 1
    assert sum(samples.values()) == 8


def test_split_and_group_columns(run_script, tmp_path):
    rows = [{"path": f"{number}.png", "class": "cat" if number % 2 else "dog"} for number in range(60)]
    for number, row in enumerate(rows):
        save_image(tmp_path / row["path"], (1, 1))
        row["group"] = f"twins {number // 3}"
    (tmp_path / "groups.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run_script(
        "pipelines/make_shards.py", tmp_path / "groups.jsonl", tmp_path / "a", "--held-out-share", 0.3
    )
    assert done.returncode == 0, done.stderr
    held_out = {int(key) // 3 for key in read_split(tmp_path / "a", "held-out")}
    train = {int(key) // 3 for key in read_split(tmp_path / "a", "train")}
    assert not held_out & train
    assert 2 <= len(held_out) <= 12
    splits = ["train", "valid", "Test", "", "a/b", "combinations"]
    lines = [f"{number}.png;{split};cat;{number // 2}" for number, split in enumerate(splits)]
    (tmp_path / "splits.CSV").write_text(
        "\n".join(["path;split;caption;group", *lines])
    )  # as Excel writes it
    done = run_script("pipelines/make_shards.py", tmp_path / "splits.CSV", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "b" / "dataset.json").read_text())
    assert card["samples"] == {"train": 2, "held-out": 1, "test": 1, "combinations": 1}
    for words in (
        "of these: no split is given, so it is in train",
        "skipped: the split is not a name of letters and digits",
        "of these: groups both in train and in another split",
    ):
        assert words in " ".join(done.stdout.replace("│", " ").split())


def test_splits_of_an_earlier_run_do_not_stay(run_script, tmp_path):
    for name in ("train/1.png", "train/2.png", "test/1.png"):
        save_image(tmp_path / "source" / name)
    arguments = ("pipelines/make_shards.py", tmp_path / "source", tmp_path / "out", "--unlabelled")
    assert run_script(*arguments).returncode == 0
    shutil.rmtree(tmp_path / "source" / "test")
    assert run_script(*arguments).returncode == 0
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {
        "train-000000.tar", "held-out-000000.tar",
    }  # fmt: skip


def test_shards_made_in_another_way_are_not_replaced(run_script, tmp_path):
    for number in range(9):
        save_image(tmp_path / "source" / f"{number}.png", (8, 8))

    def run(*options: object):
        arguments = (tmp_path / "source", tmp_path / "out", "--unlabelled", *options)
        return run_script("pipelines/make_shards.py", *arguments)

    assert run("--held-out-share", 0.2).returncode == 0
    before = contents(tmp_path / "out")
    changed = "--held-out-share was 0.2, is 0.5; --size was not given, is 4"
    said = f"{tmp_path / 'out'} holds shards made with other options ({changed}): remove that folder"
    refused(run("--held-out-share", 0.5, "--size", 4), said)
    assert contents(tmp_path / "out") == before
    save_image(tmp_path / "source" / "new.png", (8, 8))
    assert run("--held-out-share", 0.2).returncode == 0  # the same set, brought up to date
    assert len(read_split(tmp_path / "out", "*")) == 10
    (tmp_path / "out" / "dataset.json").unlink()
    refused(run("--held-out-share", 0.2), f"{tmp_path / 'out'} holds shards that mmvit shards did not make")
    (tmp_path / "out" / ".packed").mkdir()  # of a run that was killed while it published its shards
    assert run("--held-out-share", 0.5).returncode == 0


def test_shards_that_other_commands_made_of_these_are_not_replaced(encoded, run_script, tmp_path):
    """Though their dataset.json names the same source."""
    source, out, codes, subset = (tmp_path / name for name in ("pets", "shards", "codes", "subset"))
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        save_image(source / name, (16, 16))
    make_shards(run_script, source, out)
    options = ("--tokenizer", encoded / "tokenizer", "--size", 16)
    assert run_script("pipelines/encode_images.py", out, codes, *options).returncode == 0
    assert run_script("pipelines/take_share.py", out, subset, "--share", 0.5).returncode == 0
    for folder in (codes, subset):
        before = contents(folder)
        with mock.patch("mmvit.data.packing.open_image", side_effect=AssertionError("decoded before")):
            ran = run_script("pipelines/make_shards.py", source, folder, "--held-out-share", 0.5)
        refused(ran, f"{folder} holds shards that mmvit shards did not make")
        assert contents(folder) == before
    for folder, *command in (
        (codes, "take_share.py", out, codes, "--share", 0.5),
        (subset, "encode_images.py", out, subset, *options),
        (subset, "prepare_emoji_groups.py", out, subset),
    ):
        before = contents(folder)
        refused(
            run_script(f"pipelines/{command[0]}", *command[1:]), f"{folder} holds shards that another command"
        )
        assert contents(folder) == before
    card = json.loads((out / "dataset.json").read_text())
    del card["options"]  # as earlier versions wrote it
    (out / "dataset.json").write_text(json.dumps(card))
    make_shards(run_script, source, out)


# Captions


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    """Not taken for styles of rich's, which fails at some."""
    outcome = Outcome()
    outcome.wrote("held[red]", label="[/b]")
    outcome.skip("unreadable", "a[/1].png")
    outcome.print(tmp_path)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("held[red]", "[/b]", "a[/1].png"))
