"""Prints the named models: their exact parameters, and what classifiers cost to run and to train. They are
built on the meta device: nothing is allocated.

    python pipelines/list_presets.py
    python pipelines/list_presets.py --images 1.28e6 --epochs 300 --batch 4096
    python pipelines/list_presets.py vit-l16 --image-size 384

GMACs: billions of multiply-adds of one image's forward pass, whose FLOPs are twice as many; training takes
three times as many. Without options, steps and exaFLOPs are those of Table 6 of the ViT paper (2010.11929):
7 epochs of JFT's 303 million images in batches of 4096.
"""

import argparse
import sys

import torch
from rich.console import Console
from rich.table import Table

from mmvit.config import build_config
from mmvit.errors import UserError, run_script
from mmvit.models.classifier import ClassifierConfig
from mmvit.models.cost import forward_macs, training_flops
from mmvit.models.presets import MODELS, PRESETS, preset
from mmvit.models.resnet import ResNetConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of presets; all of them by default")
    parser.add_argument("--image-size", type=int, help="of classifiers, in pixels, instead of their own")
    parser.add_argument("--images", type=float, default=303e6, help="in the training data")
    parser.add_argument("--epochs", type=float, default=7)
    parser.add_argument("--batch", type=int, default=4096)
    options = parser.parse_args()
    if min(options.images, options.epochs, options.batch) <= 0:
        raise UserError("--images, --epochs and --batch are greater than 0")
    examples = options.images * options.epochs
    data = f"{options.images:,.0f} images for {options.epochs:g} epochs"
    table = Table(title=f"presets; training on {data} in batches of {options.batch}")
    for column in ("name", "layers", "width", "heads", "tokens", "parameters", "GMACs", "steps", "exaFLOPs"):
        justify = "left" if column == "name" else "right"
        table.add_column(column, justify=justify, no_wrap=True, min_width=16 if column == "name" else None)
    for name in options.names or PRESETS:
        config = preset(name)
        if options.image_size is not None and isinstance(config, ClassifierConfig | ResNetConfig):
            config = build_config(
                type(config), {**config.model_dump(), "image_size": options.image_size}, source=name
            )
        with torch.device("meta"):
            model = MODELS[type(config)](config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape, cost = ("", "", "", ""), ("", "", "")
        if core := getattr(config, "core", None):
            shape = (core.depth, core.width, core.num_heads, model.positions.length)
        if isinstance(config, ClassifierConfig | ResNetConfig):
            macs = forward_macs(config)
            exaflops = training_flops(macs, examples) / 1e18
            digits = 0 if exaflops >= 1000 else 4 - len(f"{exaflops:.0f}")
            cost = (f"{macs / 1e9:.3f}", f"{examples / options.batch:,.0f}", f"{exaflops:,.{digits}f}")
        table.add_row(name, *map(str, shape), f"{parameters:,}", *cost)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    run_script(main)
