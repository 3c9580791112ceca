"""What the fuzzer damages: small valid samples, shards, folders of images and of models of every kind; and
what reads them."""

import contextlib
import gzip
import io
import json
import os
import random
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mutations import mutate, mutate_bytes
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmvit.config import Config
from mmvit.core.transformer import TransformerConfig
from mmvit.data.captions import PAD, TextTokenizer
from mmvit.data.codes import pack_codes
from mmvit.data.samples import CaptionCodesSample, CaptionIdsPixelsSample, ClassifierSample
from mmvit.errors import UserError
from mmvit.evaluation.image_classifier import ImageClassifier
from mmvit.files import write_json
from mmvit.interop.vit_export import save_vit
from mmvit.interop.vqgan_export import save_vqgan
from mmvit.models.classifier import Classifier, ClassifierConfig
from mmvit.models.clip import CLIP, CLIPConfig
from mmvit.models.dvae import DiscreteVAE, DiscreteVAEConfig
from mmvit.models.generator_transformer import GeneratorConfig, GeneratorTransformer
from mmvit.models.joint import Joint, JointConfig
from mmvit.models.registry import load_classifier, load_image_tokenizer
from mmvit.models.resnet import ResNet, ResNetConfig
from mmvit.models.vq import VQConfig, VQModel
from mmvit.models.vqgan import VQGAN, VQGANConfig
from mmvit.places import load_script
from mmvit.sampling.candidates import CaptionScorer
from mmvit.sampling.generator import Generator
from mmvit.streams.index import index_of, save_index, scan
from mmvit.streams.shards import BadSample, BadShard, Sample, expand_shards, read_shard
from mmvit.streams.stream import ShardStream
from mmvit.training.checkpoint import read_state, write_state
from mmvit.weights import read_weights, write_weights

Files = dict[str, bytes]  # by path; what begins with LINK is a link, or a pipe if it points nowhere
LINK = b"link to "
GRID, CODES = (2, 3), 16


class Kind(NamedTuple):
    """`build` makes damaged files; `read` reads them, in a folder of their own, and raises if that harms."""

    build: Callable[[random.Random], Files]
    read: Callable[[Files, Path, random.Random], None]
    in_memory: bool = False


class Harm(Exception):
    """What was read, counted or written is not what it should be."""


# Samples


@cache
def tokenizer() -> TextTokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["red square", "blue circle", "a green square beside a red circle"], trainer)
    return TextTokenizer(made)


@cache
def images() -> Files:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 4), np.uint8)
    image, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    forms = {
        "rgb.png": (image.convert("RGB"), {}),
        "rgba.png": (image, {"exif": exif}),
        "palette.png": (image.convert("RGB").convert("P"), {"transparency": 3}),
        "grey16.png": (grey, {}),
        "bit.png": (image.convert("1"), {}),
        "rgb.jpg": (image.convert("RGB"), {"exif": exif, "icc_profile": noise.tobytes()}),
        "cmyk.jpg": (image.convert("CMYK"), {"progressive": True}),
        "rgb.webp": (image.convert("RGB"), {"exif": exif}),
        "frames.webp": (image, {"save_all": True, "append_images": [image] * 2, "lossless": True}),
        "frames.gif": (image, {"save_all": True, "append_images": [image.rotate(90)] * 2}),
        "rgb.bmp": (image.convert("RGB"), {}),
        "rgb.tif": (image.convert("RGB"), {"compression": "tiff_lzw"}),
    }
    files = {}
    for name, (one, options) in forms.items():
        buffer = io.BytesIO()
        one.save(
            buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2].upper()), **options
        )
        files[name] = buffer.getvalue()
    return files


def sample(rng: random.Random) -> Files:
    """The files of a valid sample."""
    name = rng.choice(list(images()))
    codes = np.full(GRID, rng.randrange(CODES))
    return {
        {"jpg": "jpg", "webp": "webp"}.get(name.rpartition(".")[2], "png"): images()[name],
        "cls": b"%d" % rng.randrange(4),
        "txt": "a red square, ein Quadrat, 赤".encode(),
        "json": json.dumps({"captions": {"en": "red square", "ja": "赤"}, "width": 10}).encode(),
        "codes.npy": pack_codes(codes),
        "augmented.npy": pack_codes(np.stack([codes, codes])),
    }


