"""Weights in one safetensors file, or in several with an index as in Hugging Face's libraries: written and
read one tensor at a time, so that a model is never in memory twice."""

import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmvit.errors import UserError, shorten
from mmvit.files import MOST_JSON, partial_of, read_json, whole_file
from mmvit.sharding import outline_of, whole

WEIGHTS = "model.safetensors"
MAX_FILE_SIZE = 5 * 10**9  # bytes of tensors in a file, as in transformers
DTYPES = {  # in the order of safetensors, which puts the widest numbers of a file first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor is: its file and first byte there, and what its bytes mean."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Mapping[str, Tensor]):
    """The tensors in a model's files by name, each of which is read anew whenever it is asked for."""

    def __init__(self, stored: Mapping[str, Stored], source: str):
        self.stored, self.source = stored, source

    def __getitem__(self, name: str) -> Tensor:
        path, start, shape, dtype = self.stored[name]
        tensor = torch.empty(shape, dtype=dtype)
        try:
            with path.open("rb") as file:
                file.seek(start)
                size = file.readinto(bytes_of(tensor))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if size != tensor.nbytes:
            raise UserError(f"{path} has been cut off since its header was read: {name} ends early")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored.items()}

    def named(self, names: Mapping[str, str]) -> "Weights":
        """Some of the weights under other names: `names` maps new ones to those here."""
        return Weights({new: self.stored[name] for new, name in names.items()}, self.source)


def has_weights(path: Path) -> bool:
    """Whether there is something for `read_weights(path)`."""
    return path.is_file() or index_of(path).is_file()


def read_weights(path: Path) -> Weights:
    """The weights in the file `path`, or, if there is none, in the files of the index beside it
    (`model.safetensors.index.json`). Only headers are read.

    Raises:
        UserError: if there are none, or a file is damaged or does not hold what the index says, by name.
    """
    index = index_of(path)
    if not path.is_file() and index.is_file():
        return read_indexed(index, files_beside(path))
    if not path.is_file() and (others := files_beside(path)):
        raise UserError(f"{path.parent} lacks {index.name}, which {others[0].name} is useless without")
    return Weights(read_header(path), str(path))


def read_indexed(index: Path, beside: list[Path]) -> Weights:
    """The weights in the files that `index` lists: all those `beside` it, with what it says in each."""
    size, files = read_index(index)
    listed: dict[str, set[str]] = {}
    for name, file in files.items():
        listed.setdefault(file, set()).add(name)
    stored: dict[str, Stored] = {}
    for file, names in sorted(listed.items()):
        path = index.with_name(file)
        found = read_header(path)
        if missing := names - found.keys():
            raise UserError(f"{path} lacks {shorten(sorted(missing))}, expected there by {index.name}")
        for name in found.keys() - names:
            expected = f"expected in {files[name]}" if name in files else "not listed"
            raise UserError(f"{path} holds {name}, {expected} by {index.name}")
        stored |= found
    endings = {file.rpartition("-of-")[2] for file in listed}  # files of another number: of a killed save
    others = [path.name for path in beside if path.name.rpartition("-of-")[2] in endings]
    if unlisted := [name for name in others if name not in listed]:
        raise UserError(f"{index} does not list {shorten(unlisted)}")
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored.values())
    if size not in (None, total):
        raise UserError(f"{index}: metadata.total_size is {size}, but the tensors have {total} bytes")
    return Weights({name: stored[name] for name in files}, str(index))


def read_index(index: Path) -> tuple[Any, dict[str, str]]:
    """The bytes of all tensors, if they are given, and the file of each tensor by name."""
    facts = read_json(index)
    facts = facts if isinstance(facts, dict) else {}
    files, metadata = facts.get("weight_map"), facts.get("metadata")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: expected weight_map, an object that maps names of weights to files")
    for name, file in files.items():
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", file) or len(file.encode()) > 255:
            raise UserError(f"{index}: {name}: expected a .safetensors file beside it, got {file[:300]!r}")
    return metadata.get("total_size") if isinstance(metadata, dict) else None, files


def read_header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        with path.open("rb") as file:
            if (length := int.from_bytes(file.read(8), "little")) > MOST_JSON:
                raise ValueError(f"a header of {length:,} bytes")
            with safe_open(path, "pt"):  # which checks that the tensors fill the file, each its part
                file.seek(0)
                return parse_header(file.read(8 + length), path)
    except Exception as error:  # SafetensorError, and KeyError for numbers of an unknown kind
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None


def parse_header(header: bytes, path: Path) -> dict[str, Stored]:
    tensors = json.loads(header[8:])
    tensors.pop("__metadata__", None)
    starts = {name: len(header) + facts["data_offsets"][0] for name, facts in tensors.items()}
    return {
        name: Stored(path, starts[name], tuple(facts["shape"]), DTYPES[facts["dtype"]])
        for name, facts in tensors.items()
    }


