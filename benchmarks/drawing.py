"""How a generator draws: quality and seconds against forwards, and the order of its codes.

    python benchmarks/drawing.py curve runs/emoji-demo data/emoji
    python benchmarks/drawing.py ways runs/emoji-demo data/emoji
    python benchmarks/drawing.py int8 runs/emoji-demo data/emoji
    python benchmarks/drawing.py drafts generators/emoji
    python benchmarks/drawing.py speed

`curve`: retrieval@1 and @5 of the held-out captions of emoji by an any-order generator, for numbers of
forwards and temperatures. `ways`: other orders of drawing, sizes of groups and guidance, which the library
does not have, in 8 and 4 forwards. `int8`: seconds and retrieval with the transformer's weights in 8 bits
(torch's dynamic quantization) beside float32, alternating, one thread. `drafts`: forwards and seconds of a
raster generator for one image, with and without drafts. `speed`: seconds for 256 codes at the size of
dalle-pytorch's example, random weights. Seed 0, guidance 2 where nothing else is said.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mmvit import Generator
from mmvit.core.transformer import TransformerConfig
from mmvit.data.samples import CaptionSample, PixelsSample
from mmvit.errors import UserError, run_script
from mmvit.evaluation.held_out import HeldOut
from mmvit.evaluation.retrieval import pixel_ranks, recall
from mmvit.evaluation.splits import read_split
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.sampling import decoding
from mmvit.sampling.decoding import GuidedBatch, decode, draw, filter_logits, sample_codes, uniforms

FORWARDS = (64, 16, 8, 4, 2, 1)
CAPTIONS = (
    "woman astronaut dark skin tone", "thumbs up medium skin tone", "red apple", "dog face", "rocket",
    "man biking medium-dark skin tone", "grinning face", "flag: Japan",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("curve", "ways", "int8"):
        command = commands.add_parser(name)
        command.add_argument("generator", help="a run or a generator's folder")
        command.add_argument("data", type=Path, help="a folder of shards with images and captions")
        command.add_argument("--split", default="combinations", help="(%(default)s)")
    commands.add_parser("drafts").add_argument("generator")
    commands.add_parser("speed")
    options = parser.parse_args()
    if options.command == "speed":
        speed()
        return
    generator = Generator.from_pretrained(options.generator)
    if options.command == "drafts":
        drafts(generator)
        return
    if options.command != "int8" and generator.transformer.config.order != "any":
        raise UserError(f"{options.generator} draws in raster order: this compares ways of any order")
    real = read_split(options.data, "*", PixelsSample(generator.size))
    held_out = HeldOut.of(read_split(options.data, options.split, CaptionSample()), real, [])
    print(f"{len(held_out.own)} captions among {len(held_out.everything)} images\n")
    {"curve": curve, "ways": ways, "int8": int8}[options.command](generator, held_out)


def cells_of(generator: Generator, held_out: HeldOut, codes: Tensor) -> str:
    pixels = torch.cat([generator.decode(part) for part in codes.split(64)]).cpu()
    ranks = pixel_ranks(pixels, held_out.everything, held_out.own)
    return f"{recall(ranks, 1):.1%} | {recall(ranks, 5):.1%}"


def curve(generator: Generator, held_out: HeldOut) -> None:
    print("| forwards | temperature | retrieval@1 | @5 | seconds, 1 image | 16 images |")
    print("|---|---|---|---|---|---|")
    places = generator.transformer.config.num_codes
    for steps in (steps for steps in FORWARDS if steps <= places):
        alone, together = (
            median_seconds(lambda n=n, k=steps: generator.generate_codes("red apple", n, num_steps=k))
            for n in (1, 16)
        )
        for temperature in (0.3, 1.0):
            codes = generator.generate_codes(
                held_out.captions, num_steps=steps, temperature=temperature, guidance_scale=2.0, seed=0
            )
            cells = cells_of(generator, held_out, codes)
            print(f"| {steps} | {temperature} | {cells} | {alone:.2f} | {together:.2f} |", flush=True)


def int8(generator: Generator, held_out: HeldOut) -> None:
    """Codes, whole images and retrieval with linear layers in 8 bits, their inputs as they come."""
    torch.set_num_threads(1)
    quantized = copy.deepcopy(generator)
    with warnings.catch_warnings(action="ignore"):  # torch announces its move to another package
        quantized.transformer = torch.ao.quantization.quantize_dynamic(
            quantized.transformer, {nn.Linear}, dtype=torch.qint8
        )
    both = (generator, quantized)
    few = (8, 4, 1) if generator.transformer.config.order == "any" else (None,)
    print("| forwards | images | codes, float32, s | int8 | times | images, float32, s | int8 | times |")
    print("|---|---|---|---|---|---|---|---|")
    for steps in few:
        for number in (1, 4, 16):
            row: list[str] = []
            for way in ("generate_codes", "generate"):
                calls = [
                    partial(getattr(each, way), CAPTIONS[:1], number, num_steps=steps, guidance_scale=2.0)
                    for each in both
                ]
                pairs = [[median_seconds(call, 1) for call in calls] for _ in range(7)]
                seconds = [statistics.median(each) for each in zip(*pairs, strict=True)]
                ratio = statistics.median(slow / fast for slow, fast in pairs)
                row += [*(f"{each:.3f}" for each in seconds), f"{ratio:.2f}"]
            print(f"| {steps or 'drafts'} | {number} | {' | '.join(row)} |", flush=True)
    print("\n| forwards | retrieval@1 | @5 | in int8 | @5 | codes that are the same |")
    print("|---|---|---|---|---|---|")
    for steps in few:
        codes = [
            each.generate_codes(
                held_out.captions, num_steps=steps, temperature=0.3, guidance_scale=2.0, seed=0
            )
            for each in both
        ]
        same = (codes[0] == codes[1]).double().mean()
        cells = " | ".join(cells_of(generator, held_out, each) for each in codes)
        print(f"| {steps or 'drafts'} | {cells} | {same:.1%} |", flush=True)


def ways(generator: Generator, held_out: HeldOut) -> None:
    model = generator.transformer
    ids, _ = generator.text_tokenizer.encode(held_out.captions, model.config.text_length)
    variants: dict[str, dict[str, object]] = {
        "random order, few codes first, guidance 2": {},
        "the most confident first": {"noise": 0.0},
        "the most confident first, falling noise": {"noise": 1.0},
        "far from what is known first": {"far": True},
        "groups of one size": {"power": 1.0},
        "groups that grow faster (cubic)": {"power": 3.0},
        "guidance 1": {"scale": 1.0},
        "guidance 3": {"scale": 3.0},
        "guidance rising from 1 to 3": {"scale": 3.0, "rises": True},
    }
    print("| | forwards | retrieval@1 | @5 |\n|---|---|---|---|")
    for steps in (8, 4):
        for name, how in variants.items():
            parts = [draw_another_way(model, part, steps, **how) for part in ids.split(64)]
            cells = cells_of(generator, held_out, torch.cat(parts).view(-1, *model.config.grid))
            print(f"| {name} | {steps} | {cells} |", flush=True)


@torch.inference_mode()
def draw_another_way(
    model: GeneratorTransformer,
    caption_ids: Tensor,
    steps: int,
    *,
    noise: float | None = None,
    far: bool = False,
    power: float | None = None,
    scale: float = 2.0,
    rises: bool = False,
    temperature: float = 0.3,
) -> Tensor:
    """Codes (batch, places), like `decoding.decode_any_order` but for these:

    Args:
        noise: the likeliest codes first, with so much Gumbel noise on their log-probability, which falls to
            0 (MaskGIT, 2202.04200); None draws in random order.
        far: codes far from those that are known first.
        power: by step k, (k / steps) ** power of the codes are drawn; None follows the cosine.
        rises: guidance grows from 1 to `scale` with the share of codes that are known.
    """
    batch, places = len(caption_ids), model.config.num_codes
    numbers = uniforms([0] * batch, 2 * places)
    gumbel = torch.Generator().manual_seed(0)
    codes, known = torch.zeros(batch, places, dtype=torch.long), torch.zeros(batch, places, dtype=torch.bool)
    distance = distances(model.config.grid)
    shares = torch.linspace(0, 1, steps + 1)
    shares = 1 - (shares * torch.pi / 2).cos() if power is None else shares**power
    bounds = torch.maximum((shares * places).round().long(), torch.arange(steps + 1)).tolist()
    for start, end in pairwise(bounds):
        now = 1 + (scale - 1) * start / places if rises else scale
        prompts = GuidedBatch(caption_ids, now)
        repeat = len(prompts.ids) // batch
        captions = model.embed_captions(prompts.ids)
        if model.config.attention == "prefix":
            captions = model.new_cache(len(prompts.ids))
            model.prefill(prompts.ids, captions)
        seen = model.read_codes(codes.repeat(repeat, 1), ~known.repeat(repeat, 1), captions)
        logits = prompts.combine(model.image_head(seen)).flatten(0, 1)
        drawn = draw(filter_logits(logits, temperature), numbers[:, :places].flatten()).view(batch, places)
        score = -numbers[:, places:].float()
        if noise is not None:
            score = logits.float().log_softmax(-1).gather(1, drawn.view(-1, 1)).view(batch, places)
            uniform = torch.rand(batch, places, generator=gumbel).clamp(1e-9, 1 - 1e-7)
            score = score - noise * (1 - start / places) * (-uniform.log()).log()
        chosen = torch.zeros_like(known)
        for _ in range(end - start if far else 1):
            if far:  # one after the other, as each changes what is far
                hidden = (known | chosen).unsqueeze(1)
                nearest = distance.expand(batch, -1, -1).masked_fill(~hidden, 1e3).amin(2)
                score = nearest - numbers[:, places:].float()
            left = score.masked_fill(known | chosen, -torch.inf)
            chosen.scatter_(1, left.topk(1 if far else end - start, dim=1).indices, True)
        codes, known = torch.where(chosen, drawn, codes), known | chosen
    return codes


def distances(grid: tuple[int, int]) -> Tensor:
    """Between all places of a grid, (places, places)."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
    return torch.cdist(places, places)