def damaged_sample(rng: random.Random) -> Files:
    files = sample(rng)
    for name in rng.sample(sorted(files), rng.choice((1, 1, 2))):
        files[name] = mutate(files[name], name, rng)
    return files


@cache
def decoders_of_samples() -> tuple[Callable, ...]:
    one = tokenizer()
    captioned = CaptionIdsPixelsSample(one, 8, (16, 24), ("en", "ja"), dropout=0.1)
    captioned.max_pixels = 2**18  # the first one reads images as large as allowed
    return (
        ClassifierSample((16, 16), 4),
        captioned,
        CaptionCodesSample(one, 8, GRID, CODES, ("ja", "en"), dropout=0.1, augmented=0.5),
    )


def read_sample(files: Files, folder: Path, rng: random.Random) -> None:
    for decode in decoders_of_samples():
        with contextlib.suppress(BadSample, UserError):
            decode(Sample("key", folder, files), rng)


# Shards


def damaged_shard(rng: random.Random) -> Files:
    buffer = io.BytesIO()
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice(forms)) as tar:
        for number in range(rng.randrange(1, 7)):
            stem = rng.choice(("", "a/b/", "n" * 60 + "/")) + f"{number:04d}"
            for extension, data in (sample if rng.random() < 0.8 else damaged_sample)(rng).items():
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = mutate(buffer.getvalue(), "x.tar", rng) if rng.random() < 0.95 else buffer.getvalue()
    if rng.random() < 0.1:
        packed = gzip.compress(data, 1)
        return {"train-000000.tar.gz": mutate_bytes(packed, rng) if rng.random() < 0.7 else packed}
    files = {"train-000000.tar": data}
    if rng.random() < 0.1:  # an index beside it, of what the shard was
        with tempfile.TemporaryDirectory() as place:
            shard = Path(place) / "x.tar"
            shard.write_bytes(buffer.getvalue())
            save_index(scan(shard), shard.with_name("x.index"))
            index = shard.with_name("x.index").read_bytes()
        files["train-000000.tar.index"] = mutate(index, "x.index", rng) if rng.random() < 0.7 else index
    return files


def read_damaged_shard(files: Files, folder: Path, rng: random.Random) -> None:
    shard = folder / min(files)
    whole = []
    try:
        with contextlib.suppress(BadShard):
            whole += (found.key for found in read_shard(shard))
        index = index_of(shard)
    except UserError:
        return
    is_own = shard.suffix == ".tar" and len(files) == 1
    if is_own and index.samples != len(whole):  # of a .gz, what is before damage is unpacked
        raise Harm(f"{len(whole)} samples are read from front to back, {index.samples} are indexed")
    stream = ShardStream(shard, rng.choice(decoders_of_samples()), 2, repeat=False, max_bad=1.0)
    delivered = 0
    try:
        for batch in stream:
            delivered += len(batch["keys"])
    except UserError:
        return
    report = stream.report()
    if delivered + sum(report["skipped"].values()) != report["read"] or report["read"] != index.samples:
        raise Harm(f"{delivered} samples delivered, {report['skipped']} skipped, {report['read']} read")


# Folders and lists of images


def damaged_source(rng: random.Random) -> Files:
    names = rng.sample(list(images()), 4)
    form = rng.choice(("captions", "classes", "csv", "jsonl"))
    files: Files = {}
    if form == "captions":
        for name in names:
            files |= {name: images()[name], f"{name.rpartition('.')[0]}.txt": b"a red square\nde.utf8=rot\n"}
    elif form == "classes":
        splits = rng.choice((("",), ("train/", "val/")))
        files |= {f"{rng.choice(splits)}{n % 2}/{n}-{name}": images()[name] for n, name in enumerate(names)}
    else:
        files |= {name: images()[name] for name in names}
        rows = [
            {"path": name, "caption": "red", "class": str(n % 2), "group": "g"}
            for n, name in enumerate(names)
        ]
        lines = [json.dumps({**row, "captions": {"de": "rot"}}) for row in rows]
        table = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        files |= {f"list.{form}": "\n".join(table if form == "csv" else lines).encode()}
    for name in rng.sample(sorted(files), rng.choice((0, 1, 1, 2))):
        files[name] = mutate(files[name], name, rng)
    if f"list.{form}" in files and rng.random() < 0.8:
        files[f"list.{form}"] = mutate(files[f"list.{form}"], f"list.{form}", rng)
    for name in rng.sample(sorted(files), rng.choice((0, 0, 1, 2))):
        odd = rng.choice(("/dev/zero", "/dev/full", "nowhere", ".", "..", name, "/proc/self/mem", ""))
        strange = rng.choice(
            ("\udcff.png", "nul\x01.png", "\x1b[31m.png", "a" * 240 + ".png", "d/" * 60 + "x.png", "-.jpg")
        )
        files[rng.choice((name, strange))] = rng.choice((LINK + odd.encode(), images()["rgb.png"], b""))
    return files


