"""Turns other people's image tokenizers into a folder of ours, which every script takes.

    python tokenizers/convert_image_tokenizer.py FOLDER runs/their-tokenizer
    python tokenizers/convert_image_tokenizer.py FOLDER runs/their-tokenizer --set cosine=true
    python tokenizers/convert_image_tokenizer.py encoder.pkl decoder.pkl runs/dalle-dvae

FOLDER holds config.json and safetensors of a diffusers `VQModel`, or of transformers' Janus or Chameleon,
alone or inside the whole model. The two .pkl files are OpenAI's discrete VAE; nothing in them is run. Then,
for example, `pipelines/encode_images.py data/emoji data/emoji-codes --tokenizer runs/their-tokenizer`.
"""

import argparse
from pathlib import Path

from mmvit.config import parse_value
from mmvit.errors import UserError, run_script
from mmvit.interop.openai_dvae import load_openai_dvae
from mmvit.interop.vqgan import load_vqgan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="a folder, or encoder.pkl decoder.pkl")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="settings that their config.json does not say: cosine=true for Janus codes as its authors "
        "choose them, black=0 for weights that know pixels in [0, 1]",
    )  # fmt: skip
    options = parser.parse_args()
    if options.out.resolve() in {source.resolve() for source in options.source}:
        raise UserError(f"{options.out} is the source itself; name another folder to write")
    settings = dict(pair.partition("=")[::2] for pair in options.set)
    if len(options.source) == 1:
        model = load_vqgan(options.source[0], **{name: parse_value(text) for name, text in settings.items()})
    elif len(options.source) == 2 and not settings:
        model = load_openai_dvae(*options.source)
    else:
        raise UserError("give a folder, or encoder.pkl and decoder.pkl without --set, then where to write")
    model.save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.out}: {model.kind}, {model.codebook_size} codes, one for {model.factor}x{model.factor} "
        f"pixels, {parameters:,} parameters"
    )


if __name__ == "__main__":
    run_script(main)
