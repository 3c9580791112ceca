"""Image codes in shards: `codes.npy` per sample, and `dataset.json` that names their image tokenizer."""

import io
from pathlib import Path

import numpy as np

from mmvit.data.shards import BadSample
from mmvit.data.writing import read_dataset_card
from mmvit.errors import UserError

MAX_CODES = 65_536  # of a codebook: codes are stored as uint16
ENCODE_AGAIN = "encode the shards with the image tokenizer in use (pipelines/encode_images.py)"


def pack_codes(codes: np.ndarray) -> bytes:
    """Codes (rows, cols), or of several views (views, rows, cols), below 65,536 → the bytes of an .npy file
    of uint16."""
    if codes.ndim not in (2, 3) or codes.min() < 0 or codes.max() > 65535:
        raise ValueError(
            f"codes of shape {codes.shape} from {codes.min()} to {codes.max()} are not (rows, cols) of uint16"
        )
    buffer = io.BytesIO()
    np.save(buffer, codes.astype("<u2"), allow_pickle=False)
    return buffer.getvalue()


def unpack_codes(data: bytes, grid: tuple[int, int], codebook_size: int, views: bool = False) -> np.ndarray:
    """The inverse: int64 (rows, cols), or of `views` (views, rows, cols).

    Raises:
        BadSample: the bytes are no array of integers.
        UserError: the array does not have the shape `grid`, or has codes of `codebook_size` or more.
    """
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise BadSample("unreadable codes", f"{len(data)} bytes that are no .npy file of numbers") from None
    if codes.dtype.kind not in "iu":
        raise BadSample("unreadable codes", f"an array of {codes.dtype}, not of integers")
    if codes.shape[int(views) :] != tuple(grid) or codes.ndim != 2 + views:
        raise UserError(
            f"the codes are {describe(codes.shape)}, the model expects {describe(grid)}; {ENCODE_AGAIN}"
        )
    if codes.min() < 0 or codes.max() >= codebook_size:
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise UserError(f"there is a code {wrong}, the codebook ends at {codebook_size - 1}; {ENCODE_AGAIN}")
    return codes.astype(np.int64)


def grid_of_codes(folder: Path) -> tuple[int, int]:
    """(rows, columns) of every picture's codes in `folder`, as its dataset.json says.

    Raises:
        UserError: if the file does not say.
    """
    grid = read_dataset_card(folder).get("image_tokenizer", {}).get("grid")
    if not isinstance(grid, list) or len(grid) != 2:
        raise UserError(
            f"{folder} holds no image codes, or does not say of which grid: no dataset.json of "
            f"pipelines/encode_images.py is in it; {ENCODE_AGAIN}"
        )
    return tuple(grid)


def check_codes_fit(
    folder: Path,
    grid: tuple[int, int],
    codebook_size: int,
    fingerprint: str,
    setting: str = "data.image_tokenizer",
) -> None:
    """Compares what `dataset.json` says of the codes in `folder` with the image tokenizer in use, which the
    recipe names by `setting`.

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
                f"the codes in {folder} are of {name} {made.get(name)}{maker}, the tokenizer in use has "
                f"{value}: set {setting} to the one that made them, or {ENCODE_AGAIN}"
            )


def describe(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
