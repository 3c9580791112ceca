"""The page of `mmvit serve` in headless Chromium, used as a person would."""

import io
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_classifier, tiny_generator

from mmvit.data.images import encode_png, images_from_pixels, pixels_from_images
from mmvit.places import load_script
from mmvit.sampling.generator import Generator
from mmvit.serving.studio import Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tokenizer, tmp_path_factory):
    """The open page of a generator of any order and a classifier, with its `studio` and `requests`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page_module = pytest.importorskip("mmvit.serving.page", reason="Gradio is not installed")
    folder = tiny_generator(tokenizer, grid=(4, 4)).save_pretrained(tmp_path_factory.mktemp("generator"))
    studio = Studio(Generator.from_pretrained(folder), tiny_classifier("cat", "dog"), str(folder))
    served = page_module.build_page(studio)
    port = load_script("pipelines/serve.py").free_port("127.0.0.1")
    _, address, _ = page_module.launch(served, "127.0.0.1", port, prevent_thread_lock=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        opened = browser.new_page(viewport={"width": 600, "height": 700})
        opened.studio, opened.requests = studio, []
        opened.on("request", lambda request: opened.requests.append(request.url))
        opened.goto(address)
        yield opened
        browser.close()
    served.close()


def images_in(page, gallery: str, number: int) -> list[Image.Image]:
    """The images that a gallery shows, when it has so many and nothing is drawn any more."""
    shown = page.locator(f"#{gallery} .thumbnail-item img")
    page.wait_for_function(
        "([id, number]) => document.querySelectorAll(`#${id} .thumbnail-item img`).length == number",
        arg=[gallery, number],
    )
    page.wait_for_function("document.querySelector('.generating, .progress-text') === null")
    page.wait_for_timeout(500)
    return [
        Image.open(io.BytesIO(page.request.get(each.get_attribute("src")).body())).convert("RGB")
        for each in shown.all()
    ]


def shown_code(page, tab: str, language: str) -> str:
    """The Python or the command that a tab shows."""
    if not page.is_visible(f"#{tab}-{language}"):
        page.click("text=The same in Python and as a command >> visible=true")
    return page.inner_text(f"#{tab}-{language} .cm-content")


def assert_error(page, text: str) -> None:
    page.wait_for_selector(f"text={text}")
    page.click(".toast-close")  # it would cover buttons for 10 seconds


def assert_drawn_by(python: str, images: list[Image.Image]) -> None:
    names: dict = {}
    exec(python, names)
    assert all(np.array_equal(*pair) for pair in zip(images, names["images"], strict=True))


def type_into(page, field: str, text: str) -> None:
    page.fill(f"#{field} textarea, #{field} input", text)


def test_a_caption_in_any_language_is_typed_and_drawn(page):
    """By the Python that is shown, with the command beside it."""
    type_into(page, "draw-caption", "grüne 梨")
    page.fill("#draw-number input[type=number]", "2")
    page.click("#draw-button")
    images = images_in(page, "draw-images", 2)
    assert all(image.size == (32, 32) for image in images)
    assert not np.array_equal(*map(np.asarray, images))
    assert_drawn_by(shown_code(page, "draw", "python"), images)
    assert "mmvit sample 'grüne 梨' --num 2" in shown_code(page, "draw", "command").replace("\n", " ")


def test_a_negative_caption_needs_guidance_which_the_page_says(page):
    type_into(page, "draw-negative", "pear")
    page.click("#draw-button")
    assert_error(page, "the negative caption 'pear' has no effect at guidance_scale 1")
    page.fill("input[aria-label='number input for Guidance scale'] >> visible=true", "3")
    page.fill("#draw-number input[type=number]", "1")
    page.click("#draw-button")
    images = images_in(page, "draw-images", 1)
    assert_drawn_by(shown_code(page, "draw", "python"), images)
    command = shown_code(page, "draw", "command").replace("\n", " ")
    assert "--guidance-scale 3" in command
    assert "--negative pear" in command


def test_captions_are_mixed_by_sliders(page):
    page.get_by_role("tab", name="Mix").click()
    slider = page.locator("#mix-weight-1 input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    page.fill("#mix-number input[type=number]", "1")
    page.click("#mix-button")
    images = images_in(page, "mix-images", 1)
    python = shown_code(page, "mix", "python")
    assert "{'red apple': 0.5, 'green pear': 0.6}" in python
    assert_drawn_by(python, images)


def test_an_uploaded_image_gets_its_caption_and_class(page, tmp_path):
    """After a file that is cut off, of which the page says so."""
    image = encode_png(Image.effect_noise((40, 30), 60))
    (tmp_path / "truncated.png").write_bytes(image[: len(image) // 2])
    (tmp_path / "image.png").write_bytes(image)
    page.get_by_role("tab", name="Describe").click()
    choose(page, tmp_path / "truncated.png")
    page.click("#describe-button")
    assert_error(page, "this file is not an image, or a damaged one: expected PNG")
    page.click("#describe-image [aria-label='Remove Image']")
    choose(page, tmp_path / "image.png")
    page.fill("#describe-captions textarea", "red apple\ngreen pear")
    page.click("#describe-button")
    page.wait_for_selector("#describe-class >> text=cat")
    found = page.input_value("#describe-caption textarea")
    assert "green pear" in found
    assert "nats behind" in found
    assert "dog" in page.inner_text("#describe-class")


def choose(page, path) -> None:
    """Uploads an image to be described, by the browser's file chooser."""
    with page.expect_file_chooser() as chooser:
        page.click("#describe-image [aria-label^='Drop an image file']")
    chooser.value.set_files(path)
    page.wait_for_selector(f"#describe-image img[src$='/{path.name}']", state="attached")


def test_what_is_painted_over_is_drawn_again(page, tmp_path):
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    image.save(tmp_path / "image.png")
    (image,) = images_from_pixels(pixels_from_images([image], 32, 32))
    page.get_by_role("tab", name="Edit").click()
    page.wait_for_selector("#edit-canvas canvas")
    (tmp_path / "text.png").write_text("not an image")
    page.set_input_files("#edit-canvas input[type=file]", tmp_path / "text.png")
    page.click("#edit-button")
    assert_error(page, "no image yet, or a file that is none: upload one")
    page.set_input_files("#edit-canvas input[type=file]", tmp_path / "image.png")
    page.wait_for_selector("#edit-canvas [title=Brush].highlight")  # it shows this one
    canvas = page.locator("#edit-canvas canvas").first
    canvas.hover()
    page.mouse.down()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 8, box["y"] + box["height"] / 2 + 8)
    page.mouse.up()
    page.fill("#edit-number input[type=number]", "1")
    page.click("#edit-button")
    (edited,) = images_in(page, "edit-images", 1)
    changed = (np.asarray(edited) != np.asarray(image)).any(-1)
    assert changed.any()
    assert not changed.all()


def test_nothing_comes_from_the_network(page):
    hosts = {urlsplit(url).hostname for url in page.requests if url.startswith("http")}
    assert hosts == {"127.0.0.1"}
