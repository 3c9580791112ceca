"""Captions to pictures: a generator transformer with the two tokenizers that it was trained on, kept in one
folder."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError
from mmvit.hub import find_model_folder
from mmvit.models.generator import GeneratorTransformer
from mmvit.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from mmvit.sampling.decoding import sample_codes

TEXT, IMAGE = "text_tokenizer", "image_tokenizer"


class Generator:
    """Draws pictures from captions.

        pictures = Generator.from_pretrained("runs/emoji").generate(["red apple"], seed=0)

    `transformer` predicts codes, `text_tokenizer` reads captions, `image_tokenizer` turns codes into pixels.
    """

    def __init__(
        self,
        transformer: GeneratorTransformer,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
    ):
        check_fit(transformer, text_tokenizer, image_tokenizer)
        self.transformer = transformer.eval()
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer.eval()

    @property
    def device(self) -> torch.device:
        return self.transformer.start.device

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> Self:
        """Loads a generator's folder, a run folder (its best model) or a Hub repository.

        Args:
            device: where to draw; by default a GPU where there is one.

        Raises:
            UserError: when the folder holds no generator, or its parts do not fit together.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        transformer = GeneratorTransformer.from_pretrained(folder, device)
        image_tokenizer = load_image_tokenizer(folder / IMAGE, device)
        return cls(transformer, TextTokenizer.from_file(folder / TEXT / "tokenizer.json"), image_tokenizer)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes all three parts, so that the folder is all that sampling needs."""
        folder = Path(folder)
        self.image_tokenizer.save_pretrained(folder / IMAGE, dtype)
        (folder / TEXT).mkdir(exist_ok=True)
        self.text_tokenizer.save(folder / TEXT / "tokenizer.json")
        return self.transformer.save_pretrained(folder, dtype)

    def generate(
        self,
        captions: str | Sequence[str],
        num_images: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each caption.

        Args:
            captions: one or several; an empty one is drawn unconditionally, one that is too long is cut.
            guidance_scale: above 1 follows the caption more closely (2207.12598); needs a model trained with
                caption dropout.
            temperature: below 1 is more cautious; 0 always takes the likeliest code.
            top_k: draw among the k likeliest codes alone.
            top_p: draw among the likeliest codes that together have this probability.
            seed: picture j of a caption is drawn with seed + j, so it can be drawn again alone.
            batch_size: pictures drawn at a time.
            on_step: see `sample_codes`.

        Returns:
            RGB pictures, all of the first caption, then all of the second, ...

        Raises:
            UserError: for no captions, or settings outside their range.
        """
        codes = self.generate_codes(
            captions, num_images, guidance_scale, temperature, top_k, top_p, seed, batch_size, on_step
        )
        return self.pictures(codes)

    def generate_codes(
        self,
        captions: str | Sequence[str],
        num_images: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """What `generate` draws, as codes (pictures, rows, columns)."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        check_settings(self.transformer, captions, num_images, guidance_scale, temperature, top_k, top_p)
        length = self.transformer.config.text_length
        caption_ids, num_cut = self.text_tokenizer.encode(captions, length)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(captions)} captions have more than {length} tokens and are cut there",
                stacklevel=2,
            )
        caption_ids = caption_ids.repeat_interleave(num_images, dim=0).to(self.device)
        seeds = [seed + j for _ in captions for j in range(num_images)]
        parts = [
            sample_codes(
                self.transformer, caption_ids[first : first + batch_size], seeds[first : first + batch_size],
                guidance_scale, temperature, top_k, top_p, on_step,
            )
            for first in range(0, len(seeds), batch_size)
        ]  # fmt: skip
        return torch.cat(parts).unflatten(1, self.transformer.config.grid)

    @torch.inference_mode()
    def pictures(self, codes: Tensor, batch_size: int = 64) -> list[Image.Image]:
        """Codes (pictures, rows, columns) as RGB pictures."""
        pixels = torch.cat(
            [self.image_tokenizer.decode(part) for part in codes.to(self.device).split(batch_size)]
        )
        return pictures_from_pixels(pixels)


def pictures_from_pixels(pixels: Tensor) -> list[Image.Image]:
    """Pixels (pictures, 3, height, width) in [-1, 1] as RGB pictures."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in levels]


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


def check_settings(
    transformer: GeneratorTransformer,
    captions: list[str],
    num_images: int,
    guidance_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    """Raises UserError for a setting of `Generator.generate` outside its range."""
    if not captions:
        raise UserError("no captions to draw; give at least one, '' for an unconditional picture")
    if num_images < 1:
        raise UserError(f"num_images is {num_images}; at least 1 is drawn")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it is 0 (the likeliest code) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; at least 1 code must remain")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it is above 0 and at most 1")
    if guidance_scale != 1 and transformer.config.caption_dropout == 0:
        raise UserError(
            f"guidance_scale is {guidance_scale}, but this model was trained without caption dropout and "
            "knows no unconditional pictures; use 1, or train with model.caption_dropout = 0.1"
        )
