"""Objectives of any order that mmvit does not have, for benchmarks/any_order.py: OBJECTIVE names one.

- `uniform`: hides a uniform number of codes instead of the cosine's.
- `images`: every image's loss counts alike, however many of its codes are hidden.
"""

import os

import torch
from torch import Tensor

from mmvit.cli import run_script
from mmvit.models.generator_transformer import PAD, GeneratorTransformer
from mmvit.models.hidden_codes import hidden_loss, hide_by_codes, hide_for_training
from mmvit.places import load_script
from mmvit.recipes.command import training_script


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


def objective() -> type[GeneratorTransformer]:
    return {"uniform": Uniform, "images": Images}[os.environ["OBJECTIVE"]]


script = load_script("pipelines/train_caption_to_image.py")


def build_objective(recipe):
    return objective()(recipe.model)


def train_session(session):
    script.GeneratorTransformer = objective()
    script.train_session(session)


main = training_script(train_session, "generator")

if __name__ == "__main__":
    run_script(main)
