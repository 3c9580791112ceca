"""What each part of a generator buys: a recipe with one part changed at a time, at equal training FLOPs.

    mmvit encode data/emoji data/emoji-augmented --augmented 8 --shift 2
    mmvit encode data/emoji data/emoji-augmented-flipped --augmented 8 --shift 2 \\
        --flip-unless "left right clockwise counterclockwise links rechts"
    python benchmarks/modern_generator.py run --images 24000 --log modern-generator.jsonl
    python benchmarks/modern_generator.py table modern-generator.jsonl

The base is the recipe emoji_raster with a plain MLP (GELU) and without QK-norm, as it was before this study.
Held-out loss is in nats per code on the 405 held-out combinations, retrieval@1 among all images at guidance
2 (1 if captions are never dropped) and temperature 0.3; mean and 95% interval of the seeds (Student's t). A
part that makes a step more expensive gets fewer steps, a cheaper one more; Muon's own products are not
counted, but minutes are shown. The full recipe is 48,000 images: at half of them, what learns quickly looks
better than it ends.
"""

import argparse
import time
from typing import Any

from studies import ROOT, cell, flops_of, interval, missing, retrieval, run_study, train, write_log

from mmvit.errors import run_script

RECIPE = ("pipelines/train_caption_to_image.py", ROOT / "configs/emoji_raster.toml")
BATCH = 64
AUGMENTED = "data/emoji-augmented"
FLIPPED = f"{AUGMENTED}-flipped"  # every second copy, where no caption names a side, in English or German
BASE, UNGUIDED = "the base", "captions never left out"
PLAIN = ("--model.core.mlp", "gelu", "--model.core.qk_norm", "false")
CAUSAL = ("--model.attention", "causal", "--model.text_loss_weight", "1")
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "AdamW alone, 1e-3": ("--optimizer.name", "adamw", "--optimizer.lr", "1e-3"),
    "AdamW alone, 4e-3": ("--optimizer.name", "adamw", "--optimizer.lr", "4e-3"),
    "embeddings and head at 6e-3": ("--optimizer.lr", "6e-3"),
    "embeddings and head at 2e-2": ("--optimizer.lr", "2e-2"),
    "embeddings and head at 2e-2, dropout 0.2, code noise 0.1": (
        "--optimizer.lr", "2e-2", "--model.core.dropout", "0.2", "--model.code_noise", "0.1",
    ),
    "hidden layers at 5e-3": ("--optimizer.muon_lr", "5e-3"),
    "2-D rotary": ("--model.positions", "rotary_2d"),
    "RMSNorm": ("--model.core.norm", "rmsnorm"),
    "SwiGLU": ("--model.core.mlp", "swiglu"),
    "QK-norm": ("--model.core.qk_norm", "true"),
    "SwiGLU, no dropout": ("--model.core.mlp", "swiglu", "--model.core.dropout", "0"),
    "SwiGLU, QK-norm": ("--model.core.mlp", "swiglu", "--model.core.qk_norm", "true"),
    "SwiGLU, QK-norm, dropout 0.2": (
        "--model.core.mlp", "swiglu", "--model.core.qk_norm", "true", "--model.core.dropout", "0.2",
    ),
    "zero-initialised head, random codes": ("--start.codebook", "false"),
    "no dropout": ("--model.core.dropout", "0"),
    "dropout 0.2": ("--model.core.dropout", "0.2"),
    UNGUIDED: ("--model.caption_dropout", "0", "--preview.guidance_scale", "1"),
    "code noise 0.1": ("--model.code_noise", "0.1"),
    "label smoothing 0.1": ("--model.label_smoothing", "0.1"),
    "BPE dropout 0.1": ("--data.bpe_dropout", "0.1", "--model.text_length", "24"),  # captions get longer
    "half of the images shifted": ("--data.augmented", "0.5", "--data.train", f"{AUGMENTED}/train-*.tar"),
    "half of the images shifted or flipped": (
        "--data.augmented", "0.5", "--data.train", f"{FLIPPED}/train-*.tar",
    ),
    "causal captions, 1 : 7": CAUSAL,
    "DALL·E's attention, 1 : 7": ("--model.attention", "dalle", "--model.convolution", "7", *CAUSAL[2:]),
}  # fmt: skip


def main() -> None:
    budget = {"images": 24_000, "of": "the base", "seeds": 2}
    run_study(__doc__, "modern-generator", measure, show, **budget, variants=VARIANTS)


def measure(options: argparse.Namespace) -> None:
    total = flops_of(*RECIPE, PLAIN) * options.images
    for seed, name in missing(options, options.only):
        began = time.monotonic()
        settings = (*PLAIN, *VARIANTS[name])
        steps = round(total / flops_of(*RECIPE, settings) / BATCH)
        out = options.runs / f"{options.images}" / f"{name.replace(' ', '-')}-{seed}"
        found = train(*RECIPE, out, steps, "--train.seed", seed, "--preview.captions", "[]", *settings)
        minutes = (time.monotonic() - began) / 60
        guidance = 1 if name == UNGUIDED else 2
        record = {
            "variant": name, "seed": seed, "images": options.images, "steps": steps, "flops": total,
            "loss": found["image_loss"], "retrieval": retrieval(out, "--guidance-scale", guidance),
            "minutes": minutes,
        }  # fmt: skip
        write_log(options.log, record)


def show(records: list[dict[str, Any]]) -> None:
    print("| | nats per code | against the base | retrieval@1 | against the base | minutes |")
    print("|---|---|---|---|---|---|")
    base_records = {r["seed"]: r for r in records if r["variant"] == BASE}
    for name in dict.fromkeys(record["variant"] for record in records):
        print(row_of(name, [record for record in records if record["variant"] == name], base_records))


def row_of(name: str, records: list[dict[str, Any]], base_records: dict[int, dict[str, Any]]) -> str:
    cells = [name]
    for figure, scale, digits in (("loss", 1, 3), ("retrieval", 100, 1)):
        bases = {seed: record[figure] for seed, record in base_records.items()}
        gains = [scale * (r[figure] - bases[r["seed"]]) for r in records if r["seed"] in bases]
        cells += [cell([scale * record[figure] for record in records], digits), cell(gains, digits, "+")]
    minutes, _ = interval([record["minutes"] for record in records])
    return f"| {' | '.join([*cells, f'{minutes:.1f}'])} |"


if __name__ == "__main__":
    run_script(main)
