"""Convert the weights of other projects to mmvit, and those of mmvit to other projects.

    mmvit convert google/vit-base-patch16-224 runs/vit-b16
    mmvit convert runs/vit-b16 vit-b16-timm --to timm

What the source is decides what is done. ViT classifiers and ResNet hybrids: an .npz of Google's official code
or of big_vision, a file or folder of timm or of transformers 4 or 5. Image tokenizers: a folder of diffusers'
VQModel, of transformers' Janus or Chameleon, alone or inside the whole model; or OpenAI's discrete VAE:

    mmvit convert encoder.pkl decoder.pkl runs/dalle-dvae

A source may also be a repository on the Hugging Face Hub, or an mmvit model. No number changes (except that
big_vision has no position for [CLS], which is added to its token on the way there), and nothing pickled is
run. Weights that are missing, unexpected or of another shape are named, and then nothing is written. Our own
VQ and FSQ tokenizers have layers that no other project has.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.config import parse_value
from mmvit.data.images import parse_size
from mmvit.errors import UserError, refuse_source
from mmvit.evaluation.image_classifier import CLASSES, ImageClassifier, read_classes
from mmvit.files import check_writable
from mmvit.hub import download, in_words, read_part_description
from mmvit.interop.files import find_ours
from mmvit.interop.openai_dvae import dvae_to_openai, load_openai_dvae
from mmvit.interop.vit import class_names, load_vit
from mmvit.interop.vit_export import save_vit
from mmvit.interop.vit_names import Naming
from mmvit.interop.vqgan import holds_vqgan, load_vqgan
from mmvit.interop.vqgan_export import VQGANFormat, save_vqgan
from mmvit.models.classifier import Classifier
from mmvit.models.dvae import DiscreteVAE
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import IMAGE_TOKENIZERS, load_image_tokenizer
from mmvit.models.vqgan import VQGAN
from mmvit.places import find
from mmvit.weights import write_weights

OURS, OPENAI = "mmvit", "openai"
FORMATS = {  # which models go where
    **dict.fromkeys(get_args(Naming), Classifier),
    **dict.fromkeys(get_args(VQGANFormat), VQGAN),
    OPENAI: DiscreteVAE,
}
OPENAI_PARTS = ("encoder", "decoder")  # the two files of its dVAE
FILES = (".npz", ".safetensors", ".pth")


def main(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="SOURCE... OUT",
            help="what to convert, a file, a folder, a Hub repository or two .pkl files; and the folder to "
            "write, for Google's code an .npz file",
        ),
    ],
    to: Annotated[Literal[OURS, *FORMATS], Option(help="the project to convert to")] = OURS,
    set_: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="what the source does not say, repeatable. Of a ViT: num_heads, mlp (gelu, gelu_tanh), "
            "norm_eps, stem_epsilons (official, timm), image_size, pooling, and num_classes, which replaces "
            "its head by a new one of zeros. Of a tokenizer: cosine=true for Janus codes as its authors "
            "choose them, black=0 for weights that expect pixels in [0, 1]",
        ),
    ] = None,
) -> None:
    *sources, out = paths
    if not 1 <= len(sources) <= 2:
        raise UserError("expected SOURCE OUT, or encoder.pkl decoder.pkl OUT")
    settings = dict(map(parse_setting, set_ or []))
    if to == OURS and out.suffix in FILES:
        raise UserError(
            f"{out} is named like a file, but mmvit writes folders; for an .npz add --to official"
        )
    refuse_source(out, *sources)
    check_writable(out)
    model = read(sources, settings)
    network = model.model if isinstance(model, ImageClassifier) else model
    if to == OURS:
        model.save_pretrained(out)
    elif not isinstance(network, FORMATS[to]):
        raise UserError(
            f"--to {to}: expected {in_words(FORMATS[to].kind)}, got {in_words(network.kind)}, whose layers "
            f"{to} does not have"
        )
    elif isinstance(model, ImageClassifier):
        save_vit(network, out, to, model.classes if model.named else None)
    elif to == OPENAI:
        save_openai_dvae(network, out)
    else:
        save_vqgan(network, out, to)
    describe(model, out, is_official="mlp" not in settings and sources[0].suffix == ".npz")


def parse_setting(pair: str) -> tuple[str, Any]:
    """`num_heads=6` → ("num_heads", 6). Raises UserError for anything else."""
    name, equals, text = pair.partition("=")
    if not (name and equals and text):
        raise UserError(f"--set {pair}: expected NAME=VALUE, such as num_heads=6")
    return name, parse_size(text, "--set image_size") if name == "image_size" else parse_value(text)


def read(sources: list[Path], settings: dict[str, Any]) -> ImageClassifier | ImageTokenizer:
    """The model in the sources, of whichever project they are."""
    if len(sources) == 2:
        if settings:
            raise UserError("--set does not apply to encoder.pkl and decoder.pkl, which say everything")
        return load_openai_dvae(*sources)
    source = find(sources[0])
    if not source.exists():
        source = download(sources[0], ("*.json", "*.safetensors", "*.npz"))
    parts = [source / f"{name}.safetensors" for name in OPENAI_PARTS]
    if all(part.is_file() for part in parts):
        return load_openai_dvae(*parts)
    if (folder := find_ours(source, settings)) is not None:
        kind = read_part_description(folder, Classifier.kind)["kind"]
        if kind in IMAGE_TOKENIZERS:
            return load_image_tokenizer(folder)
        if kind != Classifier.kind:
            raise UserError(
                f"{folder} holds {in_words(kind)}; expected a ViT classifier or an image tokenizer"
            )
        return ImageClassifier(Classifier.from_pretrained(folder), read_classes(folder / CLASSES))
    if holds_vqgan(source):
        return load_vqgan(source, **settings)
    model, names = load_vit(source, **settings), class_names(source)
    is_whole = names is not None and len(names) == model.config.num_classes
    return ImageClassifier(model, names if is_whole and "num_classes" not in settings else None)


def save_openai_dvae(model: DiscreteVAE, out: Path) -> None:
    """Writes the state dicts of `dall_e.Encoder` and `Decoder` as safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    for name, weights in zip(OPENAI_PARTS, dvae_to_openai(model), strict=True):
        write_weights(weights, out / f"{name}.safetensors")


def describe(model: ImageClassifier | ImageTokenizer, out: Path, is_official: bool) -> None:
    """Prints what was written, and what is not obvious about it."""
    network = model.model if isinstance(model, ImageClassifier) else model
    parameters = f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters"
    if network is model:
        place = f"{model.factor}x{model.factor} pixels"
        print(f"{out}: {model.kind}, {model.codebook_size} codes, one for {place}, {parameters}")
        return
    config, core = network.config, network.config.core
    if is_official:
        print(f"mlp = {core.mlp}, as in the official code: --set mlp=gelu for the exact one")
    if not model.is_trained:
        print("its head is untrained: all zeros")
    print(
        f"{out}: {core.depth} layers of width {core.width}, {core.num_heads} heads, patches of "
        f"{config.patch_size}, {config.num_classes} classes, {parameters}"
    )


if __name__ == "__main__":
    run_script(main)
