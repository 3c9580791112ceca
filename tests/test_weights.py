"""Weights in one file or many: equal bytes, one tensor in memory at a time, each kind of damage by name."""

import ctypes
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CORE, drawn_weights, tiny_generator
from torch import nn

from mmvit.core.transformer import TransformerConfig
from mmvit.errors import UserError
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.fine_tuning import take_core
from mmvit.models.generator_transformer import GeneratorTransformer
from mmvit.models.joint import Joint, JointConfig
from mmvit.sampling.generator import Generator
from mmvit.training.checkpoint import Checkpoints
from mmvit.training.distributed import Processes
from mmvit.weights import DTYPES, WEIGHTS, read_weights, write_weights

INDEX = f"{WEIGHTS}.index.json"
LAYERS = {f"layer{number}.weight": torch.full((100,), float(number)) for number in range(5)}  # 400 bytes each


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path, assert_same_state):
    kinds = {f"{name.lower()}.é": torch.ones(3, 2).to(dtype) for name, dtype in DTYPES.items()}
    kinds |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.rand(3, 5).T}
    write_weights(kinds, tmp_path / WEIGHTS)
    save_file({name: tensor.contiguous() for name, tensor in kinds.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert_same_state(dict(read_weights(tmp_path / WEIGHTS)), kinds)


def test_a_model_in_many_files_is_the_model_in_one(tmp_path, assert_same_state):
    model = DiscreteVAE(DiscreteVAEConfig(codebook_size=16, width=8, blocks_per_group=1, code_width=4))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_file_size=20_000)
    assert names_in(tmp_path / "one") == ["config.json", WEIGHTS]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert_same_state(
        *(DiscreteVAE.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    )
    theirs = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert_same_state(theirs, load_file(tmp_path / "one" / WEIGHTS))


def test_other_libraries_read_the_index(tmp_path, assert_same_state):
    hub = pytest.importorskip("huggingface_hub")
    write_weights(LAYERS, tmp_path / WEIGHTS, max_file_size=800)
    layers = [nn.ParameterDict({"weight": torch.zeros(100)}) for _ in LAYERS]
    model = nn.ModuleDict({f"layer{number}": layer for number, layer in enumerate(layers)})
    hub.load_torch_model(model, tmp_path)
    assert_same_state(model.state_dict(), LAYERS)


def test_each_save_leaves_only_its_own_files(tmp_path, assert_same_state):
    def files(max_file_size):
        write_weights(LAYERS, tmp_path / WEIGHTS, max_file_size=max_file_size)
        assert_same_state(dict(read_weights(tmp_path / WEIGHTS)), LAYERS)
        return names_in(tmp_path)

    thirds = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert files(800) == [*thirds, INDEX]
    assert files(800) == [*thirds, INDEX]
    assert files(400) == [*(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)), INDEX]
    assert files(2000) == [WEIGHTS]
    assert files(1) == [*(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)), INDEX]


def test_one_tensor_is_held_while_writing_and_reading(tmp_path, assert_same_state):
    alive = weakref.WeakSet()

    def made():
        for name, tensor in reversed(LAYERS.items()):
            alive.add(new := tensor.clone())
            assert len(alive) == 1
            yield name, new
            del new

    layout = {name: tensor.to("meta") for name, tensor in LAYERS.items()}
    write_weights(layout, tmp_path / WEIGHTS, made(), max_file_size=800)
    assert_same_state(dict(read_weights(tmp_path / WEIGHTS)), LAYERS)


@pytest.mark.parametrize("what", ["disk", "shape", "twice", "never"])
def test_a_failed_save_leaves_the_model_before_and_goes_through_all_tensors(
    tmp_path, what, assert_same_state
):
    write_weights(LAYERS, tmp_path / WEIGHTS, max_file_size=800)
    before, seen = names_in(tmp_path), []

    def made():
        for name, tensor in LAYERS.items():
            seen.append(name)
            if what == "disk" and len(seen) == 2:
                (tmp_path / ".partial-model-00002-of-00005.safetensors").unlink()
            if not (what == "never" and len(seen) == 3):
                yield name, tensor[:1] if what == "shape" and len(seen) == 2 else tensor
        if what == "twice":
            yield name, tensor

    messages = {
        "disk": "model-00002-of-00005.safetensors cannot be written: No such file",
        "shape": "announced",
    }
    with pytest.raises((UserError, ValueError), match=messages.get(what, f"came {what}|{what} came")):
        write_weights(LAYERS, tmp_path / WEIGHTS, made(), max_file_size=400)
    assert seen == [*LAYERS]
    assert names_in(tmp_path) == before
    assert_same_state(dict(read_weights(tmp_path / WEIGHTS)), LAYERS)


