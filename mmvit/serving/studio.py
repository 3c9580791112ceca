"""What the page does, without the page: drawing, editing and describing images, each with the Python and the
command that do the same."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmvit.errors import UserError
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.hub import JOINT, SHIPPED, find_model_folder, read_description
from mmvit.models.registry import CLASSIFIERS
from mmvit.sampling.candidates import rank_captions
from mmvit.sampling.decoding import default_steps
from mmvit.sampling.editing import kept_codes
from mmvit.sampling.generator import Generator
from mmvit.sampling.streaming import WATCHED

MOST_IMAGES = 64  # in one request
MOST_PIXELS = 4096 * 4096  # of an uploaded image
MOST_CAPTIONS = 200  # that one image is compared with
MOST_CHARACTERS = 2000  # of a caption
BEST = 5  # captions or classes shown


class Code(NamedTuple):
    """The same thing without the page; a command of "" is one that does not exist."""

    python: str
    command: str


class Studio:
    """A generator, a classifier, or both.

    Args:
        model: the name that the shown code loads the generator by.
        classifier_name: the same of the classifier.
    """

    def __init__(
        self,
        generator: Generator | None = None,
        classifier: ImageClassifier | None = None,
        model: str = str(SHIPPED),
        classifier_name: str = "",
    ):
        self.generator, self.classifier = generator, classifier
        self.model, self.classifier_name = model, classifier_name

    @classmethod
    def from_pretrained(cls, model: str = str(SHIPPED), classifier: str | None = None) -> "Studio":
        """Loads a generator, a classifier or a joint model, which is both, and another `classifier`.

        Raises:
            UserError: for any other kind of model.
        """
        kind = read_description(find_model_folder(model))["kind"]
        is_classifier = kind in CLASSIFIERS
        if is_classifier and classifier:
            raise UserError(f"{model} is a classifier already: leave out --classifier")
        generator = None if is_classifier else Generator.from_pretrained(model)
        name = model if is_classifier or (kind == JOINT and not classifier) else classifier
        return cls(generator, ImageClassifier.from_pretrained(name) if name else None, model, name or "")

    @property
    def draws_in_any_order(self) -> bool:
        return self.generator is not None and self.generator.transformer.config.order == "any"

    @property
    def steps(self) -> int:
        """Those that the generator takes by itself."""
        return self.generator.defaults.num_steps or default_steps(self.generator.transformer.config.num_codes)

    def draw(
        self, captions: Mapping[str, float], number: int, negative: str = "", **settings: Any
    ) -> Iterator[list[Image.Image]]:
        """Images of a caption, or of a mixture by weight, again and again while they are drawn."""
        check_number(number)
        return self.generator.generate(
            prompt_of(captions),
            number,
            stream=True,
            share=WATCHED,
            **explicit(negative=negative, **settings),
        )

    def draw_code(
        self, captions: Mapping[str, float], number: int, negative: str = "", **settings: Any
    ) -> Code:
        prompt, more = prompt_of(captions), explicit(negative=negative, **settings)
        python = f"images = generator.generate({prompt!r}, {arguments({'num_images': number, **more})})"
        command = (
            "" if isinstance(prompt, dict) else shell("sample", prompt, num=number, **self.of_model(), **more)
        )
        return Code(f"{self.load_code()}\n{python}", command)

    def edit(
        self,
        image: Image.Image,
        mask: Image.Image,
        caption: str,
        number: int,
        negative: str = "",
        **settings: Any,
    ) -> Iterator[list[Image.Image]]:
        """Versions of an image, drawn again where the `mask` of its size is white."""
        check_number(number)
        check_size(image)
        if not mask.getbbox():
            raise UserError("nothing is painted over yet: paint over the region to draw again")
        more = explicit(negative=negative, **settings)
        kept = kept_codes(mask, self.generator.transformer.config.grid, image.size)
        if kept.all():
            raise UserError("too little is painted over: paint over a larger region")
        return self.generator.edit(image, caption.strip(), kept, number, stream=True, share=WATCHED, **more)

    def edit_code(self, caption: str, number: int, negative: str = "", **settings: Any) -> Code:
        """Of an image and a mask saved as image.png and mask.png."""
        caption, more = caption.strip(), explicit(negative=negative, **settings)
        python = (
            f"{self.load_code('from PIL import Image')}\n"
            f'image, mask = Image.open("image.png"), Image.open("mask.png")\n'
            f"images = generator.edit(image, {caption!r}, mask, {arguments({'num_images': number, **more})})"
        )
        command = shell("edit", "image.png", caption, keep="mask.png", num=number, **self.of_model(), **more)
        return Code(python, command)

    def describe(
        self, image: Image.Image | None, captions: Sequence[str]
    ) -> tuple[list[tuple[str, float]], dict[str, float]]:
        """The likeliest of `captions`, each with how much less likely than the first it is, in nats, and the
        likeliest classes with their probabilities; empty without a generator or a classifier.

        Nats of whole images say which caption fits best. As probabilities they would be far too sure: codes
        that are drawn together count as independent evidence.
        """
        check_size(image)
        found, classes = [], {}
        if self.generator is not None:
            captions = list(dict.fromkeys(line.strip() for line in captions if line.strip()))
            if not captions:
                raise UserError("no captions to choose from: write some, one per line")
            if len(captions) > MOST_CAPTIONS:
                raise UserError(f"expected at most {MOST_CAPTIONS} captions, got {len(captions)}")
            with torch.inference_mode():
                evidence = rank_captions(self.generator, [image], captions)[0]
            best = evidence.topk(min(BEST, len(captions)))
            behind = (best.values[0] - best.values).tolist()
            found = [(captions[i], nats) for i, nats in zip(best.indices.tolist(), behind, strict=True)]
        if self.classifier is not None:
            classes = dict(self.classifier.classify([image], BEST)[0])
        return found, classes

    def describe_code(self) -> Code:
        """Of an image saved as image.png, and captions as captions.txt."""
        python, commands = ["from PIL import Image", 'image = Image.open("image.png")'], []
        if self.generator is not None:
            python = [
                self.load_code("from mmvit.sampling.candidates import rank_captions"), *python,
                'captions = open("captions.txt").read().splitlines()',
                "best = captions[rank_captions(generator, [image], captions)[0].argmax()]",
            ]  # fmt: skip
            commands.append(shell("caption", "image.png", captions_file="captions.txt", **self.of_model()))
        if self.classifier is not None:
            python += [
                "from mmvit import ImageClassifier",
                f"classifier = ImageClassifier.from_pretrained({self.classifier_name!r})",
                f"classes = classifier.classify([image], {BEST})[0]",
            ]
            commands.append(shell("classify", self.classifier_name, "image.png", top=BEST))
        return Code("\n".join(python), "\n".join(commands))

    def load_code(self, *imports: str) -> str:
        name = "" if self.model == str(SHIPPED) else repr(self.model)
        lines = ["from mmvit import Generator", *imports, f"generator = Generator.from_pretrained({name})"]
        return "\n".join(lines)

    def of_model(self) -> dict[str, str]:
        return {} if self.model == str(SHIPPED) else {"model": self.model}


def prompt_of(captions: Mapping[str, float]) -> str | dict[str, float]:
    """One caption, or the mixture of those that have a weight."""
    explicit(captions="\n".join(captions))  # refuses what is too long
    weighted = {caption.strip(): float(weight) for caption, weight in captions.items() if weight}
    if len(captions) == 1:
        return next(iter(captions)).strip()
    if not weighted:
        raise UserError("all weights are 0: move a slider")
    return weighted


def explicit(**settings: Any) -> dict[str, Any]:
    """The settings that are set: an empty field leaves one to the model."""
    texts = [value for value in settings.values() if isinstance(value, str)]
    if (longest := max(map(len, texts), default=0)) > MOST_CHARACTERS:
        raise UserError(f"expected at most {MOST_CHARACTERS} characters, got {longest}")
    whole = ("seed", "num_steps", "top_k")
    return {
        name: int(value) if name in whole and isinstance(value, float) and value.is_integer() else value
        for name, value in settings.items()
        if value not in (None, "")
    }


def check_number(number: int) -> None:
    if not 1 <= number <= MOST_IMAGES:
        raise UserError(f"images: expected 1 to {MOST_IMAGES}, got {number}")


def check_size(image: Image.Image | None) -> None:
    if image is None:
        raise UserError("no image yet: upload one")
    if image.width * image.height > MOST_PIXELS:
        raise UserError(
            f"expected an image of at most {MOST_PIXELS:,} pixels, got {image.width}x{image.height}"
        )


def arguments(values: Mapping[str, Any]) -> str:
    """Keyword arguments in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def shell(command: str, *words: str, **options: Any) -> str:
    """A command line of mmvit."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    if any(word.startswith("-") for word in words):
        return shlex.join(["mmvit", command, *given, "--", *words])
    return shlex.join(["mmvit", command, *words, *given])
