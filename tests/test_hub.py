"""Model folders: which export of a run is loaded, and what is left where nothing can be written."""

import errno
import io
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mmvit import ImageClassifier
from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.files import check_writable, whole_file, write_json
from mmvit.hub import SHIPPED, find_model_folder
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.registry import load_image_tokenizer
from mmvit.models.vq import VQConfig, VQModel


@pytest.fixture
def run(tmp_path) -> Path:
    for export in ("best", "last"):
        (tmp_path / "run" / export).mkdir(parents=True)
        write_json({"kind": "classifier", "config": {}}, tmp_path / "run" / export / "config.json")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (None, "best"),
        ("[train]\nsteps = 1", "best"),
        ('[train]\nselect = "last"', "last"),
        ('[train]\nselect = "accuracy"', "best"),
        ("train = 3", "best"),
        ("not toml [", "best"),
    ],
)
def test_a_run_stands_for_the_export_that_its_recipe_selects(run, recipe, expected):
    if recipe is not None:
        (run / "config.toml").write_text(recipe)
    assert find_model_folder(run) == run / expected
    other = {"best": "last", "last": "best"}[expected]
    (run / expected / "config.json").unlink()
    assert find_model_folder(run) == run / other  # a run that was stopped before it wrote the selected one
    (run / other / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"holds no model: expected config\.json in it, or in its best/ or last/"
    ):
        find_model_folder(run)


def test_what_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model_folder("generators/emoji") == SHIPPED
    assert (find_model_folder("tokenizers/emoji-image") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "text", ['{"kind": 3, "config": {}}', '{"kind": {}, "config": {}}', '{"kind": "vq"}', "[]"]
)
def test_a_description_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for load in (ImageClassifier, load_image_tokenizer):
        with pytest.raises(UserError, match=r"config\.json does not describe an mmvit model"):
            getattr(load, "from_pretrained", load)(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figures.json"
    write_json({"a": 1}, path)
    before = path.read_bytes()

    def break_off() -> None:
        with whole_file(path) as partial:
            partial.write_text("half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"figures\.json cannot be written: No space left on device"):
        break_off()
    with whole_file(tmp_path / "figures.json") as partial:
        assert partial.suffix == ".json"  # from which libraries infer the format
        partial.write_bytes(before)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_written_is_found_out_beforehand(tmp_path):
    check_writable(tmp_path / "new" / "folders" / "sheet.png")
    check_writable(tmp_path)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sheet\.png cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "sheet.png")
    full = mock.patch("tempfile.TemporaryFile", side_effect=lambda dir: io.FileIO("/dev/full", "wb"))
    with full, pytest.raises(UserError, match=r"sheet\.png cannot be written: No space left on device"):
        check_writable(tmp_path / "sheet.png")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_weights_are_saved_in_the_precision_asked_for(tmp_path):
    model = DiscreteVAE(DiscreteVAEConfig(codebook_size=16, width=8, blocks_per_group=1, code_width=4))
    weights = load_file(model.save_pretrained(tmp_path, torch.bfloat16) / "model.safetensors")
    assert weights.pop("passes").dtype == torch.int64
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = DiscreteVAE.from_pretrained(tmp_path)
    assert not again.training
    for name, tensor in weights.items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name


CORE = TransformerConfig(width=16, depth=1, num_heads=2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Classifier, ClassifierConfig(image_size=16, patch_size=8, core=CORE)),
        (VQModel, VQConfig(codebook_size=16, encoder_width=32, decoder_widths=(32, 16))),
        (DiscreteVAE, DiscreteVAEConfig(width=8)),
        (CLIP, CLIPConfig(image=ClassifierConfig(image_size=16, patch_size=8, core=CORE), text=CORE)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_no_weights_are_drawn_where_others_are_read_over_them(tmp_path, kind, config):
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
