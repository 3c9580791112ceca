"""Image codes in shards: `codes.npy` per sample, and `dataset.json` that names their image tokenizer."""

import functools
import io
import math
from pathlib import Path

import numpy as np

from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError
from mmvit.streams.shards import BadSample

MAX_CODES = 65_536  # of a codebook: codes are stored as uint16
ENCODE_AGAIN = "encode the shards with the image tokenizer in use (mmvit encode)"


def pack_codes(codes: np.ndarray) -> bytes:
    """Codes (rows, cols), or of augmented copies (copies, rows, cols), below 65,536 → the bytes of an .npy
    file of uint16."""
    if codes.ndim not in (2, 3) or codes.min() < 0 or codes.max() > 65535:
        raise ValueError(
            f"codes of shape {codes.shape} from {codes.min()} to {codes.max()} are not (rows, cols) of uint16"
        )
    buffer = io.BytesIO()
    np.save(buffer, codes.astype("<u2"), allow_pickle=False)
    return buffer.getvalue()


def unpack_codes(
    data: bytes, grid: tuple[int, int], codebook_size: int, augmented: bool = False
) -> np.ndarray:
    """The inverse of `pack_codes`: int64 (rows, cols), or (copies, rows, cols) if `augmented`.

    Raises:
        BadSample: the bytes are not an array of integers.
        UserError: the array does not have the shape `grid`, or has codes of `codebook_size` or more.
    """
    try:
        codes = read_npy(data)
    except Exception:  # numpy raises a dozen kinds for damaged headers, from TokenError to RecursionError
        raise BadSample(
            "unreadable codes", f"{len(data)} bytes that are not an .npy file of numbers"
        ) from None
    if codes.dtype.kind not in "iu" or not codes.size:
        found = f"of {codes.dtype}, not integers" if codes.size else "without codes"
        raise BadSample("unreadable codes", f"an array {found}")
    if codes.shape[int(augmented) :] != tuple(grid) or codes.ndim != 2 + augmented:
        raise UserError(f"expected codes of {describe(grid)}, got {describe(codes.shape)}; {ENCODE_AGAIN}")
    if codes.min() < 0 or codes.max() >= codebook_size:
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise UserError(f"found code {wrong}, but the codebook ends at {codebook_size - 1}; {ENCODE_AGAIN}")
    return codes.astype(np.int64)


def read_npy(data: bytes) -> np.ndarray:
    """The array in an .npy file, a view of its bytes: whatever shape the header claims, it takes no memory.

    Raises:
        Exception: of any kind, if it is not one of numbers and exactly as long as its header says.
    """
    length_bytes = 2 if data[6:7] == b"\x01" else 4  # by the version
    end = 8 + length_bytes + int.from_bytes(data[8 : 8 + length_bytes], "little")
    shape, is_fortran, dtype = read_npy_header(data[:end])
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError("the length is not that of the header")
    return np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if is_fortran else "C")


@functools.lru_cache(maxsize=16)
def read_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type. Kept, as all codes of a data set begin alike, and numpy
    evaluates each header as Python."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[version](file)  # version 3 is for names of fields


def check_codes_fit(
    folder: Path,
    grid: tuple[int, int],
    codebook_size: int,
    fingerprint: str,
    setting: str = "data.image_tokenizer",
) -> None:
    """Checks that the codes in `folder` were made by the image tokenizer in use, which the recipe names by
    `setting`.

    Expects `{"image_tokenizer": {"grid": [rows, cols], "codebook_size": ..., "fingerprint": ...}}`.

    Raises:
        UserError: on a difference, or if the file does not say.
    """
    made = read_dataset_card(folder).get("image_tokenizer")
    if made is None:
        raise UserError(
            f"{folder}/dataset.json does not say which image tokenizer made the codes; {ENCODE_AGAIN}"
        )
    wanted = {"grid": list(grid), "codebook_size": codebook_size, "fingerprint": fingerprint}
    for name, value in wanted.items():
        if made.get(name) != value:
            maker = f" (made by {made['path']})" if "path" in made else ""
            raise UserError(
                f"the codes in {folder} have {name} {made.get(name)}{maker}, but the tokenizer in use has "
                f"{value}: set {setting} to the one that made them, or {ENCODE_AGAIN}"
            )


def describe(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
