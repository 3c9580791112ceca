"""How much of its codebook an image tokenizer uses: counts, figures, a plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmvit.files import whole_file
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.quantizers import perplexity


@torch.no_grad()
def code_counts(model: ImageTokenizer, batches: Iterable[dict[str, Any]]) -> Tensor:
    """How often each code occurs in the `pixels` of `batches`, (codebook_size,) float64, on the CPU.

    In a process group every process calls this with its part and gets the counts of the whole.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(model.codebook_size, dtype=torch.float64, device=device)
    for batch in batches:
        counts += torch.bincount(
            model.encode(batch["pixels"].to(device)).flatten(), minlength=model.codebook_size
        )
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.cpu()


def use_metrics(counts: Tensor) -> dict[str, float]:
    """`codes_in_use`, the share of codes that occur, and `perplexity`, exp(entropy) of their distribution."""
    return {"codes_in_use": (counts > 0).double().mean().item(), "perplexity": perplexity(counts).item()}


def draw_code_use(counts: Tensor, path: Path) -> None:
    """Plots each code's share from the most frequent to the rarest, on logarithmic axes, and the share that
    all would have if they were used equally."""
    from matplotlib.figure import Figure  # takes half a second to import

    shares = (counts / counts.sum()).sort(descending=True).values
    used = shares[shares > 0]
    figures = use_metrics(counts)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(range(1, len(used) + 1), used, drawstyle="steps-mid")
    axes.axhline(1 / len(shares), color="gray", linestyle=":", label="equal use")
    axes.axvline(len(shares), color="gray", linewidth=1, label="size of the codebook")
    axes.set(
        title=f"{len(used)} of {len(shares)} codes in use, perplexity {figures['perplexity']:.0f}",
        xlabel="code, from the most frequent",
        ylabel="share of all codes",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=100)
