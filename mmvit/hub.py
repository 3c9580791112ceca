"""Models as folders: `save_pretrained` and `from_pretrained` with safetensors and config.json, local or from
the Hugging Face Hub."""

import hashlib
import itertools
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from mmvit.config import Config, build_config
from mmvit.errors import UserError, nearest, refuse_damage
from mmvit.files import read_bounded, read_json, write_json
from mmvit.places import find, shipped
from mmvit.sharding import outline_of, state_of
from mmvit.weights import (
    MAX_FILE_SIZE,
    WEIGHTS,
    Weights,
    check_fit,
    load_weights,
    read_weights,
    write_weights,
)

DRAWN = (
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)
SCALED = torch.Tensor.mul, torch.Tensor.div
CONFIG = "config.json"
MOST_TABLES = 2**29  # bytes of masks and fixed positions
SHIPPED = shipped("generators/emoji")
JOINT = "joint"  # the kind of a folder with several models on one core
IN_WORDS = {
    "vq": "an image tokenizer",
    "dvae": "an image tokenizer",
    "vqgan": "an image tokenizer",
    "clip": "a CLIP",
    JOINT: "several models on one core",
}


class Pretrained:
    """Mixin of an `nn.Module` whose only constructor argument is its `Config`.

    A subclass sets its `config_class` and its `kind`, a word that config.json carries to tell models apart.
    """

    config_class: type[Config]
    kind: str
    config: Config

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, max_file_size: int = MAX_FILE_SIZE
    ) -> Path:
        """Writes `folder/model.safetensors` and `folder/config.json`, with floating-point weights cast to
        `dtype` if given. Weights of more than `max_file_size` bytes become several files and an index
        (`mmvit.weights.write_weights`)."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

        folder = Path(folder)
        layout = {name: cast(tensor) for name, tensor in outline_of(self)}
        weights = ((name, cast(tensor)) for name, tensor in state_of(self))
        write_weights(layout, folder / WEIGHTS, weights, max_file_size)
        description = {"kind": self.kind, "config": self.config.model_dump(mode="json")}
        write_json(description, folder / CONFIG)
        return folder

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Builds the model from a folder, a run folder (see `find_model_folder`) or a Hub repository, in
        evaluation mode.

        Raises:
            UserError: if there is no model, it is of another kind, or weights are missing, unexpected or of
                another shape (the message names them).
        """
        folder = find_model_folder(path)
        description = read_part_description(folder, cls.kind)
        if description["kind"] != cls.kind:
            raise UserError(f"{folder} holds {in_words(description['kind'])}, not {in_words(cls.kind)}")
        is_part = read_description(folder)["kind"] != cls.kind
        with refuse_damage(folder):
            config = build_config(cls.config_class, description["config"], source=str(folder / CONFIG))
            weights = read_weights(folder / WEIGHTS)
            weights = weights_of_part(weights, cls.kind) if is_part else weights
            planned = outline(lambda: cls(config), 4 * len(weights), str(folder / CONFIG))
            check_fit(planned, weights.shapes, weights.source)
            with NotDrawn():
                model = cls(config)
            load_weights(model, weights, weights.source)
        return model.to(device).eval()


def in_words(kind: str) -> str:
    """A kind of model as error messages call it, with its article."""
    words = IN_WORDS.get(kind, f"a {kind}")
    return words if kind in words.lower() or kind == JOINT else f"{words} ({kind})"


def find_model_folder(path: str | Path) -> Path:
    """The folder with config.json that `path` stands for: itself, an export of a run, what ships with mmvit
    under that name (`tokenizers/emoji-image`), or a download from the Hub.

    Of a run it is the export that the recipe's `train.select` names: `last/` for "last", otherwise `best/`;
    the other one if that is missing.
    """
    folder = find(path)
    for candidate in (folder, *run_exports(folder)):
        if (candidate / CONFIG).is_file():
            return candidate
    if folder.exists():
        raise UserError(f"{folder} holds no model: expected {CONFIG} in it, or in its best/ or last/")
    return download(path)


def run_exports(run: Path) -> list[Path]:
    """`best/` and `last/` of a run folder, the one that its recipe selects first."""
    exports = [run / "best", run / "last"]
    return exports[::-1] if setting_of_run(run, "train", "select") == "last" else exports


def setting_of_run(run: Path, section: str, name: str) -> Any:
    """A setting of a run's recipe; None for a model alone, or what is no run."""
    try:
        return tomllib.loads(read_bounded(run / "config.toml").decode()).get(section, {}).get(name)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def trained_size(model: str | Path) -> tuple[int, int]:
    """The (height, width) of images that an image tokenizer was trained on, by the path of its run or of an
    export in it; (64, 64) for a tokenizer alone, which does not know."""
    folder = find(model)
    found = (setting_of_run(place, "data", "image_size") for place in (folder, folder.parent))
    sizes = (tuple(size) for size in found if isinstance(size, list))
    return next((size for size in sizes if [type(side) for side in size] == [int, int]), (64, 64))


