"""How well images and captions fit, by a generator's own likelihoods or by a CLIP: to choose among images of
a caption (2102.12092, section 2.4), or among captions of an image."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit.data.captions import TextTokenizer
from mmvit.errors import UserError
from mmvit.hub import find_model_folder
from mmvit.memory import in_parts
from mmvit.models.classification import fit_pixels
from mmvit.models.clip import CLIP
from mmvit.models.generator_transformer import PAD, GeneratorTransformer
from mmvit.sampling.any_order import group_bounds
from mmvit.sampling.decoding import default_steps, uniforms
from mmvit.sampling.prompts import Prompts, check_text
from mmvit.weights import MAX_FILE_SIZE

if TYPE_CHECKING:
    from mmvit.sampling.generator import Generator, Images

DRAWN_TOGETHER = 64  # images that scripts draw before they save them
SHORTLIST = 32  # captions of an image that are compared in full precision
TEXT = "text_tokenizer"  # in the folder of a CLIP

Score = Callable[[Sequence[str], Tensor], Tensor]  # captions and codes, one for each image → (images,)


@dataclass
class Drawn:
    """Codes (images, rows, columns), the seed of each, and the scores of those chosen among candidates."""

    codes: Tensor
    seeds: list[int]
    scores: Tensor | None = None


def choose(drawn: Drawn, prompts: Prompts, num_images: int, score: Score) -> Drawn:
    """The `num_images` best of each prompt's images, the best first; the scores of a mixture's captions are
    summed by weight."""
    each = len(drawn.seeds) // len(prompts)
    scores = torch.zeros(len(drawn.seeds))
    for column in zip(*prompts.padded(), strict=True):
        captions, weights = zip(*(pair for pair in column for _ in range(each)), strict=True)
        scores += torch.tensor(weights) * score(captions, drawn.codes).cpu()
    best = scores.view(-1, each).topk(num_images, dim=1).indices
    best = (best + each * torch.arange(len(prompts)).unsqueeze(1)).flatten()
    return Drawn(drawn.codes[best.to(drawn.codes.device)], [drawn.seeds[i] for i in best], scores[best])


def seeds_in_parts(
    number: int, seed: int, candidates: int, most: int = DRAWN_TOGETHER
) -> Iterator[tuple[int, int]]:
    """Splits `number` images with seeds from `seed` on into parts of at most `most` images: (how many, first
    seed). Candidates, which are compared with each other, stay together."""
    most = most if candidates == 1 else number
    for done in range(0, number, most):
        yield min(most, number - done), seed + done


@torch.inference_mode()
def log_likelihood(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(codes | caption) in nats, (batch,).

    Args:
        model: in evaluation mode.
        caption_ids: (batch, text_length).
        codes: (batch, rows · columns).
    """
    return code_likelihoods(model, caption_ids, codes, batch_size).sum(1)