def read_source(files: Files, folder: Path, rng: random.Random) -> None:
    lists = [name for name in files if name.startswith("list.")]
    source, out = folder / "source" / (lists[0] if lists else ""), folder / "out"
    options = {
        "held_out_share": rng.choice((None, 0.0, 0.3)),
        "unlabelled": rng.random() < 0.3,
        "fit": rng.choice((None, None, "pad", "crop")),
        "size": rng.choice((None, None, "8", "8x12")),
        "caption_lines": rng.choice(("first", "all")),
    }
    try:
        load_script("pipelines/make_shards.py").main(source, out, **options)
    except UserError:
        if out.exists() and list(out.glob("*.tar")):
            raise Harm("shards are left by a run that was refused") from None
        return
    card = json.loads((out / "dataset.json").read_text())
    written = sum(1 for shard in expand_shards(out) for _ in read_shard(shard))
    if written != sum(card["samples"].values()):
        raise Harm(f"{written} samples in the shards, {card['samples']} in dataset.json")


# Folders of models


CORE = TransformerConfig(width=16, depth=1, num_heads=2)
VIT = ClassifierConfig(image_size=16, patch_size=8, num_classes=3, core=CORE)


@cache
def model_folders(root: Path) -> dict[str, tuple[Files, Callable[[Path], object]]]:
    """Valid folders of every kind, and what loads them."""
    torch.manual_seed(0)
    drawn = GeneratorConfig(
        vocab_size=tokenizer().vocab_size, text_length=4, codebook_size=CODES, grid=GRID, core=CORE
    )
    tower = VIT.model_copy(update={"num_classes": 2})
    vq = VQModel(VQConfig(codebook_size=CODES, encoder_width=8, decoder_widths=(8, 8), decoder_depths=(1, 1)))
    levels = {"widths": (8, 8), "encoder_attention": (1,), "decoder_attention": (1,), "num_groups": 4}
    sizes = {
        "codebook_size": CODES,
        "code_width": 4,
        "latent_width": 4,
        "stem_width": 8,
        "blocks_per_level": 1,
    }
    vqgan = VQGAN(VQGANConfig(**sizes, **levels))
    dvae = DiscreteVAE(DiscreteVAEConfig(codebook_size=CODES, width=4, code_width=4, blocks_per_group=1))
    classifier = ImageClassifier(Classifier(VIT), ["a", "b", "c"])
    resnet = ResNet(ResNetConfig(image_size=16, num_classes=3, width=32, depths=(1,), root="small"))
    joint = Joint(JointConfig(classifier=VIT, generator=drawn, core=CORE))
    clip = CLIP(clip_config(tower))
    generator = Generator(GeneratorTransformer(drawn), tokenizer(), vq)
    made: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
        "classifier": (classifier.save_pretrained, ImageClassifier.from_pretrained),
        "resnet": (resnet.save_pretrained, load_classifier),
        "generator": (generator.save_pretrained, lambda folder: say(Generator.from_pretrained(folder))),
        "joint": (joint.save_pretrained, Joint.from_pretrained),
        "files": (partial(classifier.save_pretrained, max_file_size=10_000), ImageClassifier.from_pretrained),
        "joint_files": (partial(joint.save_pretrained, max_file_size=10_000), load_classifier),
        "clip": (partial(save_clip, clip), lambda folder: say(CaptionScorer.from_pretrained(folder))),
        "vq": (vq.save_pretrained, load_image_tokenizer),
        "dvae": (dvae.save_pretrained, load_image_tokenizer),
        "vqgan": (vqgan.save_pretrained, load_image_tokenizer),
        "timm": (lambda folder: save_vit(Classifier(VIT), folder, "timm"), convert),
        "transformers": (lambda folder: save_vit(Classifier(VIT), folder, "transformers5", "abc"), convert),
        "transformers_files": (save_files, convert),
        "official": (lambda folder: save_vit(Classifier(VIT), folder / "vit.npz", "official"), convert),
        "torch": (save_torch, convert),
        "diffusers": (lambda folder: save_vqgan(vqgan, folder, "diffusers"), convert),
        "openai": (partial(load_script("pipelines/convert_weights.py").save_openai_dvae, dvae), convert),
        "checkpoint": (save_checkpoint, lambda folder: read_state(folder / "training.pt")),
    }  # fmt: skip
    found = {}
    for name, (save, load) in made.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        save(root / name)
        paths = [path for path in (root / name).rglob("*") if path.is_file()]
        found[name] = {str(path.relative_to(root / name)): path.read_bytes() for path in paths}, load
    return found


