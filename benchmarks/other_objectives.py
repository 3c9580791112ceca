"""Objectives of any order that mmvit does not have, for benchmarks/any_order.py: OBJECTIVE names one.

- `lpd`: LPD's layout (2507.01957). A random order is cut into groups; known codes, which carry content, see
  earlier groups, and queries of a group, which only ask, see each other and the known codes before it.
- `uniform`: hides a uniform number of codes instead of the cosine's.
- `images`: every image's loss counts alike, however many of its codes are hidden.
"""

import math
import os
import random
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvit import Generator
from mmvit.cli import run_script
from mmvit.models.generator_transformer import PAD, GeneratorTransformer
from mmvit.models.hidden_codes import EVALUATION_SEED, hidden_loss, hide_by_codes, hide_for_training
from mmvit.places import load_script
from mmvit.recipes.command import training_script
from mmvit.sampling.decoding import GuidedBatch, draw, filter_logits, uniforms

GROUPS = (64, 32, 16, 12, 8)  # numbers of groups in LPD's training


class Lpd(GeneratorTransformer):
    def loss(self, batch):
        ids, codes = batch["caption_ids"], batch["codes"]
        if self.training:
            ids = ids.masked_fill(torch.rand(len(ids), 1) < self.config.caption_dropout, PAD)
            order = torch.rand(codes.shape).argsort(1)
            steps = random.choice(GROUPS)
        else:
            weights = torch.arange(1, codes.shape[1] + 1)
            seeds = [EVALUATION_SEED + int((own * weights).sum()) for own in codes]
            order, steps = uniforms(seeds, codes.shape[1]).argsort(1), codes.shape[1]
        sizes = group_sizes(codes.shape[1], steps)
        logits = self.all_groups(ids, codes, order, sizes)
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.gather(1, order).flatten())
        return loss, {"loss": loss.detach(), "image_loss": loss.detach()}

    def all_groups(self, ids: Tensor, codes: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
        """Logits of all codes in `order`, each group given those before it."""
        known = codes.shape[1] - sizes[-1]
        groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        return self.ask(ids, codes.gather(1, order)[:, :known], order, groups[:known], groups)

    def ask(
        self, ids: Tensor, known: Tensor, order: Tensor, known_groups: Tensor, asked_groups: Tensor
    ) -> Tensor:
        """Logits at the places order[:, -len(asked_groups):] or all of them, given `known` codes at the first
        places of `order`."""
        places = self.positions.vectors()
        grid = places[self.prefix_length :][order]
        count = known.shape[1]
        first = 0 if len(asked_groups) == order.shape[1] else count
        asked = grid[:, first : first + len(asked_groups)]
        captions = self.embed_captions(ids) + places[: self.prefix_length]
        x = torch.cat([captions, self.code_embedding(known) + grid[:, :count], self.mask_token + asked], 1)
        is_query = torch.arange(x.shape[1]) >= self.prefix_length + count
        group = torch.cat([torch.full((self.prefix_length,), -1), known_groups, asked_groups])
        earlier = (group[None] < group[:, None]) | (~is_query[:, None] & (group[None] == group[:, None]))
        same = is_query[:, None] & is_query[None] & (group[None] == group[:, None])
        mask = (earlier & ~is_query[None]) | same
        x = self.core(self.dropout(x), mask)
        return self.image_head(x[:, -len(asked_groups) :])


class Uniform(GeneratorTransformer):
    def loss(self, batch):
        return masked_loss(self, batch, hide_uniformly, per_image=False)


class Images(GeneratorTransformer):
    def loss(self, batch):
        return masked_loss(self, batch, lambda codes: hide_for_training(*codes.shape, codes.device), True)


def masked_loss(model, batch, hide, per_image):
    ids, codes = batch["caption_ids"], batch["codes"]
    if model.training:
        ids = ids.masked_fill(torch.rand(len(ids), 1) < model.config.caption_dropout, PAD)
    hidden = hide(codes) if model.training else hide_by_codes(codes)
    loss = hidden_loss(model(ids, codes, hidden)[1], codes, hidden, per_image=per_image or not model.training)
    return loss, {"loss": loss.detach(), "image_loss": loss.detach()}


def hide_uniformly(codes: Tensor) -> Tensor:
    batch, places = codes.shape
    u = (torch.rand(1) + torch.arange(batch) / batch) % 1
    counts = (places * u).ceil().clamp(1, places)
    return torch.rand(batch, places).argsort(1).argsort(1) < counts.unsqueeze(1)


def group_sizes(places: int, steps: int) -> list[int]:
    bounds = [round(places * (1 - math.cos(math.pi * k / (2 * steps)))) for k in range(steps + 1)]
    bounds = [max(k, bound) for k, bound in enumerate(bounds)]
    bounds[-1] = places
    return [end - start for start, end in pairwise(bounds)]


@torch.inference_mode()
def draw_lpd(generator: Generator, captions: list[str], steps: int) -> Tensor:
    """Codes at guidance 2, temperature 0.3, seed 0, uncached."""
    source = generator.transformer
    model = Lpd(source.config).eval()
    model.load_state_dict(source.state_dict())
    ids, _ = generator.text_tokenizer.encode(captions, source.config.text_length)
    parts = []
    for part in ids.split(64):
        batch, places = len(part), source.config.num_codes
        prompts, numbers = GuidedBatch(part, 2.0), uniforms([0] * batch, 2 * places)
        order = numbers[:, places:].argsort(1)
        codes, done = torch.zeros(batch, places, dtype=torch.long), 0
        sizes = group_sizes(places, steps)
        for step, size in enumerate(sizes):
            groups = torch.repeat_interleave(torch.arange(step), torch.tensor(sizes[:step], dtype=torch.long))
            known = codes.gather(1, order)[:, :done].repeat(2, 1)
            asked = torch.full((size,), step)
            logits = prompts.combine(model.ask(prompts.ids, known, order.repeat(2, 1), groups, asked))
            group = order[:, done : done + size]
            drawn = draw(filter_logits(logits.flatten(0, 1), 0.3), numbers.gather(1, group).flatten())
            codes.scatter_(1, group, drawn.view_as(group))
            done += size
        parts.append(codes)
    return torch.cat(parts).view(-1, *source.config.grid)


def objective() -> type[GeneratorTransformer]:
    return {"lpd": Lpd, "uniform": Uniform, "images": Images}[os.environ["OBJECTIVE"]]


script = load_script("pipelines/train_caption_to_image.py")


def build_objective(recipe):
    random.seed(3)  # GROUPS[1]; for counting FLOPs
    return objective()(recipe.model)


def train_session(session):
    script.GeneratorTransformer = objective()
    random.seed(session.recipe.train.seed)
    script.train_session(session)


main = training_script(train_session, "generator")

if __name__ == "__main__":
    run_script(main)