def download(path: str | Path, patterns: Sequence[str] = ("*.json", "*.safetensors")) -> Path:
    """The local folder of a Hub repository's files that match `patterns`."""
    from huggingface_hub import errors, snapshot_download  # half a second, which local folders do not need

    reasons = {
        errors.HFValidationError: "not a repository name",
        errors.RepositoryNotFoundError: "the repository does not exist or is private",
        errors.LocalEntryNotFoundError: "no connection, and not downloaded before",
    }
    try:
        return Path(snapshot_download(str(path), allow_patterns=[*patterns]))
    except (*reasons, errors.HfHubHTTPError, OSError) as error:
        why = [words for kind, words in reasons.items() if isinstance(error, kind)] or [type(error).__name__]
        near = nearest_folder(Path(path))
        advice = f"; did you mean {near}?" if near else ""
        raise UserError(
            f"no model at {path}: no such folder, and it could not be downloaded from the Hugging Face Hub "
            f"({why[0]}){advice}"
        ) from None


def nearest_folder(path: Path) -> Path | None:
    """The existing folder with the most similar name, part by part: generators/emoji for generator/emojis."""
    place = Path(path.anchor)
    for name in path.relative_to(place).parts:
        if not (place / name).is_dir():
            there = [inner.name for inner in place.iterdir() if inner.is_dir()]
            name = nearest(name, there)
        if name is None:
            return None
        place = place / name
    return place


def read_description(folder: Path) -> dict:
    """The parsed config.json of a model folder: `{"kind": ..., "config": {...}}`."""
    description = read_json(folder / CONFIG)
    facts = description if isinstance(description, dict) else {}
    kind, config = facts.get("kind"), facts.get("config")
    if isinstance(kind, str) and isinstance(config, dict):
        return {"kind": kind, "config": config}
    for key, whose in {"architecture": "timm", "model_type": "transformers"}.items():
        if key in facts:
            raise UserError(f"{folder} holds a model of {whose}; convert it with: mmvit convert {folder} OUT")
    raise UserError(
        f"{folder / CONFIG} does not describe an mmvit model (expected JSON with 'kind' and 'config')"
    )


def read_part_description(folder: Path, *kinds: str) -> dict:
    """As `read_description`, but for several models on one core (mmvit.models.joint) the description of the
    first one that is of one of `kinds`."""
    description = read_description(folder)
    config = description["config"]
    if description["kind"] == JOINT:
        for kind in kinds:
            if isinstance(config.get(kind), dict):
                return {"kind": kind, "config": {**config[kind], "core": config.get("core", {})}}
    return description


def weights_of_part(weights: Weights, kind: str) -> Weights:
    """The weights of the model `kind` out of several models on one core, under the names it has alone."""
    own = f"{kind}."
    core = {name: name for name in weights if name.startswith("core.")}
    return weights.named(core | {name.removeprefix(own): name for name in weights if name.startswith(own)})


def read_core(path: str | Path) -> tuple[Path, dict, Weights]:
    """A model's folder, and the configuration and weights of its core. Raises UserError if it has none."""
    folder = find_model_folder(path)
    description = read_description(folder)
    config = description["config"].get("core")
    if not isinstance(config, dict):
        raise UserError(
            f"{folder} holds {in_words(description['kind'])}, which has no core; expected a classifier or a "
            "generator"
        )
    weights = read_weights(folder / WEIGHTS)
    own = {name.removeprefix("core."): name for name in weights if name.startswith("core.")}
    return folder, config, weights.named(own)


def outline(build: Callable[[], nn.Module], most: int, source: str) -> nn.Module:
    """The model that `build` makes, without memory for its weights, so that they can be checked first.

    Raises:
        UserError: if it has more than `most` weights, sizes beyond all numbers, or fixed tables too large.
    """
    numbers = itertools.count()

    def check(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(numbers) > most + 1000:
            raise UserError(f"{source} describes a model of far more layers than there are weights for")

    try:
        with torch.device("meta"), Undrawn(), register_module_parameter_registration_hook(check):
            model = build()
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{source} describes no model that can be built: {reason}") from error
    weights = model.state_dict()
    if (
        size := sum(table.nbytes for name, table in model.named_buffers() if name not in weights)
    ) > MOST_TABLES:
        raise UserError(
            f"{source} describes a model with tables of {size:,} bytes of at most {MOST_TABLES:,}"
        )
    return model


class NotDrawn(TorchFunctionMode):
    """Within it, new weights are zeros: where others are read over them, to draw them is half of the time."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in DRAWN:
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        return (torch.zeros if function is torch.randn else function)(*args, **kwargs)


class Undrawn(TorchFunctionMode):
    """Within it, weights are not drawn, nor scaled: on the meta device that takes seconds of imports."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_scaled = function in SCALED and isinstance(args[1], int | float)
        if is_scaled or function in DRAWN or getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits, equal for equal weights, and for equal settings where the model's class lists
    some in `fingerprinted`."""
    digest = hashlib.sha256()
    for name in getattr(model, "fingerprinted", ()):
        digest.update(f"{name}={getattr(model.config, name)};".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
