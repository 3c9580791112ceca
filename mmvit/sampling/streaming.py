"""Images while they are drawn: decoded again and again, as codes arrive."""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from mmvit.errors import UserError
from mmvit.memory import results_in_parts
from mmvit.sampling.decoding import decode
from mmvit.sampling.prompts import Prompt
from mmvit.sampling.settings import check_counts

if TYPE_CHECKING:
    from mmvit.sampling.generator import Generator

SHARE = 0.04  # of the time of drawing, for images that are shown on the way
WATCHED = 0.25  # the same where somebody watches
GREY = (128, 128, 128)


def stream_images(
    generator: "Generator",
    captions: Prompt | Iterable[Prompt],
    num_images: int = 1,
    *,
    negative: str = "",
    candidates: int = 1,
    scorer: Any = None,
    given: Tensor | None = None,
    share: float = SHARE,
    **settings: Any,
) -> Iterator[list[Image.Image]]:
    """Yields all images that `Generator.generate` returns again and again while they are drawn; last, as they
    are then.

    Codes that are not drawn yet are those of a grey image, so that the image tokenizer decodes them as grey.

    Args:
        negative, given, settings: as for `Generator.draw`.
        share: of the time of drawing that decoding on the way may take; above it, steps are passed over.

    Raises:
        UserError: as `Generator.draw`, before anything is drawn, and for candidates, which are compared only
            when all of them are drawn.
    """
    if candidates != 1 or scorer is not None:
        raise UserError(
            "candidates are compared when all are drawn, so they cannot be shown before: leave one out"
        )
    check_counts(num_images=num_images)
    how, prompts, inputs = generator.prepare(captions, num_images, negative, given, settings)
    generator.check_guidance(prompts, how, by_evidence=False)

    def drawn() -> Iterator[list[Image.Image]]:
        grid = generator.transformer.config.grid
        grey = generator.encode([Image.new("RGB", generator.size[::-1], GREY)]).flatten(1)
        start = time.perf_counter()
        images = generator.images(grey.unflatten(1, grid))
        cost = time.perf_counter() - start  # of showing an image
        images = images * len(inputs.seeds)
        drawing, showing = 0.0, 0.0  # seconds, without those in which the caller looks at the images

        def frames(part: slice) -> Iterator[list[Image.Image]]:
            nonlocal drawing, showing
            steps = decode(generator.transformer, *inputs.part(part), **how.decoding)
            while True:
                start = time.perf_counter()
                if (step := next(steps, None)) is None:
                    break
                codes, known = step
                drawing += time.perf_counter() - start
                if showing + cost * len(codes) <= share * drawing:
                    start = time.perf_counter()
                    images[part] = generator.images(torch.where(known, codes, grey).unflatten(1, grid))
                    showing += time.perf_counter() - start
                    yield [*images]
            images[part] = generator.images(codes.unflatten(1, grid))

        yield from results_in_parts(frames, len(images), how.batch_size)
        yield images

    return drawn()
