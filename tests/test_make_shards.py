"""Shards of one's own images: what is written reads back, and mistakes are said plainly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from generator_scripts import refused
from PIL import Image
from shard_scripts import contents, make_shards, read_split, save_image

from mmvit.data.images import decode_image
from mmvit.data.sources import MOST_BYTES, read_file
from mmvit.data.writing import WholeShard
from mmvit.streams.shards import BadSample


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
    for name in ("lonely.txt", "sub/lonely.txt", "photo.txt"):
        (source / name).write_text("no image")
    (source / "photo.heic").touch()
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
    shown = " ".join(printed.replace("│", " ").split())
    assert "skipped: captions without an image 2 lonely.txt, sub/lonely.txt skipped:" in shown
    assert "skipped: .heic files 1 photo.heic" in shown


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
        (
            "commas.csv",
            "path,caption\na.png,red,,\nb.png,a red, round apple\n",
            r"commas.csv:3: expected 2 fields, as in the header, got 3; the last is 'round apple'. Put "
            "double quotes around a field that contains ','",
        ),
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


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(run_script, tmp_path):
    source, out, whole = (tmp_path / name for name in ("pets", "out", "whole"))
    for number in range(20):
        save_image(source / ("cat", "dog")[number % 2] / f"{number}.png", (10 + number, 12))
    (source / "cat" / "8.png").write_bytes(b"no image")
    options = ("--held-out-share", 0.3, "--samples-per-shard", 3, "--fit", "pad", "--workers")

    def run(folder: Path, workers: int):
        return run_script("pipelines/make_shards.py", source, folder, *options, workers)

    assert run(out, 0).returncode == 0
    before = contents(out)
    save_image(source / "dog" / "19.png", (8, 8), "blue")
    expected = run(whole, 2)
    assert expected.returncode == 0, expected.stderr

    def stop_at(number: int, signal_number: int):
        def publish(shard: WholeShard) -> None:
            if not next(left, None):
                os.kill(os.getpid(), signal_number)
            real(shard)

        left, real = iter([True] * number), WholeShard.publish
        return mock.patch.object(WholeShard, "publish", publish)

    with stop_at(2, signal.SIGTERM):
        ran = run(out, 0)
    assert ran.returncode == 130
    assert "interrupted: finished shards are kept" in ran.stderr
    assert {name: data for name, data in contents(out).items() if name[0] != "."} == before
    next((out / ".packed/records").iterdir()).write_text("{}")
    if (child := os.fork()) == 0:
        with stop_at(3, signal.SIGKILL):
            run(out, 0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with mock.patch("mmvit.data.packing.WholeShard", side_effect=WholeShard) as made:
        ran = run(out, 0)
    assert f"an interrupted run, which finished 4 of {4 + made.call_count} shards" in ran.stdout
    assert contents(out) == contents(whole)
    assert ran.stdout.partition("┏")[2] == expected.stdout.partition("┏")[2]  # the closing table


# Splits and groups


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


@pytest.mark.parametrize(
    ("target", "message"),
    [("list.jsonl", "does not exist"), ("/proc/self/mem", "cannot be read: Input/output error")],
)
def test_a_list_that_is_a_link_to_no_file_is_refused(run_script, tmp_path, target, message):
    (tmp_path / "list.jsonl").symlink_to(target)
    refused(run_script("pipelines/make_shards.py", tmp_path / "list.jsonl", tmp_path / "out"), message)


def test_hostile_shapes_of_folders_and_files_are_counted(run_script, tmp_path):
    source = tmp_path / "source"
    save_image(source / "good.png")
    save_image(source / "also.png")
    (source / "loop").symlink_to("loop")
    (source / "up").symlink_to("..")
    save_image(source / "long.png", (16_000, 1))
    Image.new("RGB", (70_000, 1)).save(source / "no-jpeg.webp", "PNG")
    Image.new("RGB", (8, 8)).save(source / "a-tiff.png", "TIFF")
    with (source / "endless.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    depth = sys.getrecursionlimit() + 100
    deepest = source / "/".join("d" * depth)
    subprocess.run(["mkdir", "-p", deepest], check=True)  # too deep for Python, and so for pytest to remove
    shutil.copy(source / "good.png", deepest / "deep.png")
    _, printed = make_shards(run_script, source, tmp_path / "shrunk", "--unlabelled", "--max-side", 66_000)
    assert "skipped: image that cannot be stored" in printed.replace("│", " ")
    (source / "no-jpeg.webp").unlink()
    samples, printed = make_shards(run_script, source, tmp_path / "out", "--unlabelled", "--fit", "pad")
    subprocess.run(["rm", "-r", source / "d"], check=True)
    assert sorted(key.removeprefix("d_" * depth) for key in samples) == ["also", "deep", "good"]
    told = " ".join(printed.replace("│", " ").split())
    for line in (
        "skipped: link to a folder, not followed 1",
        "skipped: too long to be padded 1",
        "skipped: undecodable image 1 a-tiff.png",
        "skipped: more than 268,435,456 bytes 1 endless.png",
    ):
        assert line in told


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_a_line_without_end_is_not_read_into_memory(run_script, tmp_path, name):
    save_image(tmp_path / "a.png")
    with (tmp_path / name).open("w") as file:
        file.write("path,caption\na.png,x\n")
        file.truncate(2**32)
    ended = run_script("pipelines/make_shards.py", tmp_path / name, tmp_path / "out")
    assert ended.returncode == 2
    assert ":3: expected a line of at most" in ended.stderr


def test_what_is_opened_is_checked_and_not_its_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadSample, match="not an ordinary file"), mock.patch.object(Path, "stat"):
        read_file(tmp_path / "pipe")  # put there after a look at its name


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
