"""Prints the named models with their exact parameter counts, built on the meta device: nothing is allocated.

python pipelines/list_presets.py
"""

import torch
from rich.console import Console
from rich.table import Table

from mmvit.models.presets import MODELS, PRESETS


def main() -> None:
    table = Table(title="presets")
    for column in ("name", "layers", "width", "heads", "tokens", "parameters"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = MODELS[type(config)](config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shape = ("", "", "", "")
        if core := getattr(config, "core", None):
            shape = (core.depth, core.width, core.num_heads, model.positions.length)
        table.add_row(name, *map(str, shape), f"{parameters:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