def write_weights(
    weights: Mapping[str, Tensor],
    path: Path,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    max_file_size: float = MAX_FILE_SIZE,
) -> None:
    """Writes the file `path`, or, for more than `max_file_size` bytes of tensors, several files and an index:
    `model-00001-of-00002.safetensors`, …, `model.safetensors.index.json`. Whole or not at all; files of what
    was there before are removed.

    Args:
        weights: tensors by name; with `tensors`, only shapes and dtypes count, and the meta device will do.
        tensors: all of them with their names, in any order, for what makes or gathers one at a time. No more
            than one is held. They are exhausted even if writing fails, so that other processes which take
            part in gathering do not wait for this one.
    """
    tensors = iter(weights.items() if tensors is None else tensors)
    try:
        write_files(weights, path, tensors, max_file_size)
    except Exception:
        deque(tensors, maxlen=0)
        raise


def write_files(
    weights: Mapping[str, Tensor], path: Path, tensors: Iterator[tuple[str, Tensor]], max_file_size: float
) -> None:
    groups, index = split(weights, max_file_size), index_of(path)
    numbers = [f"{number + 1:05}-of-{len(groups):05}" for number in range(len(groups))]
    files = [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in numbers] if len(groups) > 1 else [path]
    with ExitStack() as stack:  # which puts in place what it entered first last
        if len(files) > 1:
            listed = {name: file.name for file, names in zip(files, groups, strict=True) for name in names}
            size = sum(tensor.nbytes for tensor in weights.values())
            facts = {"metadata": {"total_size": size}, "weight_map": listed}
            stack.enter_context(whole_file(index)).write_text(json.dumps(facts, indent=2) + "\n")
        left: dict[str, Stored] = {}
        for file, names in zip(files, groups, strict=True):
            stack.enter_context(whole_file(file)).write_bytes(header := header_of(weights, names))
            left |= parse_header(header, file)
        for name, tensor in tensors:
            write_tensor(name, tensor, left)
            del tensor  # before the next one is made
        if left:
            raise ValueError(f"never came: {shorten([*left])}")
        if len(files) > 1 and any(file.exists() for file in files):
            index.unlink(missing_ok=True)  # the files are replaced one by one
    places = {path, index, partial_of(path), partial_of(index)}
    places |= {*files_beside(path), *files_beside(partial_of(path))}
    for left_over in places - ({*files, index} if len(files) > 1 else {path}):
        left_over.unlink(missing_ok=True)


def write_tensor(name: str, tensor: Tensor, left: dict[str, Stored]) -> None:
    """Writes a tensor to its place, which it takes out of `left`."""
    if name not in left:
        raise ValueError(f"{name} came twice, or was not announced")
    path, start, shape, dtype = left.pop(name)
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, announced {list(shape)} {dtype}")
    try:
        with partial_of(path).open("r+b") as file:
            file.seek(start)
            file.write(bytes_of(tensor))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def split(weights: Mapping[str, Tensor], max_file_size: float) -> list[list[str]]:
    """The names of the weights in each file; a tensor that is too large has its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + tensor.nbytes > max_file_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def header_of(weights: Mapping[str, Tensor], names: Iterable[str]) -> bytes:
    """The beginning of a file of these weights, byte for byte as safetensors has it."""
    ranks = [*DTYPES]
    kinds = {name: NAMES[weights[name].dtype] for name in names}
    facts, end = {}, 0
    for name in sorted(kinds, key=lambda name: (-ranks.index(kinds[name]), name)):
        start, end = end, end + weights[name].nbytes
        facts[name] = {
            "dtype": kinds[name], "shape": [*weights[name].shape], "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def files_beside(path: Path) -> list[Path]:
    """The numbered files (`model-00001-of-00002.safetensors`) that belong to `path`."""
    ours = re.compile(rf"{re.escape(path.stem)}-\d+-of-\d+{re.escape(path.suffix)}")
    return sorted(other for other in path.parent.glob("*-of-*") if ours.fullmatch(other.name))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, which they share if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies `weights` into `model`, one at a time. Raises UserError as `check_fit` does."""
    is_lazy = isinstance(weights, Weights)
    check_fit(model, weights.shapes if is_lazy else {name: t.shape for name, t in weights.items()}, source)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            with whole(tensor):
                tensor.copy_(weights[name])


def check_fit(model: nn.Module, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Raises UserError for names and shapes of weights that do not match, by name; empty ones that the model
    lacks are ignored."""
    own = {name: tuple(tensor.shape) for name, tensor in outline_of(model)}
    shapes = {name: tuple(shape) for name, shape in shapes.items() if math.prod(shape) or name in own}
    problems = []
    if missing := sorted(own.keys() - shapes.keys()):
        problems.append(f"missing: {shorten(missing)}")
    if unexpected := sorted(shapes.keys() - own.keys()):
        problems.append(f"unexpected: {shorten(unexpected)}")
    misshapen = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in own.items()
        if shapes.get(name, shape) != shape
    ]
    if misshapen:
        problems.append(shorten(misshapen))
    if problems:
        raise UserError(f"{source} does not fit this {type(model).__name__}: " + "; ".join(problems))
