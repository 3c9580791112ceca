"""Shards of one's own images: what is written reads back, held out by a rule, mistakes are said plainly."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmvit.data.images import decode_image
from mmvit.data.shards import Sample, expand_shards, read_shard


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
    make_shards(run_script, tmp_path / "pets", tmp_path / "mixed")
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
    assert "years has one class alone, '2'" in done.stderr


def test_a_class_of_which_no_image_can_be_read_is_refused(run_script, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        save_image(tmp_path / "pets" / name / "1.png")
    (tmp_path / "pets" / "dog" / "1.png").write_bytes(b"no picture")
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
    assert "duplicate key" in printed
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
        ("list.xls", "x", "is neither a folder nor a .csv nor a .jsonl"),
        ("list.csv", "file,text\na.png,b\n", "has no column `path`, but file, text"),
        ("list.jsonl", "[]\n", "nothing usable in .*: 1 x line is not a JSON object"),
        (
            "one.csv",
            "path,class\na.png,cat\nb.png,cat\n",
            "has one class alone, 'cat'",
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
    assert f"{out} holds data of {tmp_path / 'photos'}, which those of" in refused.stderr
    assert read_split(out, "train")["a"].files["txt"] == b"one of photos"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/a.txt").write_text("told anew")
    samples, _ = make_shards(run_script, Path("photos"), out)  # the same source, named in another way
    assert samples["a"].files["txt"] == b"told anew"