@pytest.mark.parametrize(("before", "after"), [(9999, 800), (800, 9999), (800, 400), (800, 800)])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path, before, after):
    new = {name: tensor + 10 for name, tensor in LAYERS.items()}
    states = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        write_weights(LAYERS, folder / WEIGHTS, max_file_size=before)
        child = os.fork()
        if not child:
            kill_before_change(number)
            write_weights(new, folder / WEIGHTS, max_file_size=after)
            os._exit(0)
        is_done = os.waitpid(child, 0)[1] == 0
        states.append(state_of(folder, {"old": LAYERS, "new": new}))
        write_weights(new, folder / WEIGHTS, max_file_size=400)
        assert len(names_in(folder)) == 6
        assert state_of(folder, {"new": new}) == "new"
        if is_done:
            break
    is_replaced = before == after == 800  # file by file, with the same names
    assert [*dict.fromkeys(states)] == (["old", "none", "new"] if is_replaced else ["old", "new"])


def kill_before_change(number):
    """Ends this process before it renames or removes a file after `number` such changes."""
    numbers = itertools.count()

    def count(event, details):
        if event in ("os.rename", "os.remove") and next(numbers) == number:
            os._exit(1)

    sys.addaudithook(count)


def state_of(folder, models):
    """Which of the models is in a folder; "none" if it is told that none is."""
    try:
        found = dict(read_weights(folder / WEIGHTS))
    except UserError:
        return "none"
    equal = [name for name, model in models.items() if all(torch.equal(found[n], model[n]) for n in model)]
    return equal[0] if equal else "a mixture"


def damage_file(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def with_index(**changes):
    def damage(folder):
        facts = json.loads((folder / INDEX).read_text())
        for name, file in changes.get("weight_map", {}).items():
            facts["weight_map"][name] = file
            if file is None:
                del facts["weight_map"][name]
        facts["metadata"] |= changes.get("metadata", {})
        (folder / INDEX).write_text(json.dumps(facts))

    return damage


def link(name, target):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), f"lacks {INDEX}, which {FIRST} is useless without"),
        (lambda folder: (folder / INDEX).write_text("[" * 10**5), f"{INDEX} is not valid JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX}: expected weight_map"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), f"{INDEX}: expected weight_map"),
        (with_index(weight_map={"layer0.weight": 3}), f"{INDEX}: expected weight_map"),
        (with_index(weight_map={"layer0.weight": "../x.safetensors"}), r"layer0.weight: .*got '\.\./x\.saf"),
        (
            with_index(weight_map={"layer0.weight": "/x.safetensors"}),
            "layer0.weight: expected a .safetensors",
        ),
        (
            with_index(weight_map={"layer0.weight": 99 * "xxx" + ".safetensors"}),
            "expected a .safetensors file",
        ),
        (with_index(weight_map={"layer0.weight": "config.json"}), "layer0.weight: expected a .safetensors"),
        (lambda folder: (folder / SECOND).unlink(), f"no weights at .*{SECOND}"),
        (lambda folder: ((folder / THIRD).unlink(), os.mkfifo(folder / THIRD)), f"no weights at .*{THIRD}"),
        (link(THIRD, "/dev/zero"), f"no weights at .*{THIRD}"),
        (link(THIRD, SECOND), f"{THIRD} lacks layer4.weight, expected there by {INDEX}"),
        (damage_file, f"{SECOND} is damaged or not a safetensors file"),
        (with_index(weight_map={"layer9.weight": FIRST}), f"{FIRST} lacks layer9.weight, expected there by"),
        (
            with_index(weight_map={"layer0.weight": None}),
            f"{FIRST} holds layer0.weight, not listed by {INDEX}",
        ),
        (
            lambda folder: save_file({name: LAYERS[name] for name in list(LAYERS)[:3]}, folder / FIRST),
            f"{FIRST} holds layer2.weight, expected in {SECOND} by {INDEX}",
        ),
        (
            lambda folder: shutil.copy(folder / FIRST, folder / "model-00004-of-00003.safetensors"),
            "does not list model-00004-of-00003",
        ),
        (with_index(metadata={"total_size": 1}), "total_size is 1, but the tensors have 2000 bytes"),
    ],
)
def test_damage_of_a_model_in_many_files_is_named(tmp_path, damage, message):
    write_weights(LAYERS, tmp_path / WEIGHTS, max_file_size=800)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / WEIGHTS)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    write_weights(LAYERS, tmp_path / WEIGHTS)
    weights = read_weights(tmp_path / WEIGHTS)
    os.truncate(tmp_path / WEIGHTS, 1000)
    assert "layer4.weight" in weights
    with pytest.raises(UserError, match=r"has been cut off .*: layer4.weight ends early"):
        weights["layer4.weight"]


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path, assert_same_state):
    write_weights(LAYERS, tmp_path / "snapshot" / WEIGHTS, max_file_size=800)
    (tmp_path / "blobs").mkdir()
    for path in [*(tmp_path / "snapshot").iterdir()]:
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert_same_state(dict(read_weights(tmp_path / "snapshot" / WEIGHTS)), LAYERS)


