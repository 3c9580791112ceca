"""LPIPS and SSIM: the values of torchmetrics', LPIPS's gradients, and files that hold no VGG16."""

from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmvit.errors import UserError
from mmvit.evaluation.reconstruction import image_ssim
from mmvit.interop.lpips import LPIPS, load_lpips

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def torchvision_like_features() -> nn.Sequential:
    """VGG16's feature layers as torchvision numbers them, with random weights."""
    layers, before = [], 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(before, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
            nn.init.normal_(layers[-2].bias, std=0.1)
            before = width
    return nn.Sequential(*layers)


def test_lpips_is_that_of_torchmetrics(tmp_path):
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(0)
    vgg = torchvision_like_features()
    with mock.patch.object(theirs, "_get_tv_model_features", return_value=vgg):
        peer = theirs._LPIPS(net="vgg", pnet_rand=True)
    weights = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    save_file(weights, tmp_path / "vgg16.safetensors")
    distance = load_lpips(tmp_path / "vgg16.safetensors").train()
    one, two = noise(2, 3, 40, 24), noise(2, 3, 40, 24, seed=1).requires_grad_()
    expected = peer(one, two).flatten()
    found = distance(one, two)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found > 0.01).all()
    assert torch.equal(distance(one, one), torch.zeros(2))
    gradient, theirs_gradient = (torch.autograd.grad(value.sum(), two)[0] for value in (found, expected))
    torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-3, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    one = noise(4, 3, 24, 32)
    two = (one + noise(4, 3, 24, 32, seed=1) / 10).clamp(-1, 1)
    unit = (two + 1) / 2, (one + 1) / 2
    expected = structural_similarity_index_measure(*unit, data_range=1.0, reduction="none")
    torch.testing.assert_close(image_ssim(two, one), expected)


def test_the_rest_of_a_vgg16_file_is_ignored_by_name_and_misfits_are_named(tmp_path, thin_vgg16):
    path = tmp_path / "vgg16.pth"

    def load(*without: str, **more: torch.Tensor) -> LPIPS:
        torch.save({name: t for name, t in {**thin_vgg16, **more}.items() if name not in without}, path)
        return load_lpips(path)

    model = load(**{"classifier.0.weight": torch.zeros(3), "features.0.bias": torch.ones(64)})
    assert torch.equal(model.features[0].bias, torch.ones(64))
    with pytest.raises(UserError, match=r"vgg16.pth: the weights of VGG16 .*features\.28\.bias is missing"):
        load("features.28.bias")
    with pytest.raises(UserError, match=r"features\.2\.bias is \(65,\), expected \(64,\)"):
        load(**{"features.2.bias": torch.zeros(65)})
    with pytest.raises(UserError, match=r"features\.1\.running_mean is unexpected"):  # VGG16 with batch norm
        load(**{"features.1.running_mean": torch.zeros(64)})


def test_a_file_that_holds_no_vgg16_is_explained(tmp_path, thin_vgg16):
    with pytest.raises(UserError, match=r"no file .*no\.pth"):
        load_lpips(tmp_path / "no.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"cut\.pth is damaged"):
        load_lpips(tmp_path / "cut.pth")
    torch.save({"weights": thin_vgg16}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match=r"nested\.pth holds no state dict"):
        load_lpips(tmp_path / "nested.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cut\.safetensors is damaged or not a safetensors file"):
        load_lpips(tmp_path / "cut.safetensors")
