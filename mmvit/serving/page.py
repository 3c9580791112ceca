"""The page: fields and buttons (Gradio) for what `Studio` does."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: nothing is sent anywhere

import gradio as gr
from PIL import Image

from mmvit.data.images import FORMATS
from mmvit.errors import UserError
from mmvit.serving.studio import MOST_CHARACTERS, MOST_IMAGES, MOST_PIXELS, Code, Studio, check_size

AT_ONCE = 8  # requests that run side by side, so that a long one does not hold up a short one
IMAGES = 4  # at first
MOST_LAYERS = 4
SIDE = 512  # of the canvas for painting, in pixels
EXAMPLES = (
    "red apple", "woman astronaut dark skin tone", "thumbs up medium skin tone", "rocket", "dog face",
    "赤リンゴ", "roter Apfel", "manzana roja", "красное яблоко", "사과",
)  # fmt: skip
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # the system's own
STYLE = "footer { display: none !important }"
Fields = dict[str, gr.components.Component]


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio: a tab for everything that its models can do."""
    with gr.Blocks(title="mmvit", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# mmvit")
        if studio.generator is not None:
            for name, tab in (("Draw", draw_tab), ("Mix", mix_tab), ("Edit", edit_tab)):
                with gr.Tab(name):
                    tab(studio)
        with gr.Tab("Describe"):
            describe_tab(studio)
    return page.queue(default_concurrency_limit=AT_ONCE)


def launch(page: gr.Blocks, host: str, port: int, share: bool = False, **more: Any) -> Any:
    """Serves the page until the process ends; with `prevent_thread_lock=True`, in the background."""
    return page.launch(
        server_name=host, server_port=port, share=share, theme=gr.themes.Default(**FONTS), css=STYLE,
        quiet=True, ssr_mode=False, max_file_size="20mb", **more,
    )  # fmt: skip


def draw_tab(studio: Studio) -> None:
    caption = gr.Textbox(EXAMPLES[0], label="Caption", max_length=MOST_CHARACTERS, elem_id="draw-caption")
    gr.Examples([[example] for example in EXAMPLES], caption, label="Examples")
    fields, button = (
        setting_fields(studio, "draw"),
        gr.Button("Draw", variant="primary", elem_id="draw-button"),
    )

    def draw(caption: str | None, settings: dict[str, Any]) -> Iterator[tuple]:
        caption = caption or ""
        yield from shown(studio.draw({caption: 1}, **settings), studio.draw_code({caption: 1}, **settings))

    connect(draw, (button.click, caption.submit), [caption], fields, image_fields("draw"))


def mix_tab(studio: Studio) -> None:
    gr.Markdown("Each caption pulls the image towards itself by its weight.")
    captions = []
    for i, (example, weight) in enumerate(zip(("red apple", "green pear", ""), (0.5, 0.5, 0), strict=True)):
        with gr.Row():
            captions += [
                gr.Textbox(example, label=f"Caption {i + 1}", scale=3, elem_id=f"mix-caption-{i}"),
                gr.Slider(0, 1, weight, step=0.05, label="Weight", elem_id=f"mix-weight-{i}"),
            ]
    fields, button = setting_fields(studio, "mix"), gr.Button("Draw", variant="primary", elem_id="mix-button")

    def mix(*values: Any) -> Iterator[tuple]:
        *captions, settings = values
        weights: dict[str, float] = defaultdict(float)
        for caption, weight in zip(captions[::2], captions[1::2], strict=True):
            weights[(caption or "").strip()] += weight or 0
        yield from shown(studio.draw(weights, **settings), studio.draw_code(weights, **settings))

    connect(mix, (button.click,), captions, fields, image_fields("mix"))


def edit_tab(studio: Studio) -> None:
    gr.Markdown("Upload an image, paint over what should be drawn again, and say what the whole shows.")
    canvas = gr.ImageEditor(
        label="Image", type="pil", sources=["upload", "clipboard"], layers=False, canvas_size=(SIDE, SIDE),
        brush=gr.Brush(default_size=24, colors=["#ff4081"], color_mode="fixed"), transforms=(),
        elem_id="edit-canvas",
    )  # fmt: skip
    canvas.convert_and_format_image = opened
    caption = gr.Textbox("green pear", label="Caption", max_length=MOST_CHARACTERS, elem_id="edit-caption")
    fields, button = (
        setting_fields(studio, "edit"),
        gr.Button("Redraw", variant="primary", elem_id="edit-button"),
    )

    def edit(
        painted: dict[str, Any] | None, caption: str | None, settings: dict[str, Any]
    ) -> Iterator[tuple]:
        caption = caption or ""
        image, mask = image_and_mask(painted)
        yield from shown(studio.edit(image, mask, caption, **settings), studio.edit_code(caption, **settings))

    connect(edit, (button.click,), [canvas, caption], fields, image_fields("edit"))


def describe_tab(studio: Studio) -> None:
    image = gr.Image(label="Image", type="pil", sources=["upload", "clipboard"], elem_id="describe-image")
    image.preprocess = opened
    captions = gr.Textbox(
        "\n".join(EXAMPLES[:5]), label="Captions to choose from, one per line", lines=5,
        visible=studio.generator is not None, elem_id="describe-captions",
    )  # fmt: skip
    button = gr.Button("Describe", variant="primary", elem_id="describe-button")
    found = [
        gr.Textbox(
            label="Best captions", lines=5, visible=studio.generator is not None, elem_id="describe-caption"
        ),
        gr.Label(label="Class", visible=studio.classifier is not None, elem_id="describe-class"),
    ]

    def describe(image: Image.Image | None, captions: str) -> Iterator[tuple]:
        found, classes = studio.describe(image, (captions or "").splitlines())
        lines = [f"{caption}   ({nats:.0f} nats behind)" for caption, nats in found[1:]]
        yield "\n".join([*(caption for caption, _ in found[:1]), *lines]), classes, *studio.describe_code()

    outputs = [*found, *code_fields("describe")]
    button.click(on_page(describe), [image, captions], outputs, api_name="describe", concurrency_id="all")


def setting_fields(studio: Studio, tab: str) -> Fields:
    """The fields of a tab's settings, which begin with the model's own."""
    how = studio.generator.defaults
    with gr.Row():
        number = gr.Slider(1, MOST_IMAGES, IMAGES, step=1, label="Images", elem_id=f"{tab}-number")
        guidance = gr.Slider(0, 10, how.guidance_scale, step=0.1, label="Guidance scale")
        temperature = gr.Slider(0, 2, how.temperature, step=0.05, label="Temperature")
    with gr.Row():
        fields = {"number": number, "guidance_scale": guidance, "temperature": temperature}
        if studio.draws_in_any_order:
            places = studio.generator.transformer.config.num_codes
            fields["num_steps"] = gr.Slider(1, places, studio.steps, step=1, label="Steps")
        fields["seed"] = gr.Number(0, label="Seed", precision=0)
        fields["negative"] = gr.Textbox(label="Negative caption", elem_id=f"{tab}-negative")
    return fields


def image_fields(tab: str) -> list[gr.components.Component]:
    images = gr.Gallery(
        label="Images", columns=4, format="png", object_fit="contain", elem_id=f"{tab}-images"
    )
    return [images, *code_fields(tab)]


def code_fields(tab: str) -> list[gr.components.Component]:
    with gr.Accordion("The same in Python and as a command", open=False):
        python = gr.Code(language="python", label="Python", elem_id=f"{tab}-python")
        return [python, gr.Code(language="shell", label="Command", elem_id=f"{tab}-command")]


def connect(
    action: Callable, events: tuple[Callable, ...], inputs: list, fields: Fields, outputs: list
) -> None:
    """Makes events run an action of the inputs' values and the settings."""

    def with_settings(*values: Any) -> Iterator[tuple]:
        own, settings = values[: len(inputs)], dict(zip(fields, values[len(inputs) :], strict=True))
        settings["number"] = settings["number"] or IMAGES  # of a field that was cleared
        yield from action(*own, settings)

    for number, event in enumerate(events):
        seen = {"api_visibility": "private"} if number else {"api_name": action.__name__}
        event(on_page(with_settings), [*inputs, *fields.values()], outputs, concurrency_id="all", **seen)


def shown(images: Iterator[list[Image.Image]], code: Code) -> Iterator[tuple]:
    """What the fields of `image_fields` show, step by step."""
    for drawn in images:
        yield drawn, *code


@contextmanager
def told_on_page() -> Iterator[None]:
    """User errors appear on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def on_page(action: Callable[..., Iterator[tuple]]) -> Callable[..., Iterator[tuple]]:
    """An action whose user errors appear on the page."""

    @wraps(action)
    def safely(*values: Any) -> Iterator[tuple]:
        with told_on_page():
            yield from action(*values)

    return safely


@told_on_page()
def opened(file: Any, **how: Any) -> Image.Image | None:
    """The image in a component's file, which has a `path` or is bytes; None without one.

    It stands in for Gradio's own reading, which opens any format, forgets transparency, and says no more than
    "Error" of a file that is not an image.
    """
    data = file if isinstance(file, bytes) else file and file.path and Path(file.path).read_bytes()
    if data is None:
        return None
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        check_size(image)
        image.load()
    except UserError:
        raise
    except Exception:  # Pillow raises all kinds
        raise UserError(
            "this file is not an image, or a damaged one: expected "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} of at most {MOST_PIXELS:,} pixels"
        ) from None
    return image


def image_and_mask(painted: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """What the canvas holds: the image below, and a mask that is white where something was painted.

    Raises:
        UserError: if there is no image.
    """
    image, layers = (painted or {}).get("background"), (painted or {}).get("layers") or []
    if image is None or not image.convert("RGBA").getbbox():
        raise UserError(
            "no image yet, or a file that is none: upload one, then paint over what should be drawn again"
        )
    if len(layers) > MOST_LAYERS:
        raise UserError(f"expected at most {MOST_LAYERS} layers of paint, got {len(layers)}")
    mask = Image.new("L", image.size)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(image.size)
        mask.paste(255, mask=alpha.point(lambda level: 255 * (level > 0)))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"), mask