def code_likelihoods(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(code | codes before it, caption) in nats, (batch, rows · columns).

    A model of any order draws them in one random order, the same for all images, in `default_steps` groups of
    codes that are independent of each other.
    """

    def of_part(caption_ids: Tensor, codes: Tensor) -> Tensor:
        if model.config.order == "any":
            return any_order_likelihoods(model, caption_ids, codes)
        return likelihoods_of(model(caption_ids, codes)[1], codes)

    return in_parts(of_part, caption_ids, codes, size=batch_size)


def any_order_likelihoods(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    codes: Tensor,
    num_steps: int | None = None,
    seed: int = 0,
) -> Tensor:
    """log p(code | codes of earlier groups, caption) in nats, (batch, rows · columns), in an order drawn with
    `seed` and in `num_steps` groups, by default `default_steps`."""
    places = codes.shape[1]
    order = uniforms([seed], places)[0].argsort().to(codes.device)
    bounds = group_bounds(torch.tensor([places]), num_steps or default_steps(places))
    captions, hidden = model.embed_captions(caption_ids), torch.ones_like(codes, dtype=torch.bool)
    likelihoods = codes.new_empty(codes.shape, dtype=torch.float32)
    for start, end in pairwise(bounds):
        group = order[start:end]
        seen = model.read_codes(codes, hidden, captions)[:, group]
        likelihoods[:, group] = likelihoods_of(model.image_head(seen), codes[:, group])
        hidden[:, group] = False
    return likelihoods


def likelihoods_of(logits: Tensor, codes: Tensor) -> Tensor:
    """log p(code) in nats, (batch, places), of logits (batch, places, codebook_size)."""
    return -F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")


@torch.inference_mode()
def likelihood_of_given(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, given: Tensor
) -> Tensor:
    """How well drawn codes fit the given ones that follow them, (batch,): the sum of log p(given code | codes
    before it, caption).

    Each code was drawn from earlier codes only. At guidance 1 and temperature 1 this is therefore the
    logarithm of the importance weight: how much likelier the given codes make what was drawn.

    Args:
        codes: (batch, rows · columns), given and drawn.
        given: (batch, rows · columns), -1 where one was drawn.
    """
    return (code_likelihoods(model, caption_ids, codes) * follows_drawn(given)).sum(1)


def follows_drawn(given: Tensor) -> Tensor:
    """Boolean (batch, places): where a given code comes after a drawn one, which is -1 in `given`."""
    return (given >= 0) & ((given < 0).cumsum(1) > 0)


def caption_evidence(
    model: GeneratorTransformer, caption_ids: Tensor, codes: Tensor, batch_size: int = 64
) -> Tensor:
    """log p(codes | caption) − log p(codes), (batch,): how much the codes speak for the caption.

    By Bayes' rule this is log p(caption | codes) − log p(caption), so it orders images of one caption by how
    likely each makes the caption. The model must know images without captions, by caption dropout.
    """
    empty = torch.full_like(caption_ids, PAD)
    with_caption = log_likelihood(model, caption_ids, codes, batch_size)
    return with_caption - log_likelihood(model, empty, codes, batch_size)


def rank_captions(
    generator: "Generator",
    images: "Images",
    captions: Sequence[str],
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """`caption_evidence` of every caption for every image, (images, captions): the highest is what the image
    most likely shows, if all captions are equally likely beforehand.

    Args:
        precision: of a first pass over all captions; bfloat16 is several times faster where the hardware
            supports it. The `SHORTLIST` likeliest captions of each image are then computed in float32.
    """
    for caption in captions:
        check_text(caption)
    model, codes = generator.transformer, generator.encode(images).flatten(1)
    ids, num_cut = generator.text_tokenizer.encode(captions, model.config.text_length)
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(captions)} captions have more than {model.config.text_length} tokens and "
            "were cut there; those that differ only after that rank the same",
            stacklevel=2,
        )
    ids = ids.to(generator.device)
    is_rough = precision != torch.float32
    with torch.autocast(generator.device.type, precision, enabled=is_rough):
        likelihoods = torch.stack([log_likelihood(model, ids, own.expand(len(ids), -1)) for own in codes])
    if is_rough:
        for row, own in zip(likelihoods, codes, strict=True):
            best = row.topk(min(SHORTLIST, len(ids))).indices
            row[best] = log_likelihood(model, ids[best], own.expand(len(best), -1))
    empty = ids.new_full((len(codes), ids.shape[1]), PAD)
    return likelihoods - log_likelihood(model, empty, codes).unsqueeze(1)


class CaptionScorer:
    """Scores how well images fit captions with a CLIP and the text tokenizer that it was trained on.

    `scorer.scores(pixels, captions)` are cosines; one folder holds both parts.
    """

    def __init__(self, clip: CLIP, text_tokenizer: TextTokenizer):
        if text_tokenizer.vocab_size != clip.config.vocab_size:
            raise UserError(
                f"the text tokenizer has {text_tokenizer.vocab_size} tokens, but the CLIP was built for "
                f"{clip.config.vocab_size}"
            )
        self.clip, self.text_tokenizer = clip.eval(), text_tokenizer

    @property
    def device(self) -> torch.device:
        return self.clip.start.device

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> Self:
        """Loads a CLIP from its folder, a run folder (its best model) or a Hub repository.

        Raises:
            UserError: when the folder holds no CLIP, or its parts do not fit together.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_model_folder(path)
        clip = CLIP.from_pretrained(folder, device)
        return cls(clip, TextTokenizer.from_file(folder / TEXT / "tokenizer.json"))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_file_size: int = MAX_FILE_SIZE
    ) -> Path:
        """Writes both parts, so that the folder is all that scoring needs."""
        folder = Path(folder)
        (folder / TEXT).mkdir(parents=True, exist_ok=True)
        self.text_tokenizer.save(folder / TEXT / "tokenizer.json")
        return self.clip.save_pretrained(folder, dtype, max_file_size)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions → unit vectors (captions, embedding_width); long captions are cut."""
        ids, _ = self.text_tokenizer.encode(captions, self.clip.config.text_length)
        return in_parts(lambda part: self.clip.embed_captions(part.to(self.device)), ids, size=batch_size)

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor, batch_size: int = 64) -> Tensor:
        """pixels (images, 3, height, width) in [-1, 1], of any size → unit vectors (images,
        embedding_width)."""

        def embed(part: Tensor) -> Tensor:
            return self.clip.embed_images(fit_pixels(part.to(self.device), self.clip.config.image))

        return in_parts(embed, pixels, size=batch_size)

    def scores(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine of each image with its own caption, (images,); pixels (images, 3, height, width)."""
        if len(pixels) != len(captions):
            raise ValueError(f"{len(pixels)} images and {len(captions)} captions")
        return (self.embed_images(pixels) * self.embed_captions(captions)).sum(1)
