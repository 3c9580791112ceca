"""A mark for the optimizer: which weights map hidden features to hidden features."""

from torch import nn


class HiddenLayers(nn.Module):
    """A module whose matrices and convolution kernels all read and write hidden features: what Muon is for.

    What reads pixels or embeds tokens, and what names classes or codes, stays outside such a module.
    """
