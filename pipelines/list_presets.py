"""List the named models with their exact parameters, and what classifiers cost to run and to train.

    mmvit presets
    mmvit presets --images 1.28e6 --epochs 300 --batch 4096
    mmvit presets vit-l16 --image-size 384

Models are built on the meta device, so nothing is allocated.

GMACs: billions of multiply-adds of one image's forward pass, whose FLOPs are twice as many; training takes
three times as many. Without options, steps and exaFLOPs are those of Table 6 of the ViT paper (2010.11929):
7 epochs of JFT's 303 million images in batches of 4096.
"""

import sys
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.config import build_config
from mmvit.errors import UserError
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.cost import forward_macs, training_flops
from mmvit.models.presets import PRESETS, preset
from mmvit.models.registry import build_model
from mmvit.models.resnet import ResNetConfig


def main(
    names: Annotated[list[str] | None, Argument(help="presets; all by default")] = None,
    image_size: Annotated[int | None, Option(help="pixels, for classifiers (default: the preset's)")] = None,
    images: Annotated[float, Option(help="images in the training data")] = 303e6,
    epochs: Annotated[float, Option(help="passes over the training data")] = 7,
    batch: Annotated[int, Option(help="images per training step")] = 4096,
) -> None:
    if min(images, epochs, batch) <= 0:
        raise UserError("--images, --epochs and --batch must be greater than 0")
    examples = images * epochs
    data = f"{images:,.0f} images for {epochs:g} epochs"
    table = Table(title=f"presets; training on {data} in batches of {batch}")
    for column in ("name", "layers", "width", "heads", "tokens", "parameters", "GMACs", "steps", "exaFLOPs"):
        justify = "left" if column == "name" else "right"
        table.add_column(column, justify=justify, no_wrap=True, min_width=16 if column == "name" else None)
    for name in names or PRESETS:
        config = preset(name)
        if image_size is not None and isinstance(config, ClassifierConfig | ResNetConfig):
            config = build_config(
                type(config), {**config.model_dump(), "image_size": image_size}, source=name
            )
        with torch.device("meta"):
            model = build_model(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape, cost = ("", "", "", ""), ("", "", "")
        if core := getattr(config, "core", None):
            shape = (core.depth, core.width, core.num_heads, model.positions.length)
        if isinstance(config, ClassifierConfig | ResNetConfig):
            macs = forward_macs(config)
            exaflops = training_flops(macs, examples) / 1e18
            digits = 0 if exaflops >= 1000 else 4 - len(f"{exaflops:.0f}")
            cost = (f"{macs / 1e9:.3f}", f"{examples / batch:,.0f}", f"{exaflops:,.{digits}f}")
        table.add_row(name, *map(str, shape), f"{parameters:,}", *cost)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    run_script(main)
