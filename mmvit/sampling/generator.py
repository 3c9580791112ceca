"""Captions to pictures: a generator transformer with the two tokenizers that it was trained on, kept in one
folder."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.data.images import images_from_pixels, pixels_from_images
from mmvit.errors import UserError
from mmvit.hub import SHIPPED, find_model_folder
from mmvit.memory import in_parts
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.sampling.candidates import Drawn, check_candidates, choose
from mmvit.sampling.decoding import sample_codes
from mmvit.sampling.prompts import Prompt, encode_prompts, has_weights, list_prompts
from mmvit.sampling.rerank import CaptionScorer
from mmvit.sampling.scoring import after_drawn, caption_evidence, likelihood_of_given
from mmvit.sampling.settings import SamplingSettings

TEXT, IMAGE = "text_tokenizer", "image_tokenizer"

Pictures = Sequence[Image.Image] | Tensor  # pixels (pictures, 3, height, width) in [-1, 1]


class Generator:
    """Draws pictures from captions.

        pictures = Generator.from_pretrained("runs/emoji").generate(["red apple"], seed=0)

    `transformer` predicts codes, `text_tokenizer` reads captions, `image_tokenizer` turns codes into pixels.
    `defaults` are the settings for what a call leaves open: those that a run's previews were drawn with.
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
        """Height and width of a picture, in pixels."""
        rows, columns = self.transformer.config.grid
        return rows * self.image_tokenizer.factor, columns * self.image_tokenizer.factor

    @classmethod
    def from_pretrained(cls, path: str | Path = SHIPPED, device: str | torch.device | None = None) -> Self:
        """Loads a generator's folder, a run folder (its best model) or a Hub repository.

        Args:
            path: by default the generator that a checkout holds.
            device: where to draw; by default a GPU where there is one.

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

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes all three parts, so that the folder is all that sampling needs."""
        self.save_surroundings(folder, dtype)
        return self.transformer.save_pretrained(folder, dtype)

    def save_surroundings(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what stands beside the transformer's own files."""
        folder = Path(folder)
        self.image_tokenizer.save_pretrained(folder / IMAGE, dtype)
        (folder / TEXT).mkdir(exist_ok=True)
        self.text_tokenizer.save(folder / TEXT / "tokenizer.json")
        self.defaults.save(folder)

    def generate(
        self, captions: Prompt | Sequence[Prompt], num_images: int = 1, **settings: Any
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each caption.

        Args:
            captions: one or several; an empty one is drawn unconditionally, one that is too long is cut. A
                mapping of captions to weights mixes them: each gets its weight of the guidance.
            settings: what `draw` takes.

        Returns:
            RGB pictures, all of the first caption, then all of the second, ...

        Raises:
            UserError: for no captions, or settings outside their range.
        """
        return self.images(self.draw(captions, num_images, **settings).codes)

    def generate_codes(
        self, captions: Prompt | Sequence[Prompt], num_images: int = 1, **settings: Any
    ) -> Tensor:
        """What `generate` draws, as codes (pictures, rows, columns)."""
        return self.draw(captions, num_images, **settings).codes

    def draw(
        self,
        captions: Prompt | Sequence[Prompt],
        num_images: int = 1,
        *,
        negative: str = "",
        candidates: int = 1,
        scorer: CaptionScorer | None = None,
        given: Tensor | None = None,
        **settings: Any,
    ) -> Drawn:
        """What `generate` draws, with its seeds and scores.

        Args:
            negative: what guidance leads away from, instead of from any picture.
            candidates: pictures drawn for each that is returned: the best ones, by `scorer`, or without one
                by what this model itself finds likely: of `given` codes after drawn ones, where there are
                any, these codes (`likelihood_of_given`), else the caption (`caption_evidence`).
            given: codes (captions, rows, columns) that stay as they are, -1 where one is drawn.
            settings: fields of `SamplingSettings`: guidance_scale, temperature, top_k, top_p, seed,
                batch_size; where one is not given, that of `defaults` counts.
        """
        how = self.defaults.but(settings)
        prompts = list_prompts(captions)
        for name, number in (("num_images", num_images), ("candidates", candidates)):
            if not isinstance(number, int):
                raise UserError(f"{name} is {number!r}; it is a whole number")
            if number < 1:
                raise UserError(f"{name} is {number}; at least 1 is drawn")
        config = self.transformer.config
        each = num_images * candidates
        if given is not None:
            given = check_given(given, len(prompts), config.grid, config.codebook_size)
            given = given.flatten(1).to(self.device).repeat_interleave(each, dim=0)
        by_given = given is not None and bool(after_drawn(given).any(1).all())
        check_candidates(prompts, candidates, scorer, by_given)
        self.check_guidance(prompts, how, negative, candidates > 1 and scorer is None and not by_given)
        ids, weights = encode_prompts(prompts, self.text_tokenizer, config.text_length)
        base = None
        if negative:
            base = encode_prompts(list_prompts(negative), self.text_tokenizer, config.text_length)[0][0, 0]
        rows, scales = ids.to(self.device), (how.guidance_scale * weights).to(self.device)
        rows, scales = (part.repeat_interleave(each, dim=0) for part in (rows, scales))
        seeds = [how.seed + j for _ in prompts for j in range(each)]

        base = None if base is None else base.to(self.device)

        def draw_part(rows: Tensor, scales: Tensor, given: Tensor | None, seeds: list[int]) -> Tensor:
            return sample_codes(
                self.transformer,
                rows,
                seeds,
                scales if has_weights(prompts) else how.guidance_scale,
                how.temperature,
                how.top_k,
                how.top_p,
                base_ids=None if base is None else base.expand(len(seeds), -1),
                given=given,
            )

        codes = in_parts(draw_part, rows, scales, given, seeds, size=how.batch_size)
        drawn = Drawn(codes.unflatten(1, config.grid), seeds)
        if candidates == 1:
            return drawn
        rate = partial(self.rate, drawn.codes, scorer, given if by_given else None)
        return choose(drawn, prompts, num_images, rate)

    def rate(
        self,
        codes: Tensor,
        scorer: CaptionScorer | None,
        given: Tensor | None,
        captions: Sequence[str],
    ) -> Tensor:
        """Scores of the candidates, each for its own caption: by `scorer`, by the fit of `given` codes, or by
        evidence."""
        if scorer is not None:
            return in_parts(lambda part, own: scorer.scores(self.decode(part), own), codes, captions, size=64)
        if given is None:
            return self.evidence(captions, codes)
        ids, _ = self.text_tokenizer.encode(captions, self.transformer.config.text_length)
        return likelihood_of_given(self.transformer, ids.to(self.device), codes.flatten(1), given)

    def evidence(self, captions: Sequence[str], codes: Tensor) -> Tensor:
        """`caption_evidence` of codes (pictures, rows, columns), each for its own caption, (pictures,)."""
        ids, _ = self.text_tokenizer.encode(captions, self.transformer.config.text_length)
        return caption_evidence(self.transformer, ids.to(self.device), codes.flatten(1).to(self.device))

    def check_guidance(
        self, prompts: Sequence[Mapping[str, float]], how: SamplingSettings, negative: str, own_score: bool
    ) -> None:
        """Raises UserError for what a model cannot do that never saw pictures without captions, and for a
        negative caption that nothing is led away from."""
        if self.transformer.config.caption_dropout > 0:
            least = min(how.guidance_scale * sum(prompt.values()) for prompt in prompts)
            if negative and least < 1 + 1e-6:
                does = "changes nothing" if least > 1 - 1e-6 else "is drawn"
                scale = f"guidance_scale {how.guidance_scale:g}"
                weights = " and these weights" if has_weights(prompts) else ""
                raise UserError(
                    f"the negative caption {negative!r} {does} at {scale}{weights}; "
                    "it leads away above 1, as at 2"
                )
            return
        if any([*prompt] == [""] for prompt in prompts):
            warnings.warn(
                "this model was trained without caption dropout and knows no pictures without captions: what "
                "it draws for the empty one is arbitrary",
                stacklevel=3,
            )
        asked = {
            f"guidance_scale is {how.guidance_scale}": how.guidance_scale != 1,
            "captions are mixed by weights": has_weights(prompts),
            f"the negative caption is {negative!r}": bool(negative),
            "candidates are to be chosen by the model itself (give a scorer)": own_score,
        }
        if found := [what for what, is_asked in asked.items() if is_asked]:
            raise UserError(
                f"{found[0]}, but this model was trained without caption dropout and knows no unconditional "
                "pictures; use guidance_scale 1 alone, or train with model.caption_dropout = 0.1"
            )

    @torch.inference_mode()
    def encode(self, pictures: Pictures, batch_size: int = 64) -> Tensor:
        """Pictures, which are resized, or pixels (pictures, 3, height, width) in [-1, 1] of the size that is
        drawn, as codes (pictures, rows, columns).

        Raises:
            UserError: for pixels of another size.
        """
        height, width = self.size
        pixels = pictures if isinstance(pictures, Tensor) else pixels_from_images(pictures, height, width)
        if tuple(pixels.shape[1:]) != (3, height, width):
            raise UserError(
                f"pixels are {tuple(pixels.shape[1:])}, this generator draws {(3, height, width)}"
            )
        return self.image_tokenizer.encode_many(pixels, batch_size)

    @torch.inference_mode()
    def decode(self, codes: Tensor, batch_size: int = 64) -> Tensor:
        """Codes (pictures, rows, columns) as pixels (pictures, 3, height, width) in [-1, 1]."""
        return self.image_tokenizer.decode_many(codes, batch_size)

    def images(self, codes: Tensor, batch_size: int = 64) -> list[Image.Image]:
        """Codes (pictures, rows, columns) as RGB pictures."""
        return images_from_pixels(self.decode(codes, batch_size))


def check_fit(
    transformer: GeneratorTransformer, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer
) -> None:
    """Raises UserError where the tokenizers speak another vocabulary than the transformer."""
    config = transformer.config
    if text_tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the text tokenizer has {text_tokenizer.vocab_size} tokens, "
            f"the generator was built for {config.vocab_size}"
        )
    if image_tokenizer.codebook_size != config.codebook_size:
        raise UserError(
            f"the image tokenizer has {image_tokenizer.codebook_size} codes, "
            f"the generator was built for {config.codebook_size}"
        )


def check_given(given: Tensor, pictures: int, grid: tuple[int, int], codebook_size: int) -> Tensor:
    """Raises UserError for given codes of another shape than (pictures, *grid), or that are none."""
    if tuple(given.shape) != (pictures, *grid):
        raise UserError(f"given codes are {tuple(given.shape)}; they have to be {(pictures, *grid)}")
    if given.min() < -1 or given.max() >= codebook_size:
        raise UserError(
            f"given codes are from {int(given.min())} to {int(given.max())}; they are 0 to "
            f"{codebook_size - 1}, and -1 where one is drawn"
        )
    return given
