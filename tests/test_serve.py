"""The page of `mmvit serve`: it shows what the shown code makes, and no request waits for another."""

import contextlib
import shlex
import socket
import sys
import time
from threading import Event
from unittest import mock

import numpy as np
import pytest
from generator_scripts import refused
from PIL import Image
from tiny_models import tiny_classifier, tiny_generator

from mmvit.data.images import encode_png
from mmvit.errors import UserError
from mmvit.places import load_script
from mmvit.sampling.editing import kept_codes
from mmvit.serving.studio import Studio


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Folders of a generator of any order, and of a classifier."""
    folder = tmp_path_factory.mktemp("models")
    tiny_generator(tokenizer).save_pretrained(folder / "generator")
    tiny_classifier("cat", "dog", "bear").save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def studio(models) -> Studio:
    return Studio.from_pretrained(str(models / "generator"), str(models / "classifier"))


def assert_equal(images, others) -> None:
    for image, other in zip(images, others, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))


SETTINGS = {
    "number": 2,
    "guidance_scale": 1.5,
    "temperature": 0.8,
    "num_steps": 3,
    "seed": 7.0,
    "negative": "pear",
}


@pytest.mark.parametrize("captions", [{" red apple ": 1.0}, {"red apple": 0.6, "pear": 0.4, "": 0.0}])
def test_the_shown_python_draws_the_images(studio, captions):
    *_, images = studio.draw(captions, **SETTINGS)
    names: dict = {}
    exec(studio.draw_code(captions, **SETTINGS).python, names)
    assert_equal(images, names["images"])


def test_the_shown_command_draws_the_images(studio, mmvit_command, tmp_path):
    *_, images = studio.draw({"red apple": 1.0}, **SETTINGS)
    command = studio.draw_code({"red apple": 1.0}, **SETTINGS).command
    with contextlib.chdir(tmp_path):
        ran = run_shell(mmvit_command, command)
        assert ran.returncode == 0, ran.stderr
        drawn = [Image.open(path) for path in sorted((tmp_path / "samples").iterdir())]
        assert_equal(images, drawn)
    assert studio.draw_code({"apple": 0.5, "pear": 0.5}, **SETTINGS).command == ""


def run_shell(mmvit_command, command: str):
    program, *arguments = shlex.split(command)
    assert program == "mmvit"
    return mmvit_command(*arguments)


def test_kept_codes_are_worked_out_once(studio, monkeypatch):
    count = mock.Mock(wraps=kept_codes)
    monkeypatch.setattr("mmvit.sampling.editing.kept_codes", count)
    monkeypatch.setattr("mmvit.serving.studio.kept_codes", count)
    [*studio.edit(Image.new("RGB", (24, 16)), Image.new("L", (24, 16), 255), "pear", **SETTINGS)]
    assert count.call_count == 1


def test_what_is_painted_over_is_drawn_again(studio, mmvit_command, tmp_path):
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    mask = Image.new("L", (24, 16))
    mask.paste(255, (8, 0, 16, 8))
    *_, images = studio.edit(image, mask, "pear", **SETTINGS)
    for each in images:
        changed = (np.asarray(each) != np.asarray(image)).any(-1)
        assert changed[:8, 8:16].any()
        assert not changed[:, 16:].any()
        assert not changed[8:].any()
    code = studio.edit_code("pear", **SETTINGS)
    names: dict = {}
    with contextlib.chdir(tmp_path):
        image.save("image.png")
        mask.save("mask.png")
        exec(code.python, names)
        ran = run_shell(mmvit_command, code.command)
        assert ran.returncode == 0, ran.stderr
        assert_equal(images, [Image.open(path) for path in sorted((tmp_path / "edited").iterdir())])
    assert_equal(images, names["images"])


def test_an_image_gets_its_caption_and_class(studio, tmp_path):
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    captions = ["red apple", "pear", "  ", "pear"]
    found, classes = studio.describe(image, captions)
    assert {caption for caption, _ in found} == {"red apple", "pear"}
    assert found[0][1] == 0 < found[1][1]
    assert {*classes} == {"cat", "dog", "bear"}
    names: dict = {}
    with contextlib.chdir(tmp_path):
        image.save("image.png")
        (tmp_path / "captions.txt").write_text("red apple\npear\n")
        exec(studio.describe_code().python, names)
    assert dict(names["classes"]) == classes
    assert names["best"] == found[0][0]


def test_mistakes_are_named(studio, models):
    image, thin = Image.new("RGB", (24, 16)), Image.new("L", (24, 16))
    thin.paste(255, (0, 0, 2, 16))
    for action, message in (
        (lambda: studio.draw({"a": 1.0}, 65), "images: expected 1 to 64, got 65"),
        (lambda: studio.draw({"a": 0.0, "b": 0.0}, 1), "all weights are 0"),
        (lambda: studio.draw({"a" * 3000: 1.0}, 1), "at most 2000 characters, got 3000"),
        (lambda: studio.edit(image, thin, "a", 1), "too little is painted over"),
        (lambda: studio.draw({"a": 1.0}, 1, temperature=-1), "temperature"),
        (lambda: studio.draw({"a": 1.0}, 1, seed=1.5), "seed"),
        (lambda: studio.draw({"a": 1.0}, 1, seed=10**400), "seed = 1000000000"),
        (lambda: studio.draw({"a": 1.0}, 1, negative="\ud800"), "is not valid UTF-8 text"),
        (lambda: studio.describe(image, ["\ud800"]), "is not valid UTF-8 text"),
        (lambda: studio.edit(image, Image.new("L", (24, 16)), "a", 1), "nothing is painted over"),
        (lambda: studio.describe(None, ["a"]), "no image yet"),
        (lambda: studio.describe(image, [" "]), "no captions to choose from"),
        (lambda: studio.describe(image, map(str, range(300))), "at most 200 captions, got 300"),
        (lambda: studio.describe(Image.new("L", (5000, 5000)), ["a"]), "pixels, got 5000x5000"),
        (lambda: Studio.from_pretrained(str(models / "generator" / "image_tokenizer")), "image_tokenizer"),
        (lambda: Studio.from_pretrained(str(models / "classifier"), "x"), "is a classifier already"),
    ):
        with pytest.raises(UserError, match=message):
            action()


def test_without_gradio_it_says_how_to_install_it(run_script):
    with mock.patch.dict(sys.modules, {"gradio": None, "mmvit.serving.page": None}):
        del sys.modules["mmvit.serving.page"]
        refused(run_script("pipelines/serve.py"), "the page needs Gradio", "mmvit[demo]")


@pytest.fixture(scope="module")
def served(studio):
    """The address of the studio's page."""
    page_module = pytest.importorskip("mmvit.serving.page", reason="Gradio is not installed")
    page = page_module.build_page(studio)
    port = load_script("pipelines/serve.py").free_port("127.0.0.1")
    _, address, _ = page_module.launch(page, "127.0.0.1", port, prevent_thread_lock=True)
    yield address
    page.close()


