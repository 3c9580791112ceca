"""What every image tokenizer has to check: that an image is a grid of codes, and that codes exist."""

from torch import Tensor

from mmvit.errors import UserError


def code_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """(rows, columns) of the codes of a `height` x `width` image, one for every `factor` x `factor` pixels.

    Raises:
        UserError: when a side is no multiple of the factor, or smaller.
    """
    if height < factor or width < factor or height % factor or width % factor:
        raise UserError(
            f"an image of {height}x{width} pixels cannot be cut into patches of {factor}x{factor}, one "
            f"for each code: resize it so that both sides are multiples of {factor}, or use an image "
            "tokenizer of another factor"
        )
    return height // factor, width // factor


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raises UserError when a code is outside 0 to `codebook_size` - 1."""
    if codes.numel() and (codes.min() < 0 or codes.max() >= codebook_size):
        raise UserError(
            f"image codes from {codes.min()} to {codes.max()} do not fit this image tokenizer, which has "
            f"codes 0 to {codebook_size - 1}: decode them with the one that made them"
        )
