"""A mark for the optimizer: which weights map hidden features to hidden features."""

from torch import nn


class HiddenLayers(nn.Module):
    """A module whose matrices and convolution kernels all map hidden features to hidden features; Muon trains
    these.

    Layers that read pixels, embed tokens, or predict classes or codes stay outside of it.
    """