def client_of(address: str):
    from gradio_client import Client  # comes with Gradio, which need not be installed

    return Client(address, verbose=False, analytics_enabled=False)


ARGUMENTS = (1.5, 0.8, 3, 7, "")  # guidance, temperature, steps, seed, negative


def test_the_page_draws(served, studio):
    job = client_of(served).submit("red apple", 2, *ARGUMENTS, api_name="/draw")
    gallery, python, command = job.result(60)
    expected = studio.generator.generate(
        "red apple", 2, guidance_scale=1.5, temperature=0.8, num_steps=3, seed=7
    )
    assert_equal(expected, [Image.open(each["image"]) for each in gallery])
    assert "generator.generate('red apple'" in python
    assert command.startswith("mmvit sample 'red apple' --num 2")


def test_mistakes_are_answered_on_the_page(served):
    client = client_of(served)
    with pytest.raises(Exception, match=r"images: expected 1 to 64|greater than maximum"):
        client.predict("red apple", 65, *ARGUMENTS, api_name="/draw")
    with pytest.raises(Exception, match=r"no image yet: upload one"):
        client.predict(None, "a", api_name="/describe")
    assert len(client.predict("red apple", 1, *ARGUMENTS, api_name="/draw")[0]) == 1  # it goes on


def test_a_long_request_does_not_hold_up_a_short_one(served, studio, monkeypatch):
    draw, short_is_drawn = studio.draw, Event()

    def waiting(captions, number, **settings):
        for images in draw(captions, number, **settings):
            assert number != 3 or short_is_drawn.wait(60)
            yield images

    monkeypatch.setattr(studio, "draw", waiting)
    long = client_of(served).submit("red apple", 3, *ARGUMENTS, api_name="/draw")
    while long.status().code.name == "STARTING":
        time.sleep(0.05)
    client_of(served).predict("red apple", 1, *ARGUMENTS, api_name="/draw")
    assert not long.done()
    short_is_drawn.set()
    assert len(long.result(60)[0]) == 3