def test_every_loader_takes_many_files(tmp_path, tokenizer, assert_same_state):
    sizes = {"image_size": 16, "patch_size": 8, "num_classes": 2, "core": CORE}
    joint = drawn_weights(Joint(JointConfig(core=CORE, classifier=ClassifierConfig(**sizes))))
    joint.save_pretrained(tmp_path / "joint", max_file_size=10_000)
    generator = tiny_generator(tokenizer)
    generator.save_pretrained(tmp_path / "generator", max_file_size=10_000)
    classifier = ImageClassifier(joint.classifier, ["a", "b"])
    classifier.save_pretrained(tmp_path / "classifier", max_file_size=10_000)
    assert not any((folder / WEIGHTS).exists() for folder in tmp_path.iterdir())
    core = Classifier(ClassifierConfig(**sizes))
    take_core(core, tmp_path / "joint")
    pairs = [
        (joint, Joint.from_pretrained(tmp_path / "joint")),
        (joint.classifier, Classifier.from_pretrained(tmp_path / "joint")),
        (joint.generator, GeneratorTransformer.from_pretrained(tmp_path / "joint")),
        (joint.core, core.core),
        (joint.classifier, ImageClassifier.from_pretrained(tmp_path / "classifier").model),
        (generator.transformer, Generator.from_pretrained(tmp_path / "generator").transformer),
    ]
    for ours, loaded in pairs:
        assert_same_state(ours.state_dict(), loaded.state_dict())


def test_each_file_of_a_checkpoint_is_verified(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, processes=Processes(0, 1, torch.device("cpu")))
    write = partial(write_weights, LAYERS, max_file_size=800)
    checkpoint = checkpoints.save(1, lambda folder: write(folder / WEIGHTS))
    assert checkpoints.latest() == (checkpoint, [])
    flip = bytearray((checkpoint / SECOND).read_bytes())
    flip[-1] ^= 1
    (checkpoint / SECOND).write_bytes(flip)
    assert checkpoints.latest()[1] == [
        f"the checkpoint {checkpoint} is damaged: the content of {SECOND} has changed since it was written"
    ]


WIDE = ClassifierConfig(
    image_size=16, patch_size=8, num_classes=2, core=TransformerConfig(width=1024, depth=2, num_heads=8)
)  # 102 MB


def peak_of(action, *arguments):
    """The most memory in bytes that `action`, done again, adds to this process at any moment."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    action(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    kept = action(*arguments)  # noqa: F841
    return status("VmHWM") - before


def status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def save_wide(folder):
    """Writes a model of which no more than a tensor is ever there."""
    layout = planned().state_dict()
    made = ((name, torch.ones_like(tensor, device="cpu")) for name, tensor in layout.items())
    write_weights(layout, folder / WEIGHTS, made, max_file_size=5 * 10**7)
    description = {"kind": "classifier", "config": WIDE.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(description))


def planned():
    with torch.device("meta"):
        return Classifier(WIDE)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_memory_holds_a_tensor_when_saving_and_the_model_and_a_tensor_when_loading(tmp_path):
    sizes = [tensor.nbytes for tensor in planned().state_dict().values()]
    with multiprocessing.get_context("fork").Pool(1) as child:
        saved = child.apply(peak_of, (save_wide, tmp_path))
        loaded = child.apply(peak_of, (Classifier.from_pretrained, tmp_path))
    slack = 1e7
    assert saved < max(sizes) + slack
    assert sum(sizes) / 2 < loaded < sum(sizes) + max(sizes) + slack  # in part memory that was free before
