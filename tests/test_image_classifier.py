"""A trained classifier names images, from Python and by the command, with the class names of its data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmvit import ImageClassifier
from mmvit.core.transformer import TransformerConfig
from mmvit.data.images import decode_image, pixels_from_images, to_unit_range
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.resnet import ResNet, ResNetConfig
from mmvit.streams.shards import read_shard

NAMES = ["red thing", "green thing", "blue thing", "white thing"]
MODEL = ClassifierConfig(
    image_size=16, patch_size=8, num_classes=4, core=TransformerConfig(width=16, depth=1, num_heads=2)
)


@pytest.fixture(scope="module")
def named_shards(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("named") / "data"
    shutil.copytree(tiny_shards, folder)
    (folder / "dataset.json").write_text(json.dumps({"classes": NAMES}))
    return folder


@pytest.fixture(scope="module")
def photos(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for sample in read_shard(tiny_shards / "held-out-000000.tar"):
        (folder / f"{sample.key}.png").write_bytes(sample.files["png"])
    return folder


def new_model(config: ClassifierConfig = MODEL) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_images_get_the_classes_of_the_logits(photos):
    classifier = ImageClassifier(new_model(), NAMES)
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    expected = classifier.model(pixels_from_images(images, 16, 16)).softmax(-1)
    for batch_size in (64, 3):
        found = classifier.classify(images, top=2, batch_size=batch_size)
        for row, shares in zip(found, expected, strict=True):
            best = shares.topk(2)
            assert [name for name, _ in row] == [NAMES[place] for place in best.indices]
            assert [share for _, share in row] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert len(classifier.classify(images[:1], top=9)[0]) == 4
    assert classifier.features(images).shape == (8, 16)
    grey = ImageClassifier(new_model(MODEL.model_copy(update={"channels": 1})))
    assert grey.classes == ["0", "1", "2", "3"]
    assert grey.logits([Image.new("L", (40, 20))]).shape == (1, 4)


def test_images_are_cropped_or_padded(run_script, tmp_path):
    tall = Image.new("RGB", (16, 48), "red")
    tall.paste("blue", (0, 0, 16, 16))
    tall.save(tmp_path / "tall.png")
    classifier, printed = ImageClassifier(new_model(), NAMES), {}
    classifier.save_pretrained(tmp_path / "model")
    for fit in ("crop", "pad"):
        expected = classifier.model(pixels_from_images([tall], 16, 16, fit))
        torch.testing.assert_close(classifier.logits([tall], fit=fit), expected)
        ran = run_script(
            "pipelines/classify_images.py", tmp_path / "model", tmp_path / "tall.png", "--fit", fit
        )
        name, share = classifier.classify([tall], fit=fit)[0][0]
        assert f"tall.png: {name} {share:.1%}, " in ran.stdout
        printed[fit] = ran.stdout
    assert printed["crop"] != printed["pad"]


def test_images_of_every_mode_are_read_as_those_of_files(tmp_path):
    draw = torch.Generator().manual_seed(0)
    levels = torch.randint(65536, (24, 20), generator=draw, dtype=torch.int32).numpy().astype(np.uint16)
    alpha = torch.randint(256, (24, 20, 4), generator=draw, dtype=torch.uint8).numpy()
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    for name, image in (
        ("deep", Image.fromarray(levels)),
        ("through", Image.fromarray(alpha)),
        ("turned", Image.fromarray(alpha[..., :3])),
    ):
        path = tmp_path / f"{name}.png"
        image.save(path, exif=turned if name == "turned" else None)
        expected = to_unit_range(decode_image(path.read_bytes(), (16, 16)))
        found = pixels_from_images([Image.open(path)], 16, 16)[0]
        assert np.array_equal(found.numpy(), expected), name


def test_names_are_kept_beside_the_weights(tmp_path):
    ImageClassifier(new_model(), NAMES).save_pretrained(tmp_path / "named")
    assert ImageClassifier.from_pretrained(tmp_path / "named").classes == NAMES
    assert ImageClassifier.from_pretrained(new_model().save_pretrained(tmp_path / "plain")).named is False
    resnet = ResNet(ResNetConfig(image_size=16, num_classes=4, width=32, depths=(1,), root="small"))
    torch.nn.init.normal_(resnet.head.weight)
    ImageClassifier(resnet, NAMES).save_pretrained(tmp_path / "resnet")
    found = ImageClassifier.from_pretrained(tmp_path / "resnet").classify([Image.new("RGB", (16, 16))])
    assert {name for name, _ in found[0]} == set(NAMES)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="expected 4 names for a classifier of 4 classes, got 3"):
        ImageClassifier(new_model(), NAMES[:3])
    classifier = ImageClassifier(new_model())
    with pytest.raises(UserError, match="no images to classify"):
        classifier.classify([])
    with pytest.raises(UserError, match=r"expected a list of images, got a single one: write \[image\]"):
        classifier.classify(Image.new("RGB", (16, 16)))
    with pytest.raises(UserError, match="image 0: expected a Pillow image, got str"):
        classifier.classify(["photo.png"])
    with pytest.raises(UserError, match="image 0: its pixels are floating-point numbers of unknown range"):
        classifier.classify([Image.new("F", (16, 16))])
    pretrained = ImageClassifier(Classifier(MODEL))
    with pytest.raises(UserError, match="has not learnt classes: its head is all zeros"):
        pretrained.classify([Image.new("RGB", (16, 16))])
    assert pretrained.features([Image.new("RGB", (16, 16))]).shape == (1, 16)
    with pytest.raises(UserError, match="top must be at least 1, got 0"):
        classifier.classify([Image.new("RGB", (16, 16))], top=0)
    new_model().save_pretrained(tmp_path)
    for text, words in (("{", "is not valid JSON"), ('{"a": 1}', "is not a list of names")):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(UserError, match=words):
            ImageClassifier.from_pretrained(tmp_path)


def test_a_run_knows_its_classes_and_names_photos(named_shards, photos, run_script, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
output = "{tmp_path}/run"
data = {{train = "{named_shards}/train-*.tar", held_out = "{named_shards}/held-out-*.tar"}}
model = {{image_size = 16, patch_size = 8, num_classes = 4, core = {{width = 16, depth = 1, num_heads = 2}}}}
train = {{steps = 60, batch_size = 16, num_workers = 0}}
optimizer = {{lr = 1e-2, warmup_steps = 5}}
"""
    )
    ran = run_script("pipelines/train_classifier.py", config)
    assert ran.returncode == 0, ran.stderr
    ran = run_script("pipelines/classify_images.py", tmp_path / "run", photos, "--top", 2)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 8
    for number, line in enumerate(lines):
        path, _, said = line.partition(": ")
        assert path == str(photos / f"held-out-{number:03d}.png")
        assert said.startswith(f"{NAMES[number % 4]} ")
        assert said.count("%") == 2
    (photos.parent / "empty").mkdir(exist_ok=True)
    for wrong, words in (
        (photos.parent / "empty", "holds no images (jpg, png, webp, jpeg, gif"),
        (config, "1 of 1 images could not be read: "),
        (tmp_path / "none.png", "No such file"),
    ):
        ran = run_script("pipelines/classify_images.py", tmp_path / "run", wrong)
        assert ran.returncode == 2, ran.stdout
        assert words in ran.stderr
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    (mixed / "broken.png").write_bytes(b"no image")
    (mixed / "notes.txt").write_text("no image")
    ran = run_script("pipelines/classify_images.py", tmp_path / "run", mixed)
    assert ran.returncode == 2
    assert len(ran.stdout.splitlines()) == 8
    assert "skipped 1 other files" in ran.stderr
    assert "1 of 9 images could not be read: " in ran.stderr
    other = tmp_path / "other"
    shutil.copytree(named_shards, other)
    (other / "dataset.json").write_text(json.dumps({"classes": [NAMES[1], NAMES[0], *NAMES[2:]]}))
    arguments = (tmp_path / "run", other, "--split", "held-out", "--out", tmp_path / "sheet.png")
    ran = run_script("pipelines/evaluate.py", *arguments)
    assert ran.returncode == 2
    assert "class 0 is 'red thing' to the classifier and 'green thing' in" in ran.stderr