@pytest.mark.parametrize("share", [False, True])
def test_only_share_makes_a_link_and_only_host_opens_the_network(models, monkeypatch, share):
    page_module = pytest.importorskip("mmvit.serving.page", reason="Gradio is not installed")
    launch = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr("gradio.Blocks.launch", launch)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    serve = load_script("pipelines/serve.py").main
    with pytest.raises(InterruptedError):
        serve(str(models / "generator"), port=0, **({"share": True} if share else {}))
    assert launch.call_args.kwargs["share"] is share
    assert launch.call_args.kwargs["server_name"] == "127.0.0.1"
    assert page_module.launch.__defaults__ == (False,)


def test_equal_captions_of_a_mixture_are_one_with_the_sum_of_their_weights(served, studio, monkeypatch):
    seen = []
    monkeypatch.setattr(studio, "draw", lambda captions, **more: seen.append({**captions}) or iter(()))
    client_of(served).predict("a", 0.25, "a ", 0.5, "", 0, 1, *ARGUMENTS, api_name="/mix")
    assert seen == [{"a": 0.75, "": 0}]


def describe(address: str, path):
    from gradio_client import handle_file

    return client_of(address).predict(handle_file(path), "red apple\npear", api_name="/describe")


PNG = encode_png(Image.effect_noise((24, 16), 80))
NOT_AN_IMAGE = r"this file is not an image, or a damaged one: expected PNG, JPEG"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.png", b"not an image", NOT_AN_IMAGE),
        ("empty.png", b"", NOT_AN_IMAGE),
        ("truncated.png", PNG[: len(PNG) // 2], NOT_AN_IMAGE),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', NOT_AN_IMAGE),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", NOT_AN_IMAGE),
        ("large.png", encode_png(Image.new("1", (6000, 6000))), r"at most 16,777,216 pixels, got 6000x6000"),
        ("bomb.png", encode_png(Image.new("1", (20000, 20000))), r"of at most 16,777,216 pixels"),
    ],
)
def test_an_upload_that_cannot_be_read_is_named_on_the_page(served, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Exception, match=message):
        describe(served, tmp_path / name)


def test_an_upload_is_read_as_images_are_in_python(served, studio, tmp_path):
    """Transparent on white, and turned upright."""
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.png", exif=exif)
    found, classes, *_ = describe(served, tmp_path / "image.png")
    best, expected = studio.describe(Image.open(tmp_path / "image.png"), ["red apple", "pear"])
    assert found.startswith(best[0][0])
    assert {each["label"]: each["confidence"] for each in classes["confidences"]} == pytest.approx(expected)


def test_captions_that_look_like_options_are_shown_as_they_must_be_typed(studio):
    command = studio.draw_code({"--help": 1.0}, **SETTINGS).command
    assert command.endswith(" -- --help")


def test_hosts_and_ports_that_cannot_be_listened_on_are_named():
    free_port = load_script("pipelines/serve.py").free_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"choose another --port"):
            free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"cannot listen on nonsense.invalid.*choose another --host"):
        free_port("nonsense.invalid")
