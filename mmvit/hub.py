"""Models as folders: `save_pretrained` and `from_pretrained` with safetensors and config.json, local or from
the Hugging Face Hub."""

import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmvit.config import Config, build_config
from mmvit.errors import UserError, nearest
from mmvit.places import find, shipped

WEIGHTS, CONFIG = "model.safetensors", "config.json"
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

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes `folder/model.safetensors` and `folder/config.json`, with floating-point weights cast to
        `dtype` if given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        if dtype is not None:
            weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
        write_weights(weights, folder / WEIGHTS)
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
        model = cls(build_config(cls.config_class, description["config"], source=str(folder / CONFIG)))
        weights = read_weights(folder / WEIGHTS)
        if read_description(folder)["kind"] != cls.kind:
            weights = weights_of_part(weights, cls.kind)
        load_weights(model, weights, source=str(folder / WEIGHTS))
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
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get(section, {}).get(name)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError):
        return None


def trained_size(model: str | Path) -> tuple[int, int]:
    """The (height, width) of images that an image tokenizer was trained on, by the path of its run or of an
    export in it; (64, 64) for a tokenizer alone, which does not know."""
    folder = find(model)
    found = (setting_of_run(place, "data", "image_size") for place in (folder, folder.parent))
    return next((tuple(size) for size in found if size), (64, 64))


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
    description: Any = None
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, config = description["kind"], description["config"]
        if not (isinstance(kind, str) and isinstance(config, dict)):
            raise TypeError
        return {"kind": kind, "config": config}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        whose = {"architecture": "timm", "model_type": "transformers"}
        for key in whose.keys() & (description if isinstance(description, dict) else {}):
            raise UserError(
                f"{folder} holds a model of {whose[key]}; convert it with: mmvit convert {folder} OUT"
            ) from None
        raise UserError(
            f"{folder / CONFIG} does not describe an mmvit model (expected JSON with 'kind' and 'config')"
        ) from None


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


def weights_of_part(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights of the model `kind` out of several models on one core, under the names it has alone."""
    core = {name: tensor for name, tensor in weights.items() if name.startswith("core.")}
    own = f"{kind}."
    return core | {name.removeprefix(own): t for name, t in weights.items() if name.startswith(own)}


def read_core(path: str | Path) -> tuple[Path, dict, dict[str, torch.Tensor]]:
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
    own = {name.removeprefix("core."): t for name, t in weights.items() if name.startswith("core.")}
    return folder, config, own


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def check_writable(path: Path, megabytes: float = 1) -> None:
    """Raises UserError if `path`, a file or folder to be, cannot be written, or its disk is full.

    Nothing is left behind: missing parent folders are made when there is something to write.
    """
    if path.is_dir():
        folder = path
    else:
        folder = path.parent
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(round(megabytes * 1e6)))
            probe.flush()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror} ({folder})") from None


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file, whole or not at all."""
    with whole_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        partial.chmod(0o644)  # safetensors makes files that nobody else can read


def write_json(value: Any, path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, with the same suffix, to write to; the file then takes its place.
    Makes the folder.

    Raises:
        UserError: if that fails, for instance on a full disk; `path` is then as before and nothing is left
            behind.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copies `weights` into `model`. Raises UserError for names and shapes that do not match, by name; empty
    tensors that the model lacks are ignored."""
    own = model.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if tensor.numel() or name in own}
    problems = []
    if missing := sorted(own.keys() - weights.keys()):
        problems.append(f"missing: {shorten(missing)}")
    if unexpected := sorted(weights.keys() - own.keys()):
        problems.append(f"unexpected: {shorten(unexpected)}")
    misshapen = [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if misshapen:
        problems.append(shorten(misshapen))
    if problems:
        raise UserError(f"{source} does not fit this {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(weights)


def shorten(names: list[str], most: int = 5, separator: str = ", ") -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


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
