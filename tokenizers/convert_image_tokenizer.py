"""Turns other people's image tokenizers into ours, which every script takes, and ours into theirs.

    python tokenizers/convert_image_tokenizer.py FOLDER runs/their-tokenizer
    python tokenizers/convert_image_tokenizer.py FOLDER runs/their-tokenizer --set cosine=true
    python tokenizers/convert_image_tokenizer.py encoder.pkl decoder.pkl runs/dalle-dvae
    python tokenizers/convert_image_tokenizer.py runs/their-tokenizer for-diffusers --to diffusers

FOLDER holds config.json and safetensors of a diffusers `VQModel`, or of transformers' Janus or Chameleon,
alone or inside the whole model. The two .pkl files are OpenAI's discrete VAE; nothing in them is run. Then,
for example, `pipelines/encode_images.py data/emoji data/emoji-codes --tokenizer runs/their-tokenizer`.

The way back is from a `VQGAN` of ours, which is what theirs become, to a folder for `from_pretrained` of
diffusers or transformers; or from a `DiscreteVAE` to openai, the state dicts of `dall_e.Encoder` and
`Decoder` as safetensors. Our own `VQModel` has other layers, and stays.
"""

import argparse
from pathlib import Path
from typing import Any, get_args

from mmvit.config import parse_value
from mmvit.errors import UserError, refuse_source, run_script
from mmvit.hub import write_weights
from mmvit.interop.files import find_ours
from mmvit.interop.openai_dvae import dvae_to_openai, load_openai_dvae
from mmvit.interop.vqgan import load_vqgan
from mmvit.interop.vqgan_export import VQGANFormat, save_vqgan
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.models.vqgan import VQGAN

OPENAI = ("encoder", "decoder")  # the two files of its dVAE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="a folder, or encoder.pkl decoder.pkl")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--to", choices=["mmvit", *get_args(VQGANFormat), "openai"], default="mmvit")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="settings that their config.json does not say: cosine=true for Janus codes as its authors "
        "choose them, black=0 for weights that know pixels in [0, 1]",
    )  # fmt: skip
    options = parser.parse_args()
    refuse_source(options.out, *options.source)
    settings = dict(pair.partition("=")[::2] for pair in options.set)
    if len(options.source) == 1:
        model = read_folder(options.source[0], {name: parse_value(text) for name, text in settings.items()})
    elif len(options.source) == 2 and not settings:
        model = load_openai_dvae(*options.source)
    else:
        raise UserError("give a folder, or encoder.pkl and decoder.pkl without --set, then where to write")
    write(model, options.out, options.to)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.out}: {model.kind}, {model.codebook_size} codes, one for {model.factor}x{model.factor} "
        f"pixels, {parameters:,} parameters"
    )


def read_folder(folder: Path, settings: dict[str, Any]) -> ImageTokenizer:
    """Of ours, or of others, or what `--to openai` writes."""
    parts = [folder / f"{name}.safetensors" for name in OPENAI]
    if all(part.is_file() for part in parts):
        return load_openai_dvae(*parts)
    ours = find_ours(folder, settings)
    return load_vqgan(folder, **settings) if ours is None else load_image_tokenizer(ours)


def write(model: ImageTokenizer, out: Path, to: str) -> None:
    """Raises UserError for a model of another kind than the format is for."""
    if to == "mmvit":
        model.save_pretrained(out)
        return
    kind = DiscreteVAE if to == "openai" else VQGAN
    if not isinstance(model, kind):
        raise UserError(
            f"--to {to} is for a {kind.kind}, and this is a {model.kind}, whose layers {to} does not have: "
            "it is for mmvit alone"
        )
    if to != "openai":
        save_vqgan(model, out, to)
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, weights in zip(OPENAI, dvae_to_openai(model), strict=True):
        write_weights(weights, out / f"{name}.safetensors")


if __name__ == "__main__":
    run_script(main)