def clip_config(tower: Config) -> CLIPConfig:
    return CLIPConfig(
        image=tower, text=CORE, vocab_size=tokenizer().vocab_size, text_length=4, embedding_width=8
    )


def save_clip(clip: CLIP, folder: Path) -> None:
    clip.save_pretrained(folder)
    (folder / "text_tokenizer").mkdir(exist_ok=True)
    tokenizer().save(folder / "text_tokenizer" / "tokenizer.json")


def say(model: Generator | CaptionScorer) -> None:
    """Shows the text tokenizer a caption."""
    for dropout in (0.0, 0.1):
        model.text_tokenizer.encode(["A red square, 赤"], 4, dropout, random.Random(0))


def save_torch(folder: Path) -> None:
    weights = {name: torch.zeros(shape) for name, shape in timm_shapes().items()}
    torch.save({"model": weights}, folder / "vit.pth")
    write_json({"architecture": "x", "model_args": {"num_heads": 2}}, folder / "config.json")


def save_files(folder: Path) -> None:
    """A ViT of transformers in files of 10 kB."""
    file = save_vit(Classifier(VIT), folder, "transformers5", "abc") / "model.safetensors"
    write_weights(dict(read_weights(file)), file, max_file_size=10_000)


def timm_shapes() -> dict[str, torch.Size]:
    from mmvit.interop.vit_export import vit_to_weights

    return {name: tensor.shape for name, tensor in vit_to_weights(Classifier(VIT), "timm").items()}


def save_checkpoint(folder: Path) -> None:
    write_state({"progress": {"step": 3}, "random": [1, 2.5, "x", torch.arange(6)]}, folder / "training.pt")
    write_weights({"a": torch.zeros(2)}, folder / "model.safetensors")


def convert(folder: Path) -> None:
    """Reads as `mmvit convert` does, and writes ours."""
    out = folder.parent / "out"
    files = sorted(folder.iterdir())
    source = files[0] if len(files) == 1 else folder
    settings = ["num_heads=2"] if source.suffix in (".npz", ".pth") else []
    load_script("pipelines/convert_weights.py").main([source, out], set_=settings)


def damaged_model(rng: random.Random, root: Path) -> Files:
    name = rng.choice(list(model_folders(root)))
    files = dict(model_folders(root)[name][0])
    for path in rng.sample(sorted(files), rng.choice((1, 1, 1, min(2, len(files))))):
        files[path] = mutate(files[path], path, rng)
    if rng.random() < 0.05 and len(files) > 1:
        files.pop(rng.choice(list(files)))
    if rng.random() < 0.05:
        files[rng.choice(["config.json", *files])] = LINK + rng.choice((b"", b"/dev/zero", b".", b"nowhere"))
    return {f"{name}/{path}": data for path, data in files.items()}


def read_model(files: Files, folder: Path, rng: random.Random, root: Path) -> None:
    name = min(files).partition("/")[0]
    with contextlib.suppress(UserError):
        model_folders(root)[name][1](folder / "source" / name)


def kinds(folder: Path) -> dict[str, Kind]:
    root = folder / "models"
    return {
        "samples": Kind(damaged_sample, read_sample, in_memory=True),
        "shards": Kind(damaged_shard, read_damaged_shard),
        "sources": Kind(damaged_source, read_source),
        "models": Kind(partial(damaged_model, root=root), partial(read_model, root=root)),
    }


def put(files: Files, folder: Path) -> None:
    """Writes files, links and pipes into a folder."""
    for name, data in files.items():
        path = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if data == LINK:
                os.mkfifo(path)
            elif data.startswith(LINK):
                path.symlink_to(data.removeprefix(LINK).decode())
            elif not path.is_symlink():
                path.write_bytes(data)


warnings.simplefilter("ignore")
