"""Captions to images: a generator transformer with the two tokenizers that it was trained on, kept in one
folder."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.data.images import images_from_pixels, pixels_from_images
from mmvit.errors import UserError
from mmvit.hub import SHIPPED, find_model_folder
from mmvit.memory import in_parts, part_of
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.sampling.candidates import (
    CaptionScorer,
    Drawn,
    Score,
    caption_evidence,
    choose,
    follows_drawn,
    likelihood_of_given,
)
from mmvit.sampling.decoding import sample_codes
from mmvit.sampling.editing import Keep, edit, extend
from mmvit.sampling.prompts import Prompt, Prompts
from mmvit.sampling.settings import SamplingSettings, check_counts
from mmvit.sampling.streaming import stream_images
from mmvit.weights import MAX_FILE_SIZE

TEXT, IMAGE = "text_tokenizer", "image_tokenizer"

Images = Sequence[Image.Image] | Tensor  # pixels (images, 3, height, width) in [-1, 1]


class Inputs(NamedTuple):
    """The first arguments of `mmvit.sampling.decoding.decode`."""

    caption_ids: Tensor
    seeds: list[int]
    guidance_scale: float | Tensor
    base_ids: Tensor
    given: Tensor | None

    def part(self, images: slice) -> "Inputs":
        """Those of some of the images."""
        return Inputs(*(part_of(each, images) for each in self))


class Generator:
    """Draws images from captions.

        images = Generator.from_pretrained("runs/emoji").generate(["red apple"], seed=0)

    `transformer` predicts codes, `text_tokenizer` reads captions, `image_tokenizer` turns codes into pixels.
    `defaults` are the settings that a call does not set: those of the run's previews.
    """

    def __init__(
        self,
        transformer: GeneratorTransformer,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        defaults: SamplingSettings | None = None,
    ):
        check_fit(transformer, text_tokenizer, image_tokenizer)
        self.transformer = transformer.eval()
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer.eval()
        self.defaults = defaults or SamplingSettings()

    @property
    def device(self) -> torch.device:
        return self.transformer.start.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        rows, columns = self.transformer.config.grid
        return rows * self.image_tokenizer.factor, columns * self.image_tokenizer.factor

    @classmethod
    def from_pretrained(cls, path: str | Path = SHIPPED, device: str | torch.device | None = None) -> Self:
        """Loads a generator from its folder, a run folder (its best model) or a Hub repository.

        Args:
            path: by default the generator that ships with mmvit.
            device: where to draw; by default a GPU if there is one.

        Raises:
            UserError: when the folder holds no generator, or its parts do not fit together.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        transformer = GeneratorTransformer.from_pretrained(folder, device)
        for part in (TEXT, IMAGE):
            if not (folder / part).is_dir():
                raise UserError(
                    f"{folder} has no {part}/, the tokenizer that its generator was trained on: copy the "
                    "whole folder, or train it again"
                )
        image_tokenizer = load_image_tokenizer(folder / IMAGE, device)
        text_tokenizer = TextTokenizer.from_file(folder / TEXT / "tokenizer.json")
        return cls(transformer, text_tokenizer, image_tokenizer, SamplingSettings.load(folder))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_file_size: int = MAX_FILE_SIZE
    ) -> Path:
        """Writes all three parts, so that the folder is all that sampling needs."""
        self.transformer.save_pretrained(folder, dtype, max_file_size)
        self.save_surroundings(folder, dtype)
        return Path(folder)

    def save_surroundings(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes everything but the transformer: both tokenizers and the default settings."""
        folder = Path(folder)
        self.image_tokenizer.save_pretrained(folder / IMAGE, dtype)
        (folder / TEXT).mkdir(exist_ok=True)
        self.text_tokenizer.save(folder / TEXT / "tokenizer.json")
        self.defaults.save(folder)

    def generate(
        self,
        captions: Prompt | Iterable[Prompt],
        num_images: int = 1,
        *,
        stream: bool = False,
        **settings: Any,
    ) -> list[Image.Image] | Iterator[list[Image.Image]]:
        """Draws `num_images` images of each caption.

        Args:
            captions: one or several. An empty caption draws an image of anything; a long one is cut. A
                mapping of captions to weights mixes them: each is guided by its weight.
            stream: yields the images again and again while they are drawn, grey where nothing is yet, and
                last as they are without it (`mmvit.sampling.streaming.stream_images`).
            settings: as for `draw`.

        Returns:
            RGB images: all of the first caption, then all of the second, ...

        Raises:
            UserError: for no captions, or settings outside their range.
        """
        if stream:
            return stream_images(self, captions, num_images, **settings)
        return self.images(self.draw(captions, num_images, **settings).codes)

    def generate_codes(
        self, captions: Prompt | Iterable[Prompt], num_images: int = 1, **settings: Any
    ) -> Tensor:
        """Draws what `generate` draws, as codes (images, rows, columns)."""
        return self.draw(captions, num_images, **settings).codes

    def edit(
        self,
        image: Image.Image,
        caption: Prompt = "",
        keep: Keep = "top",
        num_images: int = 1,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draws `num_images` versions of an image that keep a part of it.

            (pear,) = generator.edit(apple, "green pear", keep="left", seed=0)

        Args:
            caption: of the new image.
            keep: see `mmvit.sampling.editing.edit`: a half ("top", "bottom", "left", "right"), a share of the
                codes (0.5), or a mask.
            settings: as for `draw`.
        """
        return edit(self, image, caption, keep, num_images, **settings)

    def extend(
        self, image: Image.Image, caption: Prompt = "", num_images: int = 1, **sides_and_settings: Any
    ) -> list[Image.Image]:
        """Draws `num_images` larger images around an image: `mmvit.sampling.editing.extend`.

        wide = generator.extend(landscape, "mountains", left=4, right=4, seed=0)
        """
        return extend(self, image, caption, num_images, **sides_and_settings)

    def with_grid(self, grid: tuple[int, int]) -> Self:
        """A generator with the same weights for another number of (rows, columns) of codes.

        Raises:
            UserError: if its positions are learnt, which gives them no meaning beyond its own grid.
        """
        config = self.transformer.config
        if config.positions.startswith("learned") and grid != config.grid:
            rows, columns = config.grid
            raise UserError(
                f"positions = {config.positions!r} know no more than the {rows}x{columns} codes that this "
                "generator was trained on: train one with model.positions = rotary_2d or sincos_2d"
            )
        transformer = GeneratorTransformer(config.model_copy(update={"grid": grid}))
        transformer.load_state_dict(self.transformer.state_dict())
        parts = transformer.to(self.device), self.text_tokenizer, self.image_tokenizer
        return type(self)(*parts, self.defaults)

    def draw(
        self,
        captions: Prompt | Iterable[Prompt],
        num_images: int = 1,
        *,
        negative: str = "",
        candidates: int = 1,
        scorer: CaptionScorer | None = None,
        given: Tensor | None = None,
        **settings: Any,
    ) -> Drawn:
        """Draws what `generate` draws, as codes with their seeds and scores.

        Args:
            negative: a caption that guidance leads away from, instead of from images in general.
            candidates: images drawn for each one returned, which are the best by `scorer`. Without a scorer
                the model chooses: in raster order by the likelihood of `given` codes that follow drawn ones,
                if there are any (`likelihood_of_given`), otherwise by that of the caption
                (`caption_evidence`).
            given: codes to keep (images, rows, columns), -1 where one is drawn; one caption for all of them,
                or one for each.
            settings: fields of `SamplingSettings`: guidance_scale, temperature, top_k, top_p, num_steps,
                seed, batch_size. Those left out are `defaults`.
        """
        check_counts(num_images=num_images, candidates=candidates)
        how, prompts, inputs = self.prepare(captions, num_images * candidates, negative, given, settings)
        score = self.score_for(prompts, candidates, scorer, inputs.given)
        self.check_guidance(prompts, how, by_evidence=score == self.evidence)
        sample = partial(sample_codes, self.transformer, **how.decoding)
        codes = in_parts(sample, *inputs, size=how.batch_size)
        drawn = Drawn(codes.unflatten(1, self.transformer.config.grid), inputs.seeds)
        return drawn if score is None else choose(drawn, prompts, num_images, score)

    def prepare(
        self,
        captions: Prompt | Iterable[Prompt],
        each: int,
        negative: str,
        given: Tensor | None,
        settings: Mapping[str, Any],
    ) -> tuple[SamplingSettings, Prompts, "Inputs"]:
        """Everything that `decode` needs for `each` images of every caption.

        Raises:
            UserError: for no captions, settings outside their range or that this generator does not have, or
                `given` codes of another shape.
        """
        how, config = self.defaults.replace(settings), self.transformer.config
        if how.num_steps is not None and config.order == "raster":
            raise UserError(
                "num_steps is for generators that draw in any order; this one draws one code a step, in "
                "raster order: leave it out"
            )
        prompts = Prompts.parse(captions, negative)
        if given is not None:
            check_given(given, config.grid, config.codebook_size)
            prompts = prompts.for_images(len(given))
            given = given.flatten(1).to(self.device, torch.long).repeat_interleave(each, dim=0)
        ids, weights, base = (
            part.to(self.device).repeat_interleave(each, dim=0)
            for part in prompts.encode(self.text_tokenizer, config.text_length)
        )
        scale = how.guidance_scale * weights if prompts.is_weighted else how.guidance_scale
        seeds = [how.seed + j for _ in prompts.mixtures for j in range(each)]
        return how, prompts, Inputs(ids, seeds, scale, base, given)

    def score_for(
        self, prompts: Prompts, candidates: int, scorer: CaptionScorer | None, given: Tensor | None
    ) -> Score | None:
        """What candidates are chosen by: a scorer, the fit of `given` codes (images, codes) that follow drawn
        ones, or the evidence for the caption; None without candidates.

        Raises:
            UserError: for a scorer without candidates, or candidates that cannot be compared.
        """
        if candidates == 1:
            if scorer is not None:
                raise UserError("a scorer chooses among candidates: set candidates to 2 or more")
            return None
        if scorer is not None:
            if not isinstance(scorer, CaptionScorer):
                raise UserError(
                    f"scorer: expected a CaptionScorer, got {type(scorer).__name__}: load one with "
                    "CaptionScorer.from_pretrained(FOLDER)"
                )
            return partial(self.cosines, scorer)
        is_raster = self.transformer.config.order == "raster"
        if is_raster and given is not None and follows_drawn(given).any(1).all():
            return partial(self.fit, given)
        if prompts.has_empty:
            raise UserError(
                "candidates for an empty caption cannot be compared: give a caption, or drop candidates"
            )
        return self.evidence

    def cosines(self, scorer: CaptionScorer, captions: Sequence[str], codes: Tensor) -> Tensor:
        """A scorer's cosines of images, as codes (images, rows, columns), each with its own caption."""

        def of_part(captions: Sequence[str], codes: Tensor) -> Tensor:
            return scorer.scores(self.decode(codes), captions)

        return in_parts(of_part, captions, codes, size=64)

    def fit(self, given: Tensor, captions: Sequence[str], codes: Tensor) -> Tensor:
        """`likelihood_of_given` codes (images, codes) among `codes` (images, rows, columns), each after its
        own caption."""
        ids, _ = self.text_tokenizer.encode(captions, self.transformer.config.text_length)
        return likelihood_of_given(self.transformer, ids.to(self.device), codes.flatten(1), given)

    def evidence(self, captions: Sequence[str], codes: Tensor) -> Tensor:
        """`caption_evidence` of codes (images, rows, columns), each for its own caption, (images,)."""
        ids, _ = self.text_tokenizer.encode(captions, self.transformer.config.text_length)
        return caption_evidence(self.transformer, ids.to(self.device), codes.flatten(1).to(self.device))

    def check_guidance(self, prompts: Prompts, how: SamplingSettings, by_evidence: bool) -> None:
        """Raises UserError for a negative caption without effect, and for anything that needs a model trained
        with caption dropout if this one was not."""
        if self.transformer.config.caption_dropout > 0:
            least = min(how.guidance_scale * sum(mixture.values()) for mixture in prompts.mixtures)
            if prompts.negative and least < 1 + 1e-6:
                effect = "has no effect" if least > 1 - 1e-6 else "is drawn, not avoided,"
                weights = " and these weights" if prompts.is_weighted else ""
                raise UserError(
                    f"the negative caption {prompts.negative!r} {effect} at guidance_scale "
                    f"{how.guidance_scale:g}{weights}: set a guidance_scale above 1, such as 2"
                )
            return
        if prompts.has_empty:
            warnings.warn(
                "this model was trained without caption dropout, so it never saw an empty caption, and draws "
                "something arbitrary for it",
                stacklevel=4,
            )
        needs = {
            f"guidance_scale {how.guidance_scale:g}": how.guidance_scale != 1,
            "a mixture of captions": prompts.is_weighted,
            f"the negative caption {prompts.negative!r}": bool(prompts.negative),
            "choosing candidates without a scorer": by_evidence,
        }
        if found := [name for name, is_needed in needs.items() if is_needed]:
            raise UserError(
                f"{found[0]} needs a model trained with caption dropout, and this one was trained without: "
                "use plain captions at guidance_scale 1, or train with model.caption_dropout = 0.1"
            )

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int = 64) -> Tensor:
        """Images as codes (images, rows, columns).

        Args:
            images: Pillow images, which are resized, or pixels (images, 3, height, width) in [-1, 1] of this
                generator's size.

        Raises:
            UserError: for pixels of another size.
        """
        height, width = self.size
        pixels = images if isinstance(images, Tensor) else pixels_from_images(images, height, width)
        if (found := tuple(pixels.shape[1:])) != (3, height, width):
            raise UserError(f"expected pixels (images, 3, {height}, {width}), got (images, {str(found)[1:]}")
        return self.image_tokenizer.encode_many(pixels, batch_size)

    @torch.inference_mode()
    def decode(self, codes: Tensor, batch_size: int = 64) -> Tensor:
        """Codes (images, rows, columns) as pixels (images, 3, height, width) in [-1, 1]."""
        return self.image_tokenizer.decode_many(codes, batch_size)

    def images(self, codes: Tensor, batch_size: int = 64) -> list[Image.Image]:
        """Codes (images, rows, columns) as RGB images."""
        return images_from_pixels(self.decode(codes, batch_size))


def check_fit(
    transformer: GeneratorTransformer, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer
) -> None:
    """Raises UserError when the tokenizers have another vocabulary than the transformer."""
    config = transformer.config
    for name, found, expected in (
        ("text tokenizer has {} tokens", text_tokenizer.vocab_size, config.vocab_size),
        ("image tokenizer has {} codes", image_tokenizer.codebook_size, config.codebook_size),
    ):
        if found != expected:
            raise UserError(f"the {name.format(found)}, but the generator was built for {expected}")


def check_given(given: Tensor, grid: tuple[int, int], codebook_size: int) -> None:
    """Raises UserError for given codes of another shape than (images, *grid), or outside the codebook."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.long, torch.int32) or not len(given):
        found = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else repr(given)
        raise UserError(f"given: expected codes as a torch.long tensor of at least one image, got {found}")
    if given.ndim != 3 or given.shape[1:] != grid:
        rows, columns = grid
        raise UserError(f"given: expected codes (images, {rows}, {columns}), got {tuple(given.shape)}")
    if given.min() < -1 or given.max() >= codebook_size:
        raise UserError(
            f"given: expected codes from 0 to {codebook_size - 1}, and -1 where one is drawn; got "
            f"{int(given.min())} to {int(given.max())}"
        )
