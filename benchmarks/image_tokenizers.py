"""How our quantizers compare with vector-quantize-pytorch's, and how fast our image tokenizer trains.

    python benchmarks/image_tokenizers.py quantizers --steps 1500 --out quantizers.jsonl
    python benchmarks/image_tokenizers.py quantizers --only vq peer-vq-readme --steps 300
    python benchmarks/image_tokenizers.py throughput --threads 1 --profile

`quantizers` needs `pip install -e ".[bench]" -c constraints.txt` and data/emoji. It trains the encoder and
decoder of `VQModel` once with each quantizer: same first weights, same batches, the optimizer of the recipe
image_tokenizer_emoji with its cosine stretched over `--steps`. It prints a line as each one ends, and
appends it to `--out`. PSNR and SSIM are over the held-out images of both splits, codes in use and
perplexity over the train images; images/s is of the median training step.

`throughput` alternates whole training steps of both models in one process: loss and backward in bfloat16,
clipping, fused AdamW, no data loading. The share of the ceiling counts the FLOPs of products and
convolutions.
"""

import argparse
import functools
import json
import math
import statistics
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from speed import count_flops, matrix_product_ceiling
from torch import Tensor, nn

from mmvit.data.images import decode_image
from mmvit.data.samples import IMAGE_EXTENSIONS, image_bytes
from mmvit.errors import UserError, run_script
from mmvit.evaluation.code_use import code_counts, use_metrics
from mmvit.evaluation.reconstruction import reconstruction_metrics
from mmvit.models.vq import VQConfig, VQModel
from mmvit.streams.shards import Sample
from mmvit.streams.stream import ShardStream
from mmvit.training.config import OptimizerConfig, TrainConfig
from mmvit.training.distributed import Processes
from mmvit.training.engine import TorchEngine

RECIPE = Path(__file__).parent.parent / "configs" / "image_tokenizer_emoji.toml"
SIZE = (64, 64)
TRAIN, HELD_OUT = ("train-*.tar",), ("combinations-*.tar", "held-out-*.tar")

