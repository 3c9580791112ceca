"""OpenAI's published discrete VAE, `encoder.pkl` and `decoder.pkl` of openai/DALL-E, in and out.

    model = load_openai_dvae("encoder.pkl", "decoder.pkl")
    model.save_pretrained("openai-dvae")

The files are pickled modules, read by torch's restricted unpickler, which runs none of their code: every
class that they name becomes an `Inert` object, from which the weights are collected. (Files in the format of
torch before 1.6 cannot be read this way.)
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvit.errors import UserError, refuse_damage
from mmvit.files import check_unpacked_size
from mmvit.hub import outline
from mmvit.interop.files import refuse_misfits, refuse_spread
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.weights import read_weights

CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


class Inert:
    """A stand-in for an object of any class that keeps only its attributes."""


def load_openai_dvae(encoder: str | Path, decoder: str | Path) -> DiscreteVAE:
    """The model in both files, in evaluation mode; its sizes are those of the weights.

    Raises:
        UserError: for a file that is missing or not a pickled module of openai/DALL-E, and for weights that
            are missing, unexpected, or of shapes that do not fit each other, by name.
    """
    with refuse_damage(f"{encoder} or {decoder}"):
        return dvae_from_openai(read_module(Path(encoder)), read_module(Path(decoder)))


def read_module(path: Path) -> dict[str, Tensor]:
    """The weights of a pickled module by dotted name."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix == ".safetensors":  # a state dict, as `dvae_to_openai` gives it
        return dict(read_weights(path))
    try:
        check_unpacked_size(path)
        with torch.serialization.safe_globals([(Inert, name) for name in CLASSES]):
            module = torch.load(path, map_location="cpu", weights_only=True)
        weights = dict(collect(module, ""))
    except UserError:
        raise
    except Exception as error:
        said = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))  # not torch's advice to trust it
        reason = said[1] if said else type(error).__name__
        raise UserError(f"{path} is not an encoder.pkl or decoder.pkl of openai/DALL-E: {reason}") from None
    if not weights:
        raise UserError(f"{path} holds no weights: expected a module, got a {type(module).__name__}")
    refuse_spread(weights, path)
    return weights


def collect(module: Any, path: str) -> list[tuple[str, Tensor]]:
    """The parameters of an inert module and of the modules inside it."""
    attributes = getattr(module, "__dict__", {})
    found = [
        (path + name, parameter.detach())
        for name, parameter in attributes.get("_parameters", {}).items()
        if isinstance(parameter, Tensor)
    ]
    for name, inner in attributes.get("_modules", {}).items():
        found += collect(inner, f"{path}{name}.")
    return found


def dvae_from_openai(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> DiscreteVAE:
    """A `DiscreteVAE` made from state dicts of `dall_e.Encoder` and `dall_e.Decoder`."""
    weights = {
        **{f"encoder.{our_name(name)}": tensor for name, tensor in encoder.items()},
        **{f"decoder.{our_name(name)}": tensor for name, tensor in decoder.items()},
    }
    try:
        config = DiscreteVAEConfig(
            codebook_size=len(weights["encoder.head.weight"]),
            width=len(weights["encoder.stem.weight"]),
            code_width=len(weights["decoder.stem.weight"]),
            blocks_per_group=len({n.split(".")[3] for n in weights if n.startswith("encoder.groups.0.")}),
        )
    except KeyError as error:
        raise UserError(f"OpenAI's weights lack {error.args[0]}; is one file a copy of the other?") from None
    own = outline(lambda: DiscreteVAE(config), 4 * len(weights), "OpenAI's weights").state_dict()
    refuse_misfits(
        {name: t.shape for name, t in own.items() if name != "passes"}, weights, "OpenAI's weights"
    )
    model = DiscreteVAE(config)
    model.load_state_dict({**weights, "passes": model.passes})
    return model.eval()


def dvae_to_openai(model: DiscreteVAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of `dall_e.Encoder` and `dall_e.Decoder`: the inverse of `dvae_from_openai`."""
    halves: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in model.state_dict().items():
        half, _, rest = name.partition(".")
        if half in halves:
            halves[half][their_name(rest)] = tensor
    return halves["encoder"], halves["decoder"]


def our_name(name: str) -> str:
    """`blocks.group_2.block_1.res_path.conv_3.w` → `groups.1.0.convolutions.2.weight`."""
    name = re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name.removeprefix("blocks.")))
    name = name.replace("input.", "stem.", 1).replace("output.conv.", "head.", 1)
    name = name.replace(".id_path.", ".skip.").replace(".res_path.", ".convolutions.")
    for word, ours in (("group", "groups."), ("block", ""), ("conv", "")):
        name = re.sub(rf"\b{word}_(\d+)", lambda found, ours=ours: f"{ours}{int(found[1]) - 1}", name)
    return name


def their_name(name: str) -> str:
    """The inverse of `our_name`."""
    name = re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name))
    name = name.replace("stem.", "input.", 1).replace("head.", "output.conv.", 1)
    name = re.sub(r"groups\.(\d+)\.(\d+)\.", lambda n: f"group_{int(n[1]) + 1}.block_{int(n[2]) + 1}.", name)
    name = re.sub(r"convolutions\.(\d+)", lambda n: f"res_path.conv_{int(n[1]) + 1}", name)
    return "blocks." + name.replace("skip.", "id_path.", 1)
