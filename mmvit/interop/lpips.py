"""LPIPS (Zhang et al., 1801.03924), version 0.1 with VGG16: how different two images look.

    distance = load_lpips("vgg16-397923af.pth")  # torchvision's ImageNet weights, .pth or .safetensors
    distance(one, two)  # pixels in [-1, 1], (batch, 3, height, width) → (batch,)

The weights of VGG16 are torchvision's file; the linear heads come with torchmetrics. The result equals
torchmetrics', and that of the package lpips except for how it avoids a division by zero.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mmvit.errors import UserError
from mmvit.interop.files import read_tensors, refuse_misfits
from mmvit.models.perceptual import FrozenDistance

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's convolutions
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's colours, in [-1, 1]
EPSILON = 1e-8  # beside a squared length
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels on each side


class LPIPS(FrozenDistance):
    """LPIPS with VGG16, whose `features` have torchvision's names and lack the last pooling."""

    def __init__(self):
        super().__init__()
        layers, before, self.ends = [], 3, []
        for stage in STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in stage:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.zeros(stage[-1]) for stage in STAGES)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(SPREAD).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        self.check_size(*one.shape[-2:])
        pairs = zip(self.unit_features(one), self.unit_features(two), self.heads, strict=True)
        return sum(((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2)) for a, b, head in pairs)

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < SMALLEST:
            raise UserError(
                f"images of {height}x{width} pixels are too small for LPIPS, which needs at least {SMALLEST} "
                "on each side"
            )

    def unit_features(self, pixels: Tensor) -> list[Tensor]:
        """The features at the end of each stage, (batch, channels, rows, columns), scaled to length 1 at
        every place, or 0 where nothing is active."""
        x, found = (pixels - self.mean) / self.spread, []
        for begin, end in zip([0, *self.ends], self.ends, strict=False):
            x = self.features[begin:end](x)
            vectors = x.float()
            found.append(vectors / (vectors.square().sum(1, keepdim=True) + EPSILON).sqrt())
        return found


def load_lpips(vgg16: str | Path) -> LPIPS:
    """LPIPS with the weights in the file `vgg16`, a state dict of torchvision's `vgg16` with or without its
    `classifier.*`.

    Raises:
        UserError: for a file that is missing, damaged or holds no state dict, and for weights that are
            missing, unexpected or of another shape, by name.
    """
    path, model = Path(vgg16), LPIPS()
    weights = {
        name: tensor for name, tensor in read_tensors(path).items() if not name.startswith("classifier.")
    }
    expected = {name: t.shape for name, t in model.state_dict().items() if name.startswith("features.")}
    refuse_misfits(expected, weights, f"{path}: the weights of VGG16")
    heads = {f"heads.{stage}": head for stage, head in enumerate(read_heads())}
    model.load_state_dict({**weights, **heads})
    return model


def read_heads() -> list[Tensor]:
    """The weights of LPIPS's linear heads, each (channels,), from the torchmetrics package."""
    package = Path(find_spec("torchmetrics").submodule_search_locations[0])
    path = package / "functional" / "image" / "lpips_models" / "vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{stage}.model.1.weight"].flatten() for stage in range(len(STAGES))]