OURS: dict[str, dict[str, Any]] = {
    "vq": {},
    "vq-slow": {"codebook_decay": 0.99},
    "vq-gradient": {"codebook_update": "gradient"},
    "vq-kmeans": {"kmeans_steps": 10},
    "simvq": {"quantizer": "simvq"},
    "fsq": {"quantizer": "fsq"},
}
# Class and settings. `codebook_dim` is the encoder's width already: its head and the decoder's stem project.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "peer-vq": ("VectorQuantize", {}),
    "peer-vq-readme": (
        "VectorQuantize",
        {"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 2},
    ),
    "peer-vq-readme-8": (
        "VectorQuantize",
        {"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 2, "codebook_dim": 8},
    ),
    # A batch of 32 images has 2 vectors per code on average: the README's threshold expires all below the
    # average. 0.5 and 0.9 had the best held-out PSNR of five pairs tried, after 150 steps with one seed.
    "peer-vq-tuned": (
        "VectorQuantize",
        {"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 0.5, "decay": 0.9},
    ),
    "peer-vq-tuned-slow": (
        "VectorQuantize",
        {"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 0.2, "decay": 0.99},
    ),
    "peer-simvq": ("SimVQ", {}),
    "peer-fsq": ("FSQ", {}),
}
COLUMNS = (
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("codes_in_use", "in use", "{:.1%}"),
    ("perplexity", "perplexity", "{:.0f}"),
    ("images_per_s", "images/s", "{:.0f}"),
    ("first_loss", "first loss", "{:.3f}"),
    ("last_loss", "last loss", "{:.3f}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    quantizers = commands.add_parser("quantizers", help="train the tokenizer with each quantizer")
    quantizers.add_argument("--data", type=Path, default=Path("data/emoji"))
    quantizers.add_argument("--steps", type=int, default=1500)
    quantizers.add_argument("--batch", type=int, default=32)
    quantizers.add_argument("--seed", type=int, default=0)
    quantizers.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], metavar="NAME")
    quantizers.add_argument("--out", type=Path, help="a JSON lines file to append to")
    throughput = commands.add_parser("throughput", help="time training steps beside a plain prototype")
    throughput.add_argument("--batch", type=int, default=32)
    throughput.add_argument("--rounds", type=int, default=6, help="of both models")
    throughput.add_argument("--steps", type=int, default=5, help="per model and round")
    throughput.add_argument("--profile", action="store_true", help="print where our step spends its time")
    for command in (quantizers, throughput):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compare_quantizers(options) if options.command == "quantizers" else compare_throughput(options)


def compare_quantizers(options: argparse.Namespace) -> None:
    names = options.only or [*OURS, *PEERS]
    if any(name in PEERS for name in names):
        peer_package()  # fail before the first training if it is missing
    train = read_images(options.data, TRAIN)
    held_out = read_images(options.data, HELD_OUT)
    print(
        f"{len(train)} train and {len(held_out)} held-out images, {options.steps} steps of "
        f"{options.batch}, seed {options.seed}, {options.threads} threads, torch {torch.__version__}"
    )
    print(f"{'quantizer':18}", *(f"{title:>11}" for _, title, _ in COLUMNS), flush=True)
    for name in names:
        result = train_with(name, train, held_out, options)
        print(f"{name:18}", *(f"{form.format(result[key]):>11}" for key, _, form in COLUMNS), flush=True)
        if options.out:
            with options.out.open("a") as file:
                print(json.dumps(result), file=file)


def train_with(name: str, train: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates one quantizer; `train` and `held_out` are uint8 (images, 3, height, width)."""
    recipe = tomllib.loads(RECIPE.read_text())["optimizer"]
    model = build_model(name, options.seed)
    engine = engine_of(model, OptimizerConfig(**recipe), options.steps, options.batch, "auto")
    batches = shuffled_batches(len(train), options.batch, options.seed)
    losses, seconds = [], []
    for step in range(1, options.steps + 1):
        pixels = unit_range(train[next(batches)])
        started = time.perf_counter()
        losses.append(training_step(engine, {"pixels": pixels}, step))
        seconds.append(time.perf_counter() - started)
    few = max(1, options.steps // 50)
    with engine.evaluating() as trained:
        metrics = reconstruction_metrics(trained, in_order(held_out))
        metrics |= use_metrics(code_counts(trained, in_order(train)))
    check_interface(model.eval(), unit_range(train[: options.batch]))
    return {
        "quantizer": name,
        **metrics,
        "images_per_s": options.batch / statistics.median(seconds),
        "first_loss": statistics.fmean(losses[:few]),
        "last_loss": statistics.fmean(losses[-few:]),
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "threads": options.threads,
        "torch": torch.__version__,
    }


def build_model(name: str, seed: int) -> VQModel:
    """A `VQModel` whose encoder and decoder do not depend on the quantizer, except for the width between."""
    ours = OURS.get(name, {})
    peer, settings = PEERS.get(name, (None, {}))
    config = VQConfig(**(ours or {"quantizer": "fsq" if peer == "FSQ" else "vq"}))
    torch.manual_seed(seed)
    shared = VQModel(VQConfig(quantizer="fsq" if config.quantizer == "fsq" else "vq"))
    torch.manual_seed(seed + 1)
    model = VQModel(config)
    if peer:
        model.codebook = Peer(peer, config, settings)
    model.encoder, model.decoder = shared.encoder, shared.decoder
    return model


class Peer(nn.Module):
    """A quantizer of vector-quantize-pytorch with the interface of `mmvit.models.quantizers`.

    Computed in float32: the package itself leaves autocast on CUDA only. Its loss has weight 1, as in its
    README and defaults.
    """

    def __init__(self, kind: str, config: VQConfig, settings: dict[str, Any]):
        super().__init__()
        build = getattr(peer_package(), kind)
        self.codebook_size, self.scale = config.codebook_size, 1.0
        if kind == "FSQ":
            self.quantizer = build(levels=list(config.levels), **settings)
        else:
            self.quantizer = build(dim=config.code_width, codebook_size=config.codebook_size, **settings)
        if settings.get("use_cosine_sim") and not self.quantizer.has_projections:
            self.scale = math.sqrt(config.code_width)  # as for our unit vectors

    def forward(self, encoded: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        quantized, _, loss = self.quantize(encoded)
        return quantized, loss, {}

    @torch.no_grad()
    def encode(self, encoded: Tensor) -> Tensor:
        assert not self.training, "a codebook would move"
        return self.quantize(encoded)[1]

    def vectors(self) -> Tensor:
        """The codes as the decoder gets them, (codebook_size, code_width)."""
        codes = torch.arange(self.codebook_size)
        if hasattr(self.quantizer, "get_output_from_indices"):
            return self.quantizer.get_output_from_indices(codes)
        return self.quantizer.indices_to_codes(codes[None])[0]

    def quantize(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors as `encoded`, their codes (batch, rows, columns), the loss."""
        with torch.autocast(encoded.device.type, enabled=False):
            quantized, codes, *losses = self.quantizer(encoded.float().flatten(1, 2))
        loss = losses[0] if losses else encoded.new_zeros(())
        return quantized.view(encoded.shape), codes.long().view(encoded.shape[:-1]), loss


def peer_package() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise UserError(
            'vector-quantize-pytorch is missing: pip install -e ".[bench]" -c constraints.txt, or name '
            "our quantizers after --only"
        ) from None
    return vector_quantize_pytorch


@torch.no_grad()
def check_interface(model: VQModel, pixels: Tensor) -> None:
    """Asserts that the decoder is trained on what it gets from codes."""
    encoded = model.encoder(pixels)
    quantized, _, _ = model.codebook(encoded)
    by_codes = model.codebook.vectors()[model.codebook.encode(encoded)]
    torch.testing.assert_close(quantized, by_codes, rtol=1e-4, atol=1e-4)
    decoded = model.decoder(quantized * model.codebook.scale).clamp(-1, 1)
    torch.testing.assert_close(decoded, model.decode(model.encode(pixels)), rtol=1e-2, atol=1e-2)


def read_images(folder: Path, patterns: tuple[str, ...]) -> Tensor:
    """All images of the shards in order, uint8 (images, 3, height, width)."""
    stream = ShardStream(
        [folder / pattern for pattern in patterns], decode_bytes, 256, shuffle_buffer=0, repeat=False
    )
    return torch.cat([batch["pixels"] for batch in stream])


def decode_bytes(sample: Sample, rng: object) -> dict[str, Any]:
    return {"pixels": decode_image(image_bytes(sample), SIZE).transpose(2, 0, 1)}


decode_bytes.needs = (IMAGE_EXTENSIONS,)


def unit_range(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def in_order(images: Tensor, size: int = 64) -> list[dict[str, Tensor]]:
    return [{"pixels": unit_range(part)} for part in images.split(size)]


def shuffled_batches(num_images: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless indices; each epoch has an order of its own and drops its last short batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_images, generator=generator)
        yield from order[: num_images - num_images % size].split(size)


def engine_of(
    model: nn.Module, optimizer: OptimizerConfig, steps: int, batch: int, precision: str
) -> TorchEngine:
    train = TrainConfig(steps=steps, batch_size=batch, precision=precision)
    return TorchEngine(model, train, optimizer, Processes(0, 1, torch.device("cpu")))


def training_step(engine: TorchEngine, batch: dict[str, Tensor], number: int) -> float:
    loss, _ = engine.loss(batch)
    value = loss.item()
    engine.backward(loss)
    engine.step(number)
    return value


def compare_throughput(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    models = {"mmvit VQ": VQModel(VQConfig()), "plain prototype": Prototype()}
    batch = {"pixels": torch.rand(options.batch, 3, *SIZE) * 2 - 1}
    total = options.steps * (options.rounds + 1) + 20
    steps = {
        name: functools.partial(
            training_step, engine_of(model, OptimizerConfig(), total, options.batch, "bf16"), batch
        )
        for name, model in models.items()
    }
    seconds, ceiling = alternate(steps, options.rounds, options.steps), matrix_product_ceiling()
    console = Console()
    console.print(
        f"{options.threads} threads; matrix products in bfloat16 reach {ceiling / 1e12:.3f} TFLOP/s; "
        f"batch {options.batch}, medians of {options.rounds} rounds of {options.steps} steps"
    )
    table = Table(title="training step of an image tokenizer")
    for column in ("model", "parameters", "GFLOP an image", "ms", "images/s", "share of the ceiling"):
        table.add_column(column, justify="right")
    for name, model in models.items():
        flops, median = count_flops(functools.partial(steps[name], 1)), statistics.median(seconds[name])
        row = (
            name,
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{flops / options.batch / 1e9:.2f}",
            f"{1000 * median:.0f}",
            f"{options.batch / median:.0f}",
            f"{flops / median / ceiling:.0%}",
        )
        table.add_row(*row)
    console.print(table)
    ours, plain = seconds.values()
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    console.print(
        f"ours / plain in images/s: {statistics.median(ratios):.2f} "
        f"(rounds from {min(ratios):.2f} to {max(ratios):.2f})"
    )
    if options.profile:
        profile(steps["mmvit VQ"])


def alternate(
    steps: dict[str, Callable[[int], float]], rounds: int, repetitions: int
) -> dict[str, list[float]]:
    """Each round's median seconds of a step, by model; a first round warms up and is left out."""
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            times = []
            for repetition in range(repetitions):
                started = time.perf_counter()
                step(number * repetitions + repetition + 1)
                times.append(time.perf_counter() - started)
            if number:
                medians[name].append(statistics.median(times))
    return medians


def profile(step: Callable[[int], float], repetitions: int = 5) -> None:
    """Prints the operations that take the most time themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for number in range(repetitions):
            step(number + 1)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table(title="mmvit VQ: where a training step goes")
    for column in ("operation", "ms a step", "share", "calls a step"):
        table.add_column(column, justify="right")
    for event in events[:12]:
        own = event.self_cpu_time_total
        row = (
            event.key,
            f"{own / 1000 / repetitions:.1f}",
            f"{own / total:.1%}",
            f"{event.count / repetitions:.0f}",
        )
        table.add_row(*row)
    Console().print(table)


class Prototype(nn.Module):
    """The plain convolutional VQ-VAE (1711.00937) that one writes first: 64x64 pixels to 8x8 codes."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256), inner: int = 96, code_width: int = 64):
        super().__init__()
        first, second, last = widths
        self.encoder = nn.Sequential(
            nn.Conv2d(3, first, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(first, second, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(second, last, 4, 2, 1),
            ResBlock(last, inner),
            ResBlock(last, inner),
            nn.Conv2d(last, code_width, 1),
        )
        self.codebook = PlainCodebook(1024, code_width)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_width, last, 1),
            ResBlock(last, inner),
            ResBlock(last, inner),
            nn.ConvTranspose2d(last, second, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(second, first, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(first, 3, 4, 2, 1),
        )

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        quantized, commitment = self.codebook(self.encoder(batch["pixels"]))
        return F.mse_loss(self.decoder(quantized).float(), batch["pixels"]) + 0.25 * commitment, {}


class ResBlock(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class PlainCodebook(nn.Module):
    """Euclidean codes that follow moving averages (1711.00937, appendix A.1)."""

    def __init__(self, size: int, width: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(size, width))
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vectors = x.permute(0, 2, 3, 1).float()
        flat = vectors.reshape(-1, vectors.shape[-1])
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codes.T + self.codes.square().sum(1)
        one_hot = F.one_hot(distances.argmin(1), len(self.codes)).float()
        quantized = (one_hot @ self.codes).view(vectors.shape)
        if self.training:
            with torch.no_grad():
                self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
                self.sums.lerp_((one_hot.T @ flat).float(), 1 - self.decay)
                self.codes.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
        commitment = F.mse_loss(vectors, quantized.detach())
        return (vectors + (quantized - vectors).detach()).permute(0, 3, 1, 2), commitment


if __name__ == "__main__":
    run_script(main)
