"""From a picture to others, and to its caption, with a generator that learnt captions to pictures alone."""

import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmvit.errors import UserError
from mmvit.models.generator_transformer import PAD
from mmvit.sampling.generator import Generator, Pictures
from mmvit.sampling.prompts import Prompt, list_prompts
from mmvit.sampling.scoring import log_likelihood

SHORTLIST = 32  # captions of a picture


def complete(
    generator: Generator,
    pictures: Pictures,
    kept: Tensor,
    captions: Prompt | Sequence[Prompt] = "",
    num_images: int = 1,
    **settings,
) -> list[Image.Image]:
    """Draws pictures again where they are not `kept`.

    Codes are drawn in raster order, so what follows a kept upper part is drawn from it. Kept codes after a
    drawn one do not guide it; with `candidates` those pictures are chosen which they fit best
    (`likelihood_of_given`).

    Args:
        pictures: RGB pictures, or pixels (pictures, 3, height, width) in [-1, 1].
        kept: boolean (rows, columns) of codes, or (pictures, rows, columns); True stays.
        captions: one for all, or one for each picture.
        settings: as for `Generator.draw`.

    Returns:
        `num_images` of each picture.

    Raises:
        UserError: for a mask of another size than the grid of codes, or another number of captions.
    """
    codes = generator.encode(pictures)
    if kept.dtype != torch.bool or kept.shape not in (codes.shape, codes.shape[1:]):
        rows, columns = codes.shape[1:]
        raise UserError(
            f"the mask is {tuple(kept.shape)} of {kept.dtype}; it has to be boolean, of the {rows}x{columns} "
            "codes of a picture"
        )
    prompts = list_prompts(captions)
    if len(prompts) == 1:
        prompts = prompts * len(codes)
    if len(prompts) != len(codes):
        raise UserError(f"{len(prompts)} captions for {len(codes)} pictures; give one, or one for each")
    given = codes.masked_fill(~kept.to(codes.device), -1)
    return generator.generate(prompts, num_images, given=given, **settings)


def variations(
    generator: Generator,
    picture: Image.Image,
    caption: Prompt = "",
    num_images: int = 4,
    keep: float = 0.5,
    seed: int = 0,
    **settings,
) -> list[Image.Image]:
    """Pictures that each share a random `keep` of the codes of `picture`; the j-th is drawn with seed + j.
    Raises UserError for a share outside 0 to 1."""
    if not 0 <= keep <= 1:
        raise UserError(f"keep is {keep}; it is the share of the codes that stay, from 0 to 1")
    drawn = []
    for own in range(seed, seed + num_images):
        numbers = torch.rand(generator.transformer.config.grid, generator=torch.Generator().manual_seed(own))
        drawn += complete(generator, [picture], numbers < keep, caption, seed=own, **settings)
    return drawn


def rank_captions(
    generator: Generator,
    pictures: Pictures,
    captions: Sequence[str],
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """`caption_evidence` of every caption for every picture, (pictures, captions): the highest is what the
    picture most likely shows, of captions that are equally likely beforehand.

    Args:
        precision: of a first look at all captions; in bfloat16, where the hardware multiplies it, that is
            several times faster. The `SHORTLIST` likeliest of each picture are computed in float32.
    """
    model, codes = generator.transformer, generator.encode(pictures).flatten(1)
    ids, num_cut = generator.text_tokenizer.encode(captions, model.config.text_length)
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(captions)} captions have more than {model.config.text_length} tokens and are "
            "cut there: those that differ only behind it are ranked alike",
            stacklevel=2,
        )
    ids = ids.to(generator.device)
    is_rough = precision != torch.float32
    with torch.autocast(generator.device.type, precision, enabled=is_rough):
        given = torch.stack([log_likelihood(model, ids, own.expand(len(ids), -1)) for own in codes])
    if is_rough:
        for row, own in zip(given, codes, strict=True):
            best = row.topk(min(SHORTLIST, len(ids))).indices
            row[best] = log_likelihood(model, ids[best], own.expand(len(best), -1))
    empty = ids.new_full((len(codes), ids.shape[1]), PAD)
    return given - log_likelihood(model, empty, codes).unsqueeze(1)
