"""ViT weights of other projects: the same logits as their own models, and nothing lost on the way there and
back."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmvit.core.transformer import TransformerConfig
from mmvit.data.images import pixels_from_images
from mmvit.errors import UserError
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.interop.vit import class_names, load_vit, recognise, vit_from_weights
from mmvit.interop.vit_export import TIMM_HYBRIDS, save_vit, vit_to_weights
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.presets import preset
from mmvit.weights import WEIGHTS, write_weights

SHAPE = {"width": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 2.5}
SHAPES = {  # ours, of several sizes
    "square": {"image_size": 32, "patch_size": 8},
    "wide": {"image_size": (16, 48), "patch_size": 8},
    "grey": {"image_size": 20, "patch_size": 4, "channels": 1},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomized(model: nn.Module) -> nn.Module:
    """Every weight of `model` away from its start, where many are 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(**settings) -> Classifier:
    core = TransformerConfig(**{**SHAPE, **settings.pop("core", {})})
    return randomized(Classifier(ClassifierConfig(num_classes=7, core=core, **settings)))


def timm_like(timm, config: ClassifierConfig, **more) -> nn.Module:
    core = config.core
    return timm.models.vision_transformer.VisionTransformer(
        img_size=config.height_width,
        patch_size=config.patch_size,
        in_chans=config.channels,
        num_classes=config.num_classes,
        embed_dim=core.width,
        depth=core.depth,
        num_heads=core.num_heads,
        mlp_ratio=core.mlp_ratio,
        class_token=config.has_class_token,
        global_pool="token" if config.pooling == "cls" else "avg",
        fc_norm=config.norm_after_pooling,
        act_layer=core.mlp,
        **more,
    )


def transformers_like(config: ClassifierConfig) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    core = config.core
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=core.width,
            num_hidden_layers=core.depth,
            num_attention_heads=core.num_heads,
            intermediate_size=core.mlp_width,
            hidden_act="gelu" if core.mlp == "gelu" else "gelu_pytorch_tanh",
            layer_norm_eps=core.norm_eps,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.channels,
            num_labels=config.num_classes,
        )
    )


def images(config: ClassifierConfig) -> Tensor:
    return noise(3, config.channels, *config.height_width)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


