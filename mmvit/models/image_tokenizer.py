"""The interface of every image tokenizer: pixels to a grid of codes and back, with shared checks."""

import torch
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.hub import Pretrained
from mmvit.memory import in_parts


class ImageTokenizer(Pretrained, nn.Module):
    """pixels ↔ codes, for images whose sides are multiples of `factor`.

    A subclass defines `factor`, `code_vectors`, `codes_of` and `pixels_of`.
    """

    factor: int  # pixels per code, along each side

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """`code_grid` of a `height` x `width` image."""
        return code_grid(height, width, self.factor)

    def code_vectors(self) -> Tensor:
        """A vector for each code, (codebook_size, any width); similar codes have similar vectors."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, height, width) in [-1, 1] → codes (batch, rows, columns), int64.

        Always computed in float32, so that the codes do not depend on autocast.

        Raises:
            UserError: as `grid` does.
        """
        self.grid(*pixels.shape[-2:])
        with torch.autocast(pixels.device.type, enabled=False):
            return self.codes_of(pixels.float())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (batch, rows, columns) → pixels (batch, 3, height, width) in [-1, 1], float32.

        Raises:
            UserError: when a code is outside the codebook, or the tokenizer cannot decode.
        """
        check_codes(codes, self.codebook_size)
        return self.pixels_of(codes)

    def encode_many(self, pixels: Tensor, batch_size: int = 64) -> Tensor:
        """`encode` for any number of images on any device, in batches on this tokenizer's device."""
        device = next(self.parameters()).device
        return in_parts(lambda part: self.encode(part.to(device)), pixels, size=batch_size)

    def decode_many(self, codes: Tensor, batch_size: int = 64) -> Tensor:
        """`decode` for any number of images on any device, in batches on this tokenizer's device."""
        device = next(self.parameters()).device
        return in_parts(lambda part: self.decode(part.to(device)), codes, size=batch_size)

    def codes_of(self, pixels: Tensor) -> Tensor:
        """`encode` for float32 pixels of a valid size."""
        raise NotImplementedError

    def pixels_of(self, codes: Tensor) -> Tensor:
        """`decode` for valid codes."""
        raise NotImplementedError


def code_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """(rows, columns) of the codes of a `height` x `width` image, one for every `factor` x `factor` pixels.

    Raises:
        UserError: when a side is not a multiple of the factor.
    """
    if height < factor or width < factor or height % factor or width % factor:
        raise UserError(
            f"an image of {height}x{width} pixels cannot be cut into patches of {factor}x{factor}, one per "
            f"code: resize it so that both sides are multiples of {factor}, or use an image tokenizer with "
            "another factor"
        )
    return height // factor, width // factor


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raises UserError when a code is outside 0 to `codebook_size` - 1."""
    if codes.numel() and (codes.min() < 0 or codes.max() >= codebook_size):
        raise UserError(
            f"image codes from {codes.min()} to {codes.max()} do not fit this image tokenizer, which has "
            f"codes 0 to {codebook_size - 1}: decode them with the image tokenizer that made them"
        )
