"""Shards of one's own images: what is written reads back, held out by a rule, mistakes are said plainly."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmvit.data.images import decode_image
from mmvit.data.shards import Sample, expand_shards, read_shard
from mmvit.data.sources import find_entries
from mmvit.data.writing import Outcome
from mmvit.errors import UserError


def read_split(folder: Path, split: str) -> dict[str, Sample]:
    return {
        sample.key: sample
        for shard in expand_shards(folder / f"{split}-*.tar")
        for sample in read_shard(shard)
    }


def save_image(path: Path, size: tuple[int, int] = (8, 8), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_shards(run_script, source: Path, out: Path, *arguments: object) -> tuple[dict[str, Sample], str]:
    done = run_script("pipelines/make_shards.py", source, out, "--held-out-share", 0, *arguments)
    assert done.returncode == 0, done.stderr
    return read_split(out, "train"), done.stdout


def test_folder_with_captions_beside_the_images(run_script, tmp_path):
    source = tmp_path / "photos"
    for name in ("a.png", "sub/b.jpg", "sub.x/c.webp", "d.bmp"):
        save_image(source / name, (20, 10))
        (source / name).with_suffix(".txt").write_text(f"caption of {name}\n", "utf-8-sig")  # as Windows does
    save_image(source / "uncaptioned.png")
    (source / "broken.png").write_bytes(b"no image")
    (source / "broken.txt").write_text("broken")
    save_image(source / "latin.png")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    samples, printed = make_shards(run_script, source, tmp_path / "out", "--max-side", 15)
    assert {key: sorted(sample.files) for key, sample in samples.items()} == {
        "a": ["png", "txt"],
        "sub_b": ["jpg", "txt"],
        "sub_x_c": ["jpg", "txt"],
        "d": ["png", "txt"],
    }
    assert samples["sub_b"].files["txt"] == b"caption of sub/b.jpg"
    assert decode_image(samples["a"].files["png"]).shape == (8, 15, 3)
    for reason in ("no .txt beside the image", "undecodable image", "caption is not UTF-8"):
        assert f"skipped: {reason}" in printed


def test_class_folders_and_images_kept_byte_for_byte(run_script, tmp_path):
    source = tmp_path / "pets"
    for name in ("dog/1.png", "cat/1.png", "cat/2.png", "loose.png"):
        save_image(source / name)
    samples, printed = make_shards(run_script, source, tmp_path / "out")
    assert {key: sample.files["cls"] for key, sample in samples.items()} == {
        "cat_1": b"0",
        "cat_2": b"0",
        "dog_1": b"1",
    }
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["classes"] == ["cat", "dog"]
    assert samples["dog_1"].files["png"] == (source / "dog" / "1.png").read_bytes()
    assert "skipped: neither .txt nor class folder" in printed


def test_dataset_json_counts_classes_and_measures_images(run_script, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 20 pixels wide, 10 high
    for name, size, mode in (
        ("cat/1.jpg", (10, 20), "RGB"),
        ("cat/2.png", (8, 30), "LA"),
        ("dog/1.png", (12, 12), "RGB"),
    ):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(
            tmp_path / "pets" / name, **({"exif": exif} if mode == "RGB" and "jpg" in name else {})
        )
    _, printed = make_shards(run_script, tmp_path / "pets", tmp_path / "mixed")
    assert "1 of 3 images are turned upright, as their EXIF tag says." in printed
    card = json.loads((tmp_path / "mixed" / "dataset.json").read_text())
    assert card["samples"] == {"train": 3}
    assert card["samples_per_class"] == {"train": {"cat": 2, "dog": 1}}
    assert card["image_size_median"] == [12, 12]
    assert (card["image_size_min"], card["image_size_max"]) == ([10, 8], [30, 20])
    assert card["image_modes"] == {"RGB": 2, "LA": 1}
    shutil.rmtree(tmp_path / "pets" / "cat")
    make_shards(run_script, tmp_path / "pets", tmp_path / "one-size", "--unlabelled")
    card = json.loads((tmp_path / "one-size" / "dataset.json").read_text())
    assert card["image_size"] == [12, 12]
    assert "image_size_median" not in card


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


def test_csv_and_json_lines(run_script, tmp_path):
    for number in range(3):
        save_image(tmp_path / "images" / f"{number}.png")
    (tmp_path / "list.csv").write_text(
        'path,caption,class\nimages/0.png,"red, square",1\nimages/1.png,,0\n'
        "images/9.png,gone,1\nimages/0.png,again,\n"
    )
    samples, printed = make_shards(run_script, tmp_path / "list.csv", tmp_path / "csv")
    assert samples["images_0"].files["txt"] == b"red, square"
    assert [samples[key].files["cls"] for key in ("images_0", "images_1")] == [b"1", b"0"]
    assert "missing or unreadable file" in printed
    assert "skipped: listed before" in printed
    lines = [
        {"path": "images/0.png", "captions": {"en": "red", "de": "rot"}},
        {"path": "images/1.png", "caption": "red", "class": "warm"},
        {"path": "images/2.png"},
        {"path": 7, "caption": "x"},
        ["images/2.png"],
    ]
    (tmp_path / "list.jsonl").write_text("\n".join([*map(json.dumps, lines), "{broken"]))
    samples, printed = make_shards(run_script, tmp_path / "list.jsonl", tmp_path / "jsonl")
    assert json.loads(samples["images_0"].files["json"]) == {"captions": {"en": "red", "de": "rot"}}
    assert samples["images_1"].files["cls"] == b"0"
    assert "neither caption nor class" in printed
    assert "line is not a JSON object" in printed


def test_headers_may_have_capitals_and_spaces_and_other_columns_are_named(run_script, tmp_path):
    for number in range(3):
        save_image(tmp_path / f"{number}.png")
    (tmp_path / "list.csv").write_text(
        "Path, CLASS , Split,Width,\n0.png, cafe\u0301 ,train,8,\n1.png,caf\u00e9,train,8,\n"
        '2.png, "dog, small",Test,8,\n'
    )
    done = run_script("pipelines/make_shards.py", tmp_path / "list.csv", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["classes"] == ["caf\u00e9", "dog, small"]
    assert card["samples"] == {"train": 2, "test": 1}
    assert "Ignored columns: width." in done.stdout


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "x", "groups": "a"}, "list.jsonl:1: unknown column groups: did you mean group?"),
        ({"caption": "x", "fold": "a"}, "list.jsonl:1: unknown column fold: did you mean split?"),
        ({"label": "cat"}, "list.jsonl:1: unknown column label: did you mean class?"),
        ({"class": ["cat"]}, "list.jsonl:1: expected text or a number as class, got ['cat']"),
        ({"class": True}, "list.jsonl:1: expected text or a number as class, got True"),
    ],
)
def test_misspelt_columns_and_classes_of_another_kind_are_refused(run_script, tmp_path, row, message):
    save_image(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.png", **row}))
    done = run_script("pipelines/make_shards.py", tmp_path / "list.jsonl", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr


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
    ("name", "content", "message"),
    [
        ("nowhere", None, "does not exist; give a folder of images, a .csv or a .jsonl"),
        ("empty", "folder", "holds no images"),
        ("list.xls", "x", "expected a folder, a .csv or a .jsonl, got .*list.xls"),
        (
            "list.csv",
            "file,text\na.png,b\n",
            "expected the columns path and caption or class .*, got file, text",
        ),
        ("list.jsonl", "[]\n", "nothing usable in .*: 1 x line is not a JSON object"),
        (
            "one.csv",
            "path,class\na.png,cat\nb.png,cat\n",
            "has only one class, 'cat'",
        ),
        (
            "gaps.csv",
            "path,class\na.png,0\nb.png,3\n",
            "classes up to 3, but class 1 has no image",
        ),
        ("from-1.csv", "path,class\na.png,1\nb.png,2\n", "classes up to 2, but class 0 has no image"),
        ("gone.jsonl", '{"path": "gone.png", "caption": "x"}\n', "no image of .* could be used: 1 x missing"),
    ],
)
def test_unusable_source_is_an_error_with_exit_code_2(run_script, tmp_path, name, content, message):
    source = tmp_path / name
    if content == "folder":
        source.mkdir()
    elif content:
        source.write_text(content)
    done = run_script("pipelines/make_shards.py", source, tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_shards_of_another_source_are_not_replaced(run_script, tmp_path, monkeypatch):
    for name in ("photos", "others"):
        save_image(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(f"one of {name}")
    out = tmp_path / "shards"
    make_shards(run_script, tmp_path / "photos", out)
    refused = run_script("pipelines/make_shards.py", tmp_path / "others", out)
    assert refused.returncode == 2
    assert f"{out} holds shards made from {tmp_path / 'photos'}; those of" in refused.stderr
    assert read_split(out, "train")["a"].files["txt"] == b"one of photos"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/a.txt").write_text("told anew")
    samples, _ = make_shards(run_script, Path("photos"), out)  # the same source, named in another way
    assert samples["a"].files["txt"] == b"told anew"


# Splits and groups


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
        "pipelines/make_shards.py", tmp_path / "pets", tmp_path / "out", "--held-out-share", 0.5
    )
    assert "2 held-out images of its own; leave --held-out-share out" in refused.stderr


def test_a_class_may_be_called_train_but_splits_beside_other_folders_are_refused(run_script, tmp_path):
    for folder in ("train", "car"):
        save_image(tmp_path / "vehicles" / folder / "1.png")
    _, printed = make_shards(run_script, tmp_path / "vehicles", tmp_path / "out")
    assert "The folder train is not taken for a split, as there are others beside it: car." in printed
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["classes"] == ["car", "train"]
    save_image(tmp_path / "vehicles" / "test" / "1.png")
    done = run_script("pipelines/make_shards.py", tmp_path / "vehicles", tmp_path / "out")
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


# Captions


def test_lines_of_a_text_file_are_languages_or_only_the_first_is_used(run_script, tmp_path):
    texts = {
        "apple": "An apple.\naf.utf8='n Appel.\nca@valencia.utf8=Una poma.\npt_BR.utf8=Uma maçã.\nzu.utf8=\n",
        "poem": "\n  Roses are red,\nviolets are blue.\n",
        "plain": "a pear",
    }
    for name, text in texts.items():
        save_image(tmp_path / "stamps" / f"{name}.png")
        (tmp_path / "stamps" / f"{name}.txt").write_text(text, encoding="utf-8")
    samples, printed = make_shards(run_script, tmp_path / "stamps", tmp_path / "out")
    assert samples["apple"].files["txt"] == b"An apple."
    assert json.loads(samples["apple"].files["json"])["captions"] == {
        "en": "An apple.", "af": "'n Appel.", "ca@valencia": "Una poma.", "pt_BR": "Uma maçã.",
    }  # fmt: skip
    assert samples["poem"].files["txt"] == b"Roses are red,"
    assert "json" not in samples["poem"].files.keys() | samples["plain"].files.keys()
    told = " ".join(re.sub("[│─┼]", " ", printed).split())
    assert "of these: captions in several languages 1 apple.png (4)" in told
    assert "only the first line of the .txt is used" in told
    samples, printed = make_shards(
        run_script, tmp_path / "stamps", tmp_path / "all", "--caption-lines", "all"
    )
    assert samples["poem"].files["txt"] == b"Roses are red, violets are blue."
    assert samples["apple"].files["txt"] == b"An apple."
    assert "only the first line" not in printed


def test_the_first_line_of_a_text_file_may_name_its_language_too(run_script, tmp_path):
    for name, text in (("egg", "en.utf8=An egg\nde.utf8=Ein Ei\n"), ("nut", "de.utf8=Eine Nuss\n")):
        save_image(tmp_path / "stamps" / f"{name}.png")
        (tmp_path / "stamps" / f"{name}.txt").write_text(text)
    samples, _ = make_shards(run_script, tmp_path / "stamps", tmp_path / "out")
    assert samples["egg"].files["txt"] == b"An egg"
    assert json.loads(samples["egg"].files["json"])["captions"] == {"en": "An egg", "de": "Ein Ei"}
    assert samples["nut"].files["txt"] == b"Eine Nuss"
    assert json.loads(samples["nut"].files["json"])["captions"] == {"de": "Eine Nuss"}


def test_long_captions_are_counted_and_the_longest_is_named(run_script, tmp_path):
    for name, length in (("a", 128), ("b", 129), ("c", 999), ("d", 5)):
        save_image(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text("x" * length)
    _, printed = make_shards(run_script, tmp_path / "photos", tmp_path / "out")
    told = " ".join(printed.split())
    assert "50.0% of the captions are longer than 128 characters, the longest has 999 (c.png)." in told


# Files


def test_extensions_in_upper_case_and_two_formats_of_one_image(run_script, tmp_path):
    save_image(tmp_path / "photos" / "A.JPG")
    (tmp_path / "photos" / "A.TXT").write_text("upper")
    for name in ("b.jpg", "b.png", "b.gif"):
        save_image(tmp_path / "photos" / name)
    (tmp_path / "photos" / "b.txt").write_text("twice")
    (tmp_path / "photos" / "c.svg").write_text("<svg/>")
    (tmp_path / "photos" / "b.svg").write_text("<svg/>")  # there is an image of it
    (tmp_path / "photos" / "d.HEIC").write_text("a phone's")
    samples, printed = make_shards(run_script, tmp_path / "photos", tmp_path / "out")
    assert {key: sorted(sample.files) for key, sample in samples.items()} == {
        "A": ["jpg", "txt"],
        "b": ["png", "txt"],
    }
    told = " ".join(printed.replace("│", " ").split())
    assert "another format of the same image 2 b.jpg (b.png is used), b.gif (b.png is used)" in told
    assert "Skipped 1 .svg: render them to PNG first, e.g. with resvg." in told
    assert "Skipped 1 .heic: convert them to JPEG or PNG first." in told
    assert "skipped: .heic files 1 d.HEIC" in told


def test_a_folder_of_nothing_but_drawings_says_what_to_do(run_script, tmp_path):
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "a.svg").write_text("<svg/>")
    done = run_script("pipelines/make_shards.py", tmp_path / "icons", tmp_path / "out")
    assert done.returncode == 2
    assert (
        "holds no images (png, tif, tiff, bmp, webp, jpg, jpeg, gif). Skipped 1 .svg: render" in done.stderr
    )


def test_keys_are_relative_readable_and_unlike(run_script, tmp_path):
    paths = [
        "list/a.png",
        "elsewhere/x/b.png",
        "elsewhere/y/b.png",
        "elsewhere/y/😀.png",
        "elsewhere/y/😁.png",
    ]
    for path in paths:
        save_image(tmp_path / path)
    lines = ["a.png", *(str(tmp_path / path) for path in paths[1:]), str(tmp_path / paths[0])]
    (tmp_path / "list" / "list.csv").write_text("\n".join(["path,caption", *(f"{line},x" for line in lines)]))
    samples, printed = make_shards(run_script, tmp_path / "list" / "list.csv", tmp_path / "out")
    assert sorted(samples) == ["a", "x_b", "y", "y-2", "y_b"]
    assert "skipped: listed before" in printed


def test_hostile_files_and_lists_are_counted(run_script, tmp_path):
    source = tmp_path / "source"
    save_image(source / "good.png")
    save_image(source / "2.png")
    os.mkfifo(source / "pipe.png")
    (source / "device.png").symlink_to("/dev/zero")
    (source / "gone.png").symlink_to("nowhere")
    save_image(source / "._of-a-mac.png")
    save_image(source / ".trash" / "old.png")
    (source / "linked").symlink_to(source / ".trash")
    save_image(source / os.fsdecode(b"caf\xe9") / "1.png")
    samples, printed = make_shards(run_script, source, tmp_path / "out", "--unlabelled")
    assert sorted(samples) == ["2", "caf_1", "good"]
    told = " ".join(printed.replace("│", " ").split())
    assert "skipped: not an ordinary file 2" in told
    assert "skipped: link to a folder, not followed 1" in told
    assert "skipped: missing or unreadable file 1 gone.png" in told
    lines = [
        json.dumps({"path": "good.png", "caption": "a" * 200_000}),
        json.dumps({"path": "nul\0.png", "caption": "x"}),
        json.dumps({"path": "half\ud800.png", "caption": "x"}),
        json.dumps({"path": "2.png", "caption": "half\ud800"}),
        json.dumps({"path": "/", "caption": "x"}),
        '{"path": "2.png", "caption": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ]
    (source / "list.JSONL").write_text("\n".join(lines))
    samples, printed = make_shards(run_script, source / "list.JSONL", tmp_path / "jsonl")
    assert list(samples) == ["good"]
    told = " ".join(printed.replace("│", " ").split())
    assert "skipped: text with a lone surrogate 2" in told
    assert "skipped: line is not a JSON object 2" in told
    assert "skipped: missing or unreadable file 1" in told
    assert "skipped: no path 1" in told
    (source / "list.csv").write_text(f"path,caption\ngood.png,{'a' * 200_000}\n\0.png,x\n2.png,y\n")
    samples, _ = make_shards(run_script, source / "list.csv", tmp_path / "csv")
    assert sorted(samples) == ["2", "good"]


# Shapes


def test_what_is_not_square_is_mentioned_cropped_or_padded(run_script, tmp_path):
    tall = Image.new("RGB", (10, 30), "red")
    tall.paste("blue", (0, 0, 10, 10))  # a head
    (tmp_path / "photos").mkdir()
    tall.save(tmp_path / "photos" / "tall.png")
    Image.new("RGBA", (12, 12)).save(tmp_path / "photos" / "square.png")
    shapes, told = {}, {}
    for name, options in {
        "as-is": (),
        "crop": ("--fit", "crop", "--size", 15),
        "pad": ("--fit", "pad", "--size", 15, "--pad-colour", "#00ff00"),
        "pad-only": ("--fit", "pad"),
    }.items():
        out = tmp_path / name
        samples, printed = make_shards(run_script, tmp_path / "photos", out, "--unlabelled", *options)
        told[name] = " ".join(printed.split())
        shapes[name] = decode_image(samples["tall"].files["png"])
        assert "1 of 2 images have transparency; models see them on white." in told[name]
    assert shapes["as-is"].shape == (30, 10, 3)
    assert "1 of 2 images are not square; training crops them" in told["as-is"]
    assert shapes["crop"].shape == (15, 15, 3)
    assert shapes["crop"][:, :, 2].max() < 128  # beheaded
    assert "1 of 2 images were cropped to 15x15; --fit pad keeps all of them." in told["crop"]
    assert shapes["pad"].shape == (15, 15, 3)
    assert shapes["pad"][1, 7].tolist() == [0, 0, 255]
    assert shapes["pad"][7, 1].tolist() == [0, 255, 0]
    assert "1 of 2 images were padded with #00ff00 to 15x15." in told["pad"]
    assert json.loads((tmp_path / "pad" / "dataset.json").read_text())["image_fit"] == "pad"
    assert shapes["pad-only"].shape == (30, 30, 3)
    assert shapes["pad-only"][5, 15].tolist() == [0, 0, 255]
    for options, message in (
        (("--pad-colour", "whiite"), "--pad-colour: expected a colour such as white or #8090ff, got whiite"),
        (("--size", 8, "--max-side", 8), "--max-side: expected 1 or more, and no --size beside it"),
        (("--fit", "squeeze"), "squeeze"),
        (("--held-out-share", 1), "--held-out-share: expected a number from 0 to below 1, got 1.0"),
    ):
        done = run_script("pipelines/make_shards.py", tmp_path / "photos", tmp_path / "x", *options)
        assert done.returncode == 2
        assert message in done.stderr
