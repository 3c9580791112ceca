"""Other projects' weight files: read without running what is in them, refused by the name of what does not
fit."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmvit.errors import UserError, shorten
from mmvit.files import check_unpacked_size, read_json
from mmvit.hub import CONFIG, run_exports
from mmvit.weights import read_weights


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a config.json. Raises UserError if it is missing or not a JSON object."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: expected the settings of a model as a JSON object, got a {type(config).__name__}"
        )
    return config


def find_ours(path: Path, settings: Mapping[str, Any]) -> Path | None:
    """The folder of a model of ours, `path` itself or an export of a run; None if it is another project's.
    Raises UserError for `settings` of a model of ours, which needs none."""
    for folder in (path, *run_exports(path)):
        if (folder / CONFIG).is_file() and "kind" in read_config(folder / CONFIG):
            if settings:
                raise UserError(f"{folder} is an mmvit model, which says everything itself: leave --set out")
            return folder
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .npz, .pth or .bin file by name; of a training checkpoint those of its
    `model` or `state_dict`. Nothing but tensors is unpickled."""
    if path.suffix == ".safetensors":
        return dict(read_weights(path))
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        check_unpacked_size(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged or holds more than tensors; nothing else is unpickled") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not a file of weights: {type(error).__name__}") from None
    for key in ("model", "state_dict"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict: expected names mapped to tensors")
    return dict(weights)


def refuse_spread(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError for tensors larger than what is stored of them, which a model would need whole."""
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, of which fewer numbers are stored")


def refuse_misfits(expected: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor], whose: str) -> None:
    """Raises UserError for `weights` that are missing, unexpected or not of the `expected` shape, by name.
    The message begins with `whose` they are."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        raise UserError(f"{whose} do not fit: {shorten(problems, separator='; ')}")