HEADS = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "mean, then norm": {"pooling": "mean", "norm_after_pooling": True},
    "mean beside cls": {"pooling": "mean_beside_cls", "norm_after_pooling": True},
    "tanh": {"core": {"mlp": "gelu_tanh"}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_timm_gives_the_same_logits_both_ways(timm, shape, head):
    model = ours(**SHAPES[shape], **HEADS[head])
    peer = randomized(timm_like(timm, model.config))
    settings = {"num_heads": 4, "mlp": model.config.core.mlp, "image_size": model.config.image_size}
    if model.config.pooling == "mean_beside_cls":
        settings["pooling"] = "mean"
    loaded = vit_from_weights(peer.state_dict(), "timm", settings)
    assert loaded.config == model.config
    pixels = images(model.config)
    torch.testing.assert_close(loaded(pixels), peer(pixels), rtol=0, atol=1e-5)
    assert_equal(vit_to_weights(loaded, "timm"), peer.state_dict())
    peer.load_state_dict(vit_to_weights(model, "timm"))
    torch.testing.assert_close(model(pixels), peer(pixels), rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_builds_the_folder_that_is_written(timm, tmp_path):
    for head, settings in HEADS.items():
        model = ours(**SHAPES["wide"], **settings)
        folder = save_vit(model, tmp_path / head, "timm")
        peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        expected = peer(images(model.config))
        torch.testing.assert_close(model(images(model.config)), expected, rtol=0, atol=1e-5)
        again = load_vit(folder)
        assert again.config == model.config
        assert_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("core", [{"norm_eps": 1e-12}, {"mlp": "gelu_tanh", "norm_eps": 1e-6}])
@torch.no_grad()
def test_transformers_gives_the_same_logits_both_ways(shape, core, tmp_path):
    model = ours(**SHAPES[shape], core=core)
    peer = randomized(transformers_like(model.config))
    peer.save_pretrained(tmp_path / "theirs")
    loaded = load_vit(tmp_path / "theirs")
    assert loaded.config == model.config
    expected = peer(images(model.config)).logits
    torch.testing.assert_close(loaded(images(model.config)), expected, rtol=0, atol=1e-5)
    assert_equal(vit_to_weights(loaded, "transformers5"), peer.state_dict())
    for naming in ("transformers4", "transformers5"):
        folder = save_vit(model, tmp_path / naming, naming)
        found = type(peer).from_pretrained(folder).eval()(images(model.config)).logits
        torch.testing.assert_close(model(images(model.config)), found, rtol=0, atol=1e-5)
        again = load_vit(folder)
        assert again.config == model.config
        assert_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("naming", ["official", "big_vision"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_timm_reads_the_npz_that_is_written(timm, naming, pooling, tmp_path):
    """timm's own reader of Google's files stands for their code, which runs in jax."""
    model = ours(**SHAPES["square"], pooling=pooling, core={"mlp": "gelu_tanh"})
    path = save_vit(model, tmp_path / "vit.npz", naming)
    patches_alone = naming == "big_vision" and pooling == "cls"
    peer = timm_like(timm, model.config, no_embed_class=patches_alone)
    peer.load_pretrained(str(path), prefix="params/" if naming == "big_vision" else "")
    expected = peer.eval()(images(model.config))
    torch.testing.assert_close(model(images(model.config)), expected, rtol=0, atol=1e-5)
    again = load_vit(path)
    assert again.config == model.config
    torch.testing.assert_close(again(images(model.config)), expected, rtol=0, atol=1e-5)
    if not patches_alone:  # where the token's position was added to the token
        assert_equal(again.state_dict(), model.state_dict())


def test_a_way_through_every_project_changes_no_bit(timm, tmp_path):
    model = ours(**SHAPES["square"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "files of official do not say core.mlp")
        there = load_vit(save_vit(model, tmp_path / "a.npz", "official"), mlp="gelu")
    peer = timm.create_model(f"local-dir:{save_vit(there, tmp_path / 'timm', 'timm')}", pretrained=True)
    save_file(peer.state_dict(), tmp_path / "timm.safetensors")
    there = load_vit(tmp_path / "timm.safetensors", num_heads=4)
    there = load_vit(save_vit(there, tmp_path / "four", "transformers4"))
    from transformers import ViTForImageClassification

    five = ViTForImageClassification.from_pretrained(save_vit(there, tmp_path / "five", "transformers5"))
    five.save_pretrained(tmp_path / "again")
    there = load_vit(tmp_path / "again")
    assert there.config == model.config
    assert_equal(there.state_dict(), model.state_dict())


@torch.no_grad()
def test_the_tanh_layer_of_pre_training_is_read_and_is_left_out_with_the_head(tmp_path):
    model = ours(**SHAPES["square"], representation_width=10, core={"mlp": "gelu_tanh"})
    tokens = torch.cat([model.cls_token, model.stem(noise(1, 3, 32, 32))], 1)
    features = model.core(model.positions.add(tokens))[:, 0]
    hidden = torch.tanh(features @ model.representation.weight.T + model.representation.bias)
    expected = hidden @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(noise(1, 3, 32, 32)), expected)
    path = save_vit(model, tmp_path / "in21k.npz", "official")
    with np.load(path) as arrays:
        assert arrays["pre_logits/kernel"].shape == (24, 10)
    assert_equal(load_vit(path).state_dict(), model.state_dict())
    tuned = load_vit(path, num_classes=3)
    assert tuned.config.representation_width is None
    assert torch.equal(tuned.head.weight, torch.zeros(3, 24))
    assert torch.equal(tuned.core.norm.weight, model.core.norm.weight)


def test_a_model_without_a_head_gets_one_of_zeros(tmp_path):
    from transformers import ViTModel

    peer = transformers_like(ours(**SHAPES["square"]).config)
    headless = randomized(ViTModel(peer.config))  # has a pooler, too
    headless.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"model.safetensors has no head: set num_classes"):
        load_vit(tmp_path / "theirs")
    loaded = load_vit(tmp_path / "theirs", num_classes=5)
    assert torch.equal(loaded.head.weight, torch.zeros(5, 24))
    pixels = noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = headless(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(loaded.features(pixels), expected, rtol=0, atol=1e-5)


HYBRID = {
    "image_size": 64, "patch_size": 32, "stem": "resnet", "stem_blocks": (2, 2, 2, 2),
    "stem_epsilons": "timm",
}  # fmt: skip


@torch.no_grad()
def test_hybrids_go_to_timm_and_back(timm, tmp_path):
    """In float64: of float32 the rounding in 13 random bottlenecks comes to some 1e-5."""
    model = ours(**HYBRID, core={"mlp": "gelu_tanh"})
    pixels = images(model.config).double()
    folder = save_vit(model, tmp_path / "timm", "timm")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_equal(vit_to_weights(model, "timm"), peer.state_dict())
    expected = peer.double()(pixels)
    there = load_vit(folder)
    torch.testing.assert_close(there.double()(pixels), expected, rtol=0, atol=1e-10)
    with pytest.warns(
        UserWarning, match="do not say stem_epsilons, which is timm here and official by default there"
    ):
        path = save_vit(model, tmp_path / "R26.npz", "official")
    peer = timm.create_model(f"local-dir:{folder}").eval()
    peer.load_pretrained(str(path))
    torch.testing.assert_close(peer.double()(pixels), expected, rtol=0, atol=1e-10)
    assert load_vit(path).config.stem_epsilons == "official"
    again = load_vit(path, stem_epsilons="timm")
    assert again.config == model.config
    for loaded in (again, load_vit(folder)):
        assert_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["r50-b16", "r50-l32"])
def test_published_hybrids_have_a_place_for_each_weight_in_timm(timm, name):
    stem = preset(name).model_dump(include={"stem", "stem_blocks", "patch_size"})
    model = ours(**stem, image_size=64, stem_epsilons="timm", core={"mlp": "gelu_tanh", "depth": 1})
    peer = timm.create_model(
        TIMM_HYBRIDS[model.config.stem_blocks],
        img_size=64,
        num_classes=7,
        embed_dim=24,
        depth=1,
        num_heads=4,
        mlp_ratio=2.5,
    )
    peer.load_state_dict(vit_to_weights(model, "timm"))


def test_hybrids_of_the_official_code_may_take_squares_of_places(tmp_path):
    shape = {"image_size": 32, "patch_size": 16, "stem": "resnet", "stem_blocks": (1, 2), "stem_width": 32}
    model = ours(**shape, channels=1, core={"mlp": "gelu_tanh"})
    weights = vit_to_weights(model, "official")
    assert weights["embedding/kernel"].shape == (2, 2, 256, 24)
    assert weights["block2/unit1/conv2/kernel"].shape == (3, 3, 64, 64)
    wide = {name: t[None, None, None] if "gn" in name else t for name, t in weights.items()}
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in wide.items()})
    again = load_vit(tmp_path / "a.npz")
    assert again.config == model.config
    assert_equal(again.state_dict(), model.state_dict())
    for name in ("block1/unit1/gn_proj/scale", "block2/unit2/conv1/kernel", "gn_root/bias"):
        without = {other: t for other, t in weights.items() if other != name}
        with pytest.raises(UserError, match=f"{name} is missing"):
            vit_from_weights(without, "official")
    bare = {name: t for name, t in weights.items() if not name.startswith("block")}
    with pytest.raises(UserError, match="a ResNet's root without stages"):
        vit_from_weights(bare, "official")
    for naming in ("timm", "transformers5", "big_vision"):
        with pytest.raises(UserError, match=f"the ViT of {naming} has nothing like stem = 'resnet'"):
            vit_to_weights(model, naming)


def test_a_folder_of_transformers_may_have_many_files(tmp_path):
    model = ours(**SHAPES["square"], core={"norm_eps": 1e-12})
    peer = randomized(transformers_like(model.config))
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert not (tmp_path / "theirs/model.safetensors").exists()
    loaded = load_vit(tmp_path / "theirs")
    assert_equal(vit_to_weights(loaded, "transformers5"), peer.state_dict())
    folder = save_vit(loaded, tmp_path / "ours", "transformers5")
    write_weights(dict(load_file(folder / WEIGHTS)), folder / WEIGHTS, max_file_size=20_000)
    assert not (folder / WEIGHTS).exists()
    assert_equal(type(peer).from_pretrained(folder).state_dict(), peer.state_dict())


@pytest.mark.parametrize("naming", ["official", "big_vision", "timm", "transformers4", "transformers5"])
def test_every_weight_that_does_not_match_is_named(naming):
    weights = vit_to_weights(ours(**SHAPES["square"], core={"mlp": "gelu_tanh", "depth": 1}), naming)
    found, same = recognise(weights)
    assert (found, same.keys()) == (naming, weights.keys())
    for name, tensor in weights.items():
        without = {other: t for other, t in weights.items() if other != name}
        if (naming, name) != ("big_vision", "cls"):  # without it there is a model without it
            with pytest.raises(UserError, match=rf"{re.escape(name)} is missing|has no head"):
                vit_from_weights(without, naming, {"num_heads": 4})
        longer = torch.cat([tensor, tensor])
        with pytest.raises(UserError):
            vit_from_weights({**weights, name: longer}, naming, {"num_heads": 4})
        with pytest.raises(UserError, match=rf"{re.escape(name)}( is \(.*|:) expected "):
            vit_from_weights({**weights, name: tensor[None]}, naming, {"num_heads": 4})
    with pytest.raises(UserError, match="surplus is unexpected"):
        vit_from_weights({**weights, "surplus": torch.zeros(1)}, naming, {"num_heads": 4})


def test_prefixes_are_taken_off_and_what_stands_beside_is_no_part_of_the_model(tmp_path):
    model = ours(**SHAPES["square"], pooling="mean", core={"mlp": "gelu_tanh"})
    for prefix, naming in (("opt/target/", "official"), ("params/img/", "big_vision")):
        arrays = {prefix + name: t.numpy() for name, t in vit_to_weights(model, naming).items()}
        np.savez(tmp_path / "a.npz", **arrays, **{"opt/state/step": np.zeros(1)})
        assert_equal(load_vit(tmp_path / "a.npz").state_dict(), model.state_dict())


def test_the_blocks_of_a_scanned_model_are_taken_apart():
    model = ours(**SHAPES["square"], pooling="mean", core={"mlp": "gelu_tanh"})
    weights = vit_to_weights(model, "big_vision")
    first = "Transformer/encoderblock_0/"
    stacked = {name: tensor for name, tensor in weights.items() if "encoderblock_" not in name}
    for name in (name for name in weights if name.startswith(first)):
        blocks = [weights[name.replace(first, f"Transformer/encoderblock_{n}/")] for n in range(3)]
        stacked[name.replace(first, "Transformer/encoderblock/")] = torch.stack(blocks)
    naming, apart = recognise(stacked)
    assert_equal(vit_from_weights(apart, naming).state_dict(), model.state_dict())


class Code:
    def __reduce__(self):
        return print, ("never printed",)


def test_files_that_cannot_be_read_are_explained(tmp_path, capsys):
    weights = vit_to_weights(ours(**SHAPES["square"]), "timm")
    with pytest.raises(UserError, match=r"no file .*no\.npz"):
        load_vit(tmp_path / "no.npz")
    with pytest.raises(UserError, match="holds no weights"):
        load_vit(tmp_path)
    for name in ("cut.npz", "cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04cut")
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            load_vit(tmp_path / name)
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Code()}))
    with pytest.raises(UserError, match=r"code\.pth is damaged or holds more than tensors"):
        load_vit(tmp_path / "code.pth")
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([Code()], dtype=object)})
    with pytest.raises(UserError, match=r"objects\.npz is damaged or not a file of weights"):
        load_vit(tmp_path / "objects.npz")
    assert "never printed" not in capsys.readouterr().out
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"holds no ViT with known names: .*begins with layer\.weight"):
        load_vit(tmp_path / "other.safetensors")
    torch.save({"model": weights}, tmp_path / "timm.pth")
    with pytest.raises(UserError, match="the number of heads is unknown for width 24: set num_heads"):
        load_vit(tmp_path / "timm.pth")
    with pytest.raises(UserError, match="unknown setting heads: did you mean num_heads"):
        load_vit(tmp_path / "timm.pth", heads=4)
    assert load_vit(tmp_path / "timm.pth", num_heads=4).config.core.num_heads == 4
    with pytest.raises(UserError, match="for 16 patches of 8 pixels; image_size 40x40 has 25"):
        load_vit(tmp_path / "timm.pth", num_heads=4, image_size=40)
    wide = vit_to_weights(ours(**SHAPES["wide"]), "timm")
    with pytest.raises(UserError, match="positions for 12 patches, which is not a square: set image_size"):
        vit_from_weights(wide, "timm", {"num_heads": 4})