def drafts(generator: Generator) -> None:
    model = generator.transformer
    ids, _ = generator.text_tokenizer.encode(CAPTIONS, model.config.text_length)
    print("| temperature | guidance | codes drafted | forwards | seconds | times as fast |")
    print("|---|---|---|---|---|---|")
    for temperature in (0.3, 1.0):
        for scale in (1.0, 2.0):
            baseline: tuple[Tensor, float] | None = None
            for most in (1, 4, 16):
                decoding.MOST_DRAFTED = most
                began, forwards, drawn = time.perf_counter(), 0, []
                for i in range(len(ids)):
                    *steps, last = decode(model, ids[i : i + 1], [i], scale, temperature=temperature)
                    forwards += len(steps) + 1
                    drawn.append(last.codes)
                seconds = (time.perf_counter() - began) / len(ids)
                baseline = baseline or (torch.cat(drawn), seconds)
                if not torch.equal(torch.cat(drawn), baseline[0]):
                    raise UserError("drafts changed what is drawn")
                row = (temperature, scale, most, f"{forwards / len(ids):.1f}", f"{seconds:.2f}")
                print(f"| {' | '.join(map(str, row))} | {baseline[1] / seconds:.1f} |", flush=True)


def speed() -> None:
    """Width 384, depth 8, 32 text tokens and 256 codes, as dalle-pytorch is measured by its peers' script."""
    core = TransformerConfig(width=384, depth=8, num_heads=6)
    shape = {"vocab_size": 4096, "text_length": 32, "codebook_size": 1024, "grid": (16, 16), "core": core}
    decoding.MOST_DRAFTED = 1  # with random weights drafts say nothing
    print("| | forwards | images | guidance | seconds | codes/s |\n|---|---|---|---|---|---|")
    few = (24, 16, 8, 4, 2, 1)
    for order, attention, forwards in (
        ("raster", "prefix", (256,)),
        ("any", "full", few),
        ("any", "prefix", few),
    ):
        torch.manual_seed(0)
        config = GeneratorConfig(order=order, attention=attention, text_loss_weight=0.0, **shape)
        model = GeneratorTransformer(config).eval()
        for steps in forwards:
            how = {} if order == "raster" else {"num_steps": steps}
            for images, scale in ((1, 1.0), (1, 2.0), (16, 1.0)):
                ids = torch.randint(1, 4096, (images, 32))
                draw_codes = partial(sample_codes, model, ids, [*range(images)], scale, **how)
                seconds = median_seconds(draw_codes)
                row = (f"{order}, {attention}", steps, images, scale, f"{seconds:.2f}")
                print(f"| {' | '.join(map(str, row))} | {256 * images / seconds:,.0f} |", flush=True)


def median_seconds(function: Callable[[], object], repetitions: int = 3) -> float:
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    run_script(main)
