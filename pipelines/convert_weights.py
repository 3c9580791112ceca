"""Turns the weights of a ViT classifier or hybrid from one project's into another's; no number changes (but
those of [CLS] on the way to big_vision, where its position is added to it).

    python pipelines/convert_weights.py ViT-B_16.npz runs/vit-b16
    python pipelines/convert_weights.py google/vit-base-patch16-224 runs/vit-b16
    python pipelines/convert_weights.py runs/vit-b16 vit-b16-timm --to timm
    python pipelines/convert_weights.py vit.safetensors runs/vit --set num_heads=6 norm_eps=1e-12

SOURCE is an .npz of Google's official code or of big_vision, a file or folder of timm or of transformers 4
or 5, a folder of ours, or one of these on the Hugging Face Hub; what it is, its names tell. Weights that are
missing, unexpected or misshapen are named, and then nothing is written.
"""

import argparse
from pathlib import Path
from typing import Any, get_args

from mmvit.config import parse_value
from mmvit.data.images import parse_size
from mmvit.errors import UserError, refuse_source, run_script
from mmvit.evaluation.image_classifier import CLASSES, ImageClassifier, read_classes
from mmvit.hub import download
from mmvit.interop.files import find_ours
from mmvit.interop.vit import class_names, load_vit
from mmvit.interop.vit_export import save_vit
from mmvit.interop.vit_names import Naming
from mmvit.models.classifier import Classifier


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a file, a folder, or a repository on the Hugging Face Hub")
    parser.add_argument("out", type=Path, help="folder to write, or an .npz file for Google's code")
    parser.add_argument("--to", choices=["mmvit", *get_args(Naming)], default="mmvit")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="what is not told there: num_heads, mlp (gelu, gelu_tanh), norm_eps, stem_epsilons (official, "
        "timm), image_size, pooling; "
        "num_classes leaves its head out, and a new one of zeros takes its place",
    )  # fmt: skip
    options = parser.parse_args()
    source = Path(options.source)
    if not source.exists():
        source = download(source, ("*.json", "*.safetensors", "*.npz"))
    refuse_source(options.out, source)
    if options.to == "mmvit" and options.out.suffix in (".npz", ".safetensors", ".pth"):
        raise UserError(
            f"{options.out} is named like a file, and mmvit has folders; for an .npz add --to official"
        )
    settings = dict(map(parse_setting, options.set))
    classifier = read(source, settings)
    model = classifier.model
    if options.to == "mmvit":
        classifier.save_pretrained(options.out)
    else:
        save_vit(model, options.out, options.to, classifier.classes if classifier.named else None)
    if source.suffix == ".npz" and "mlp" not in settings:
        print(f"mlp = {model.config.core.mlp}, as the official code has it: --set mlp=gelu for the exact one")
    if not classifier.is_trained:
        print("its head is untrained: all zeros")
    core, parameters = model.config.core, sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.out}: {core.depth} layers of width {core.width}, {core.num_heads} heads, patches of "
        f"{model.config.patch_size}, {model.config.num_classes} classes, {parameters:,} parameters"
    )


def parse_setting(pair: str) -> tuple[str, Any]:
    """`num_heads=6` → ("num_heads", 6). Raises UserError for a pair that is none."""
    name, equals, text = pair.partition("=")
    if not (name and equals and text):
        raise UserError(f"--set {pair}: a setting is written NAME=VALUE, such as num_heads=6")
    return name, parse_size(text, "--set image_size") if name == "image_size" else parse_value(text)


def read(source: Path, settings: dict) -> ImageClassifier:
    """The model, with the names of its classes where the source tells them and the head is kept."""
    if (folder := find_ours(source, settings)) is not None:
        return ImageClassifier(Classifier.from_pretrained(folder), read_classes(folder / CLASSES))
    model, names = load_vit(source, **settings), class_names(source)
    is_whole = names is not None and len(names) == model.config.num_classes
    return ImageClassifier(model, names if is_whole and "num_classes" not in settings else None)


if __name__ == "__main__":
    run_script(main)