def test_models_that_have_no_place_elsewhere_are_refused_by_their_parts(tmp_path):
    modern = ours(**SHAPES["square"], pooling="mean", positions="sincos_2d", core={"norm": "rmsnorm"})
    with pytest.raises(UserError, match=r"nothing like positions = 'sincos_2d', core\.norm = 'rmsnorm'"):
        save_vit(modern, tmp_path / "x", "timm")
    with pytest.raises(UserError, match="transformers5 has nothing like pooling = 'mean'"):
        save_vit(ours(**SHAPES["square"], pooling="mean"), tmp_path / "x", "transformers5")
    plain = ours(**SHAPES["square"])
    with pytest.raises(UserError, match=r"official reads an \.npz file"):
        save_vit(plain, tmp_path / "x", "official")
    with pytest.raises(UserError, match="timm reads a folder"):
        save_vit(plain, tmp_path / "x.npz", "timm")
    with pytest.warns(UserWarning, match=r"official do not say core\.mlp, which is gelu here and gelu_tanh"):
        save_vit(plain, tmp_path / "x.npz", "official")


def test_images_and_names_go_with_the_weights(timm, tmp_path):
    from transformers import ViTForImageClassification, ViTImageProcessor

    model = ours(**SHAPES["square"])
    names = [f"kind {letter}" for letter in "abcdefg"]
    folder = save_vit(model, tmp_path / "five", "transformers5", names)
    assert class_names(folder) == names
    assert ViTForImageClassification.from_pretrained(folder).config.id2label[2] == "kind c"
    values = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0)).numpy()
    image = Image.fromarray(values)
    theirs = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    own = pixels_from_images([image], 32, 32)
    torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)
    assert class_names(save_vit(model, tmp_path / "timm", "timm", names)) == names
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert peer.pretrained_cfg["label_names"] == names
    assert class_names(save_vit(model, tmp_path / "unnamed", "transformers4")) is None
    for folder, whose in (("five", "transformers"), ("timm", "timm")):
        with pytest.raises(UserError, match=f"holds a model of {whose}; convert it with: mmvit convert"):
            Classifier.from_pretrained(tmp_path / folder)


