"""Turn shards of images into shards of image codes, once, so that training a generator never touches pixels.

    mmvit encode data/emoji data/emoji-codes
    mmvit encode data/photos data/photos-codes --tokenizer runs/photos-image --size 96
    torchrun --nproc_per_node 8 -m mmvit encode data/photos data/photos-codes --tokenizer runs/photos-image

The first takes 20 s for 3,953 emoji on 2 cores. Every split of the source is encoded, each shard to one of
the same name; a sample keeps its captions and class, loses its image and gains `codes.npy` (rows, columns).
dataset.json says which image tokenizer made the codes, and training checks it.

Processes that torchrun starts share out the shards. Finished shards are kept when the command is interrupted,
and the same command goes on from there, on any number of processes; a shard is encoded again only if its
images have changed. The result is the same, byte for byte. With another tokenizer or other options, the
command refuses to replace them.

    mmvit encode data/emoji data/emoji-augmented --augmented 8 --flip-unless "left right"

This also encodes eight augmented copies of every training image (`augmented.npy`), for a recipe's
`data.augmented`. Each copy is shifted by up to --shift pixels, and every second one is flipped, unless a
caption, in any language, has a word that begins with "left" or "right" ("leftwards").
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.codes import MAX_CODES, pack_codes
from mmvit.data.encoding import Copies, DecodeImages, Part, read_parts, split_for
from mmvit.data.finished import FinishedShards, is_file, kept_when_interrupted
from mmvit.data.images import parse_size, to_unit_range
from mmvit.data.lock import sole_writer
from mmvit.data.samples import AUGMENTED
from mmvit.data.writing import (
    Outcome,
    WholeShard,
    inherited_facts,
    is_size,
    read_dataset_card,
    refuse_other_options,
    remove_shard,
    write_dataset_card,
)
from mmvit.errors import UserError
from mmvit.hub import fingerprint, trained_size
from mmvit.models.image_tokenizer import ImageTokenizer
from mmvit.models.registry import load_image_tokenizer
from mmvit.progress import with_progress
from mmvit.streams.address import place
from mmvit.streams.index import beside, load_index
from mmvit.streams.shards import BadShard, Sample, expand_shards, read_shard
from mmvit.streams.workers import default_workers, map_ahead
from mmvit.training.distributed import FOREVER, choose_device, environment_number, open_processes

BATCH = 64
TRAIN = "train"  # the split whose images get augmented copies
RECORDS = ".encoded"  # of finished shards


def main(
    source: Annotated[Path, Argument(help="folder of shards with images", parser=place)],
    out: Annotated[Path, Argument(help="folder to write shards of codes to")],
    tokenizer: Annotated[str, Option(help="image tokenizer: a folder, run or Hub repository")] = (
        "tokenizers/emoji-image"
    ),
    size: Annotated[
        str | None,
        Option(
            help="side, or HEIGHTxWIDTH, in pixels that images are resized to (default: what the tokenizer's "
            "run was trained on, else 64)"
        ),
    ] = None,
    augmented: Annotated[int, Option(min=0, help=f"augmented copies of each image of {TRAIN}")] = 0,
    shift: Annotated[int, Option(min=0, help="largest shift of augmented copies, in pixels each way")] = 2,
    flip_unless: Annotated[
        str, Option(help='flip every second copy, unless a caption has a word that begins so: "left right"')
    ] = "",
    workers: Annotated[
        int | None,
        Option(
            min=0,
            help="processes that decode images ahead, for each that encodes (default: one for each core but "
            "one, at most 8)",
        ),
    ] = None,
) -> None:
    copies = Copies(
        augmented, shift, tuple(re.split(r"[\s,]+", flip_unless.strip(" ,"))) if flip_unless else ()
    )
    options = {"augmented": augmented, "shift": shift, "flip_unless": " ".join(copies.flip_unless) or None}
    kind = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare() -> tuple[dict[str, Any], tuple[int, int], ImageTokenizer, dict[str, Any]]:
        facts = inherited_facts(source, out, adds="image_tokenizer")
        size_of_images = parse_size(size) if size else trained_size(tokenizer)
        model = load_image_tokenizer(tokenizer, choose_device(kind, environment_number("LOCAL_RANK", 0)))
        return facts, size_of_images, model, describe_tokenizer(model, tokenizer, *size_of_images)

    with (
        kept_when_interrupted(),
        open_processes("cpu", patience=FOREVER) as processes,
        ExitStack() as stack,
    ):
        facts, size_of_images, model, made = processes.together(prepare)
        how = {name: fact for name, fact in made.items() if name != "path"} | {"copies": asdict(copies)}
        shards = processes.from_main(lambda: name_shards(expand_shards(source)))
        finished = FinishedShards(out, RECORDS, how, {"image_tokenizer": made, "options": options})

        def begin() -> list[str]:
            refuse_other_shards(out, shards)
            refuse_other_codes(out, finished)
            stack.enter_context(sole_writer(out))
            chosen = to_encode(shards, finished)
            refuse_damaged({name: shards[name] for name in chosen}, out)
            if chosen:
                (out / "dataset.json").unlink(missing_ok=True)  # which says what made codes of before
            finished.records.mkdir(exist_ok=True)
            return chosen

        def encode_share(names: Sequence[str]) -> Sequence[str]:
            own = {name: shards[name] for name in names}
            decode = DecodeImages(size_of_images, {TRAIN: copies})
            ahead = default_workers() if workers is None else workers
            with closing(map_ahead(decode, read_parts(own.values()), ahead if own else 0)) as parts:
                total = count_samples(own.values())
                shown = processes.shown(parts, total, "encoding", attrgetter("num_read"))
                encode_shards(model, own, shown, finished)
            return names

        processes.share_out(processes.from_main(begin), encode_share)
        processes.on_main(lambda: complete(source, out, shards, finished, facts))


def describe_tokenizer(model: ImageTokenizer, path: str, height: int, width: int) -> dict[str, Any]:
    """What dataset.json says of the image tokenizer. Raises UserError if images of this size do not fit."""
    try:
        grid = model.grid(height, width)
    except UserError as error:
        raise UserError(f"--size {height}x{width} does not fit {path}: {error}") from None
    if model.codebook_size > MAX_CODES:
        raise UserError(f"{path} has {model.codebook_size:,} codes; shards hold at most {MAX_CODES:,}")
    return {
        "path": path,
        "size": [height, width],
        "grid": list(grid),
        "codebook_size": model.codebook_size,
        "fingerprint": fingerprint(model),
    }


def name_shards(shards: Iterable[Path]) -> dict[str, Path]:
    """The shard of images by the name of its shard of codes, `train-000000.tar`."""
    named: dict[str, Path] = {}
    for shard in shards:
        name = shard.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar") + ".tar"
        if name in named:
            raise UserError(f"{named[name]} and {shard} would both become {name}: remove one of them")
        named[name] = shard
    return named


def to_encode(shards: Mapping[str, Path], finished: FinishedShards) -> list[str]:
    """The names of the shards that are not finished, or whose source is another one since."""
    left = [name for name, shard in shards.items() if not finished.find(name, partial(is_file, shard))]
    if kept := len(shards) - len(left):
        print(f"{kept:,} of {len(shards):,} shards are encoded already", flush=True)
    if again := [name for name in left if finished.record(name).exists()]:
        print(
            f"encoding {len(again):,} again, {again[0]} for one: its images or its codes have changed since",
            flush=True,
        )
    return left


def refuse_other_shards(out: Path, shards: Mapping[str, Path]) -> None:
    """Raises UserError if `out` holds shards without codes, or splits that the source does not have."""
    there = {split_for(shard) for shard in out.glob("*.tar")}
    if there and not ("image_tokenizer" in read_dataset_card(out) or (out / RECORDS).is_dir()):
        raise UserError(f"{out} holds shards that mmvit encode did not make; name another folder")
    if left := there - {split_for(Path(name)) for name in shards}:
        raise UserError(
            f"{out} holds shards of {', '.join(sorted(left))}, which the source does not have; remove them, "
            "or name another folder"
        )


def refuse_other_codes(out: Path, finished: FinishedShards) -> None:
    """Raises UserError if `out` holds codes made with another tokenizer or other options: runs are trained on
    them, and some may be left of an interrupted command."""
    if not [*out.glob("*.tar")]:
        return
    card = read_dataset_card(out) or finished.card_before()
    before, made = card.get("image_tokenizer", {}), finished.card["image_tokenizer"]
    is_same = before.get("fingerprint", made["fingerprint"]) == made["fingerprint"]  # wherever it lies
    refuse_other_options(out, options_of(card, is_same), options_of(finished.card, is_same))


def options_of(card: Mapping[str, Any], is_same_tokenizer: bool) -> dict[str, Any]:
    """The options that a dataset.json tells of, by name."""
    made = card.get("image_tokenizer", {})
    tokenizer = {} if is_same_tokenizer else {"tokenizer": f"{made.get('path')} ({made['fingerprint']})"}
    size = {"size": "x".join(map(str, made["size"]))} if is_size(made.get("size")) else {}
    return {**tokenizer, **size, **card.get("options", {})}


def refuse_damaged(shards: Mapping[str, Path], out: Path) -> None:
    """Raises UserError for a damaged shard whose codes of before would be replaced by fewer."""
    if not read_dataset_card(out):
        return
    replaced = [shard for name, shard in shards.items() if (out / name).exists()]
    for shard in with_progress(replaced, len(replaced), "checking the source"):
        try:
            for _ in read_shard(shard, only=()):
                pass
        except BadShard as error:
            raise UserError(
                f"{error}; encoding again would leave fewer codes: repair it, or encode elsewhere"
            ) from None


def count_samples(shards: Collection[Path]) -> int | None:
    """As far as they have indexes."""
    indexes = [load_index(beside(shard), shard) for shard in shards]
    return sum(index.samples for index in indexes) if all(indexes) else None


def encode_shards(
    model: ImageTokenizer, shards: Mapping[str, Path], parts: Iterable[Part], finished: FinishedShards
) -> None:
    """Writes the codes of each of `shards`, of which `parts` come in their order."""
    of_shards = itertools.groupby(parts, attrgetter("shard"))
    for (name, shard), (_, own) in zip(shards.items(), of_shards, strict=True):
        outcome, split, written = Outcome(), split_for(shard), WholeShard(finished.folder / name)
        source: list[dict[str, Any]] = []
        try:
            for sample, codes in encode(model, samples_of(own, outcome, source)):
                files = {**sample.files, "codes.npy": pack_codes(codes[0])}
                if len(codes) > 1:
                    files[AUGMENTED] = pack_codes(codes[1:])
                written.write(sample.key, files)
                outcome.wrote(split)
            finished.add(written, source[0], outcome)
        finally:
            written.discard()


def samples_of(
    parts: Iterable[Part], outcome: Outcome, source: list[dict[str, Any]]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """The samples of one shard with the pixels of their image and its copies, (1 + copies, 3, height, width)
    in [-1, 1]. Adds to `outcome` what is counted, and to `source` what the shard is."""
    keys: set[str] = set()
    for part in parts:
        outcome.add(part.outcome)
        source += [part.source] if part.source else []
        for sample, pixels in zip(part.samples, part.pixels, strict=True):
            if not sample.key or sample.key in keys:
                outcome.skip("no key of its own in the shard", sample.key)
                continue
            keys.add(sample.key)
            yield sample, np.stack([to_unit_range(each) for each in pixels])


def encode(
    tokenizer: ImageTokenizer, samples: Iterator[tuple[Sample, np.ndarray]]
) -> Iterator[tuple[Sample, np.ndarray]]:
    """The samples with their codes, (1 + copies, rows, columns)."""
    device = next(tokenizer.parameters()).device
    group: list[tuple[Sample, np.ndarray]] = []
    for item in samples:
        group.append(item)
        if len(group) * len(item[1]) >= BATCH:
            yield from encode_group(tokenizer, group, device)
            group = []
    if group:
        yield from encode_group(tokenizer, group, device)


def encode_group(
    tokenizer: ImageTokenizer, group: list[tuple[Sample, np.ndarray]], device: torch.device
) -> Iterator[tuple[Sample, np.ndarray]]:
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in group])).to(device)
    codes = tokenizer.encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).cpu().numpy()
    return zip((sample for sample, _ in group), codes, strict=True)


def complete(
    source: Path,
    out: Path,
    shards: Mapping[str, Path],
    finished: FinishedShards,
    facts: Mapping[str, Any],
) -> None:
    """Removes shards of before, writes dataset.json and prints what all processes, in this and interrupted
    jobs, have counted."""
    outcome = Outcome(read_dataset_card(source).get("samples", {}))
    for name, shard in shards.items():
        counted = finished.find(name, partial(is_file, shard))
        if counted is None:
            raise UserError(
                f"{out / name} is not there, or {shard} has changed: see that all processes write to the "
                "same disk, and start the same command again"
            )
        outcome.add(counted)
    if not outcome.written:
        outcome.print(out)
        raise UserError(f"no image in {source} could be encoded")
    for old in out.glob("*.tar"):
        if old.name not in shards:
            remove_shard(old)
    finished.forget_all_but(shards)
    own = {name: fact for name, fact in facts.items() if not name.startswith("image_")}  # sizes, modes
    write_dataset_card(out, outcome, **own, **finished.card)
    outcome.print(out)


if __name__ == "__main__":
    run_script(main)
