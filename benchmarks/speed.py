"""How fast training and drawing are, in images per second and as a share of this machine's ceiling.

    python benchmarks/speed.py

Training: a whole optimizer step (loss, backward, clipping, AdamW) in bfloat16 on random batches. The
ceiling is what large matrix products reach; the share counts the FLOPs of products and convolutions.
Drawing: one image after another, and 64 at once, with the generator of emoji_raster and cached decoding.
"""

import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvit.models.classifier import Classifier
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.presets import preset
from mmvit.sampling import decoding
from mmvit.sampling.decoding import sample_codes
from mmvit.training.config import OptimizerConfig
from mmvit.training.optim import Optimizer

CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    torch.manual_seed(0)
    ceiling = matrix_product_ceiling()
    console = Console()
    console.print(
        f"{torch.get_num_threads()} threads; matrix products in bfloat16 reach {ceiling / 1e12:.2f} TFLOP/s"
    )
    table = Table(title="training step")
    for column in ("model", "parameters", "batch", "images/s", "TFLOP/s", "share of the ceiling"):
        table.add_column(column, justify="right")
    classifier = Classifier(preset("vit-modern"))
    generator = GeneratorTransformer(demo_config())
    for name, model, batch in (
        ("fashion_mnist.toml", classifier, classifier_batch(classifier, 64)),
        ("emoji_raster.toml", generator, generator_batch(generator, 64)),
    ):
        size = len(next(iter(batch.values())))
        parameters = sum(p.numel() for p in model.parameters())
        step = training_step(model, batch)
        seconds = median_seconds(step)
        flops = count_flops(step) / seconds
        row = (
            name,
            f"{parameters:,}",
            str(size),
            f"{size / seconds:.0f}",
            f"{flops / 1e12:.2f}",
            f"{flops / ceiling:.0%}",
        )
        table.add_row(*row)
    console.print(table)

    table = Table(title=f"sampling {generator.config.num_codes} codes, emoji_raster.toml")
    for column in ("images at once", "guidance", "threads", "seconds", "images/s"):
        table.add_column(column, justify="right")
    generator.eval()
    all_threads, decoding.ONE_THREAD_UP_TO = torch.get_num_threads(), 0
    for batch, guidance in ((1, 1.0), (1, 2.0), (4, 2.0), (64, 1.0)):
        captions = torch.randint(1, generator.config.vocab_size, (batch, generator.config.text_length))
        for threads in (1, all_threads):
            torch.set_num_threads(threads)
            seconds = median_seconds(
                lambda c=captions, g=guidance: sample_codes(generator, c, list(range(len(c))), g)
            )
            table.add_row(str(batch), str(guidance), str(threads), f"{seconds:.2f}", f"{batch / seconds:.1f}")
    console.print(table)


def demo_config() -> GeneratorConfig:
    return GeneratorConfig(**tomllib.loads((CONFIGS / "emoji_raster.toml").read_text())["model"])


def matrix_product_ceiling() -> float:
    """FLOP/s of the better of two large bfloat16 products."""
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 384, 1536)):
        x, weight = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        seconds = median_seconds(lambda x=x, weight=weight: F.linear(x, weight), repetitions=30)
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def classifier_batch(model: Classifier, size: int) -> dict[str, torch.Tensor]:
    config = model.config
    pixels = torch.randn(size, config.channels, *config.height_width)
    return {"pixels": pixels, "labels": torch.randint(config.num_classes, (size,))}


def generator_batch(model: GeneratorTransformer, size: int) -> dict[str, torch.Tensor]:
    config = model.config
    captions = torch.randint(1, config.vocab_size, (size, config.text_length))
    return {"caption_ids": captions, "codes": torch.randint(config.codebook_size, (size, config.num_codes))}


def training_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = Optimizer(model.train(), OptimizerConfig(), total_steps=1000)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def median_seconds(function: Callable[[], object], repetitions: int = 9) -> float:
    """The median of `repetitions` calls after two that warm up."""
    function(), function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