def test_norms_have_the_epsilon_of_their_project_where_no_file_says_it(tmp_path):
    model = ours(**SHAPES["square"])
    for naming, folder, epsilon in (("transformers5", "five", 1e-12), ("timm", "timm", 1e-6)):
        save_vit(model, tmp_path / folder, naming)
        config = tmp_path / folder / "config.json"
        described = json.loads(config.read_text())
        described.pop("layer_norm_eps", None)
        config.write_text(json.dumps(described))
        assert load_vit(tmp_path / folder).config.core.norm_eps == epsilon, naming
        config.unlink()
        assert load_vit(tmp_path / folder, num_heads=4).config.core.norm_eps == epsilon, naming


def test_the_script_goes_there_and_back(run_script, tmp_path):
    model = ours(**SHAPES["square"])
    names = [f"kind {letter}" for letter in "abcdefg"]
    ImageClassifier(model, names).save_pretrained(tmp_path / "ours")
    for source, out, *more in (
        ("ours", "five", "--to", "transformers5"),
        ("five", "timm", "--to", "timm"),
        ("timm", "back"),
    ):
        ran = run_script("pipelines/convert_weights.py", tmp_path / source, tmp_path / out, *more)
        assert ran.returncode == 0, ran.stderr
    assert "back: 3 layers of width 24, 4 heads, patches of 8, 7 classes" in ran.stdout
    assert_equal(Classifier.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    assert ImageClassifier.from_pretrained(tmp_path / "back").classes == names
    (tmp_path / "five/config.json").unlink()
    ran = run_script("pipelines/convert_weights.py", tmp_path / "five", tmp_path / "x")
    assert ran.returncode == 2
    assert "the number of heads is unknown for width 24: set num_heads" in ran.stderr
    assert not (tmp_path / "x").exists()
    settings = [*["--set", "num_heads=4", "--set", "norm_eps=1e-6", "--set", "num_classes=2"]]
    ran = run_script("pipelines/convert_weights.py", tmp_path / "five", tmp_path / "x", *settings)
    assert ran.returncode == 0, ran.stderr
    assert not Classifier.from_pretrained(tmp_path / "x").head.weight.any()
    for setting, words in (
        ("num_heads", "--set num_heads: expected NAME=VALUE"),
        ("image_size=32x", "--set image_size: expected a side or HEIGHTxWIDTH"),
        ("image_size=16x48", "for 16 patches of 8 pixels; image_size 16x48 has 12"),
    ):
        out = tmp_path / "y"
        ran = run_script(
            "pipelines/convert_weights.py", tmp_path / "five", out, "--set", "num_heads=4", "--set", setting
        )
        assert ran.returncode == 2
        assert words in ran.stderr
    folder = tmp_path / "timm"
    described = json.loads((folder / "config.json").read_text())
    described["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.5, 0.5, 0.5]}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.warns(
        UserWarning, match=r"normalised by mean \[0\.485, 0\.456, 0\.406\]; classifiers here read"
    ):
        load_vit(folder)
    described.setdefault("model_args", {})["act_layer"] = "quick_gelu"
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="act_layer 'quick_gelu': expected one of gelu, "):
        load_vit(folder)
