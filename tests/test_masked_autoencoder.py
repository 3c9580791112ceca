"""MAE: what the core reads, what the decoder reconstructs, and the loss."""

import pytest
import torch
import torch.nn.functional as F

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig, normalize
from mmvit.models.masked_patches import patchify

CORE = TransformerConfig(width=16, depth=2, num_heads=2)
SMALL = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def objective(shape: dict | None = None, **settings) -> MaskedAutoencoder:
    torch.manual_seed(0)
    config = ClassifierConfig(
        **{"image_size": (16, 32), "patch_size": 8, "num_classes": 3, "core": CORE, **(shape or {})}
    )
    model = MaskedAutoencoder(Classifier(config), MaskedAutoencoderConfig(**{**SMALL, **settings}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    "shape", [{}, {"pooling": "mean", "positions": "rotary_2d"}, {"positions_at": "every_layer"}]
)
def test_the_loss_is_that_of_the_hidden_patches_reconstructed_from_the_kept_ones(shape, normalized):
    model, pixels = objective(shape, normalized=normalized), torch.randn(3, 3, 16, 32)
    classifier, prefix = model.classifier, model.classifier.num_prefix
    torch.manual_seed(1)
    loss, _ = model.loss({"pixels": pixels})
    torch.manual_seed(1)
    places = classifier.choose_patches(3, 2, pixels.device)  # a quarter of 8
    tokens, patches, errors = classifier.embed(classifier.stem(pixels)), patchify(pixels, 8).flatten(2), []
    for image in range(3):
        kept = places[image]
        seen = model.embed(classifier.read(tokens[image : image + 1], kept[None]))[0]
        rows = [model.mask] * (8 + prefix)
        for place, vector in zip(kept.tolist(), seen, strict=True):
            rows[place] = vector
        decoded = model.decoder(torch.stack(rows)[None] + model.positions.table)[0]
        for place in {*range(8)} - {place - prefix for place in kept.tolist()}:
            target = patches[image, place]
            if normalized:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append(F.mse_loss(model.predict(decoded[prefix + place]), target))
    assert len(errors) == 3 * 6
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_the_core_reads_no_hidden_patch():
    model, pixels = objective(), torch.randn(1, 3, 16, 32, requires_grad=True)
    said = []
    model.classifier.core.register_forward_hook(lambda _, inputs, output: said.append(output))
    model.loss({"pixels": pixels})
    assert said[0].shape == (1, 1 + 2, 16)
    said[0].sum().backward()
    assert (patchify(pixels.grad, 8).flatten(2).abs().sum(2) > 0).sum() == 2  # of 8 patches


def test_a_flat_patch_is_normalized_to_zero():
    assert normalize(torch.full((2, 5), 0.3)).abs().max() < 1e-3


def test_it_learns_and_leaves_the_head_alone():
    torch.manual_seed(0)
    config = ClassifierConfig(image_size=16, patch_size=4, num_classes=3, core=CORE)
    settings = {**SMALL, "decoder_width": 32}
    model = MaskedAutoencoder(Classifier(config), MaskedAutoencoderConfig(**settings))
    slope = torch.linspace(-1, 1, 16).expand(3, 16, 16)  # seen anywhere, it is known everywhere
    pixels = torch.stack([slope, -slope, slope.transpose(1, 2), -slope.transpose(1, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    first = model.loss({"pixels": pixels})[0].item()
    for _ in range(100):
        loss, _ = model.loss({"pixels": pixels})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    assert model.classifier.head.weight.grad is None


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ({"patch_dropout": 0.5}, {}, "set model.patch_dropout to 0"),
        ({"positions": "relative_1d"}, {}, "relative_1d positions do not work: use another kind"),
        ({"stem": "conv"}, {}, "'conv', in which patches see their neighbours' pixels, so MAE could not"),
        ({}, {"masked": 0.05}, "0.05 hides none of 8 patches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shape, settings, message):
    with pytest.raises(UserError, match=message):
        objective(shape, **settings)
    with pytest.raises(ValueError, match="multiple of 4 and of decoder_heads 3"):
        MaskedAutoencoderConfig(decoder_width=8, decoder_heads=3)
