"""Pack your own images into shards, each with a caption, a class, or both (or neither, with --unlabelled).

    mmvit shards photos/ data/photos --held-out-share 0.1   # photos/a.jpg with photos/a.txt beside it
    mmvit shards pets/ data/pets --size 96 --fit pad        # class folders: pets/cat/1.jpg, pets/dog/2.jpg
    mmvit shards pets/ data/pets                            # splits: pets/train/cat/1.jpg, pets/val/cat/2.jpg
    mmvit shards list.csv data/list                         # or .jsonl: path, caption, class, split, group
    torchrun --nproc_per_node 8 -m mmvit shards photos/ data/photos

Captions are the .txt files beside images; without any, folder names are classes. Of a .txt with several lines
the first is the caption; lines such as `de.utf8=ein Apfel` below it are captions in other languages. Paths in
a list are relative to it; in JSON lines `captions` may hold {language: caption}.

Without splits of its own, a share of the images is held out, chosen by a hash of the key; images of one
`group` stay together. Images keep their bytes, unless --size, --fit or --max-side changes them or they are
not JPEG, PNG or WebP. Training later crops what is not square; --fit pad keeps all of every image.

Several shards are written at a time, and processes that torchrun starts share them out. The same command goes
on where it was interrupted, on any number of processes, and the shards appear in OUT together, once all are
finished.
"""

import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

from PIL import ImageColor
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.finished import FinishedShards, kept_when_interrupted, refuse_lacking
from mmvit.data.images import Fit, ImageFacts, has_shape, parse_size
from mmvit.data.lock import sole_writer
from mmvit.data.packing import STAGING, Pack, Plan, Shape, image_files, plan_shards, publish
from mmvit.data.sources import CaptionLines, Entry, find_entries
from mmvit.data.writing import (
    DERIVED,
    Outcome,
    in_order,
    read_dataset_card,
    refuse_other_data,
    refuse_other_options,
    write_dataset_card,
)
from mmvit.errors import UserError, refuse_source, shorten
from mmvit.streams.shards import HELD_OUT, OLD_HELD_OUT, BadSample, split_of
from mmvit.streams.workers import default_workers, map_ahead
from mmvit.training.distributed import FOREVER, open_processes

TRAIN = "train"
HELD_OUT_SHARE = 0.05
LONG_CAPTION = 128  # characters: about 32 tokens of English, a generator's default text_length


def main(
    source: Annotated[Path, Argument(help="a folder, a .csv or a .jsonl")],
    out: Annotated[Path, Argument(help="folder to write the shards to")],
    held_out_share: Annotated[
        float | None,
        Option(
            help=f"share of the samples in the split {HELD_OUT} (default: {HELD_OUT_SHARE}, or none if the "
            "source has a split to evaluate on)"
        ),
    ] = None,
    unlabelled: Annotated[bool, Option("--unlabelled", help="images only, no captions and classes")] = False,
    caption_lines: Annotated[CaptionLines, Option(help="lines of a .txt that make the caption")] = "first",
    size: Annotated[str | None, Option(help="resize to this side, or HEIGHTxWIDTH, in pixels")] = None,
    fit: Annotated[
        Fit | None, Option(help="crop images to a square (or --size) around the centre, or pad them to it")
    ] = None,
    pad_colour: Annotated[str, Option(help="for --fit pad: a name, or #rrggbb")] = "white",
    max_side: Annotated[int | None, Option(help="shrink images so that no side is longer, in pixels")] = None,
    samples_per_shard: Annotated[int, Option(help="samples in one tar file")] = 1000,
    workers: Annotated[
        int | None,
        Option(
            min=0, help="processes that read images and write shards (default: one for each core but one)"
        ),
    ] = None,
) -> None:
    outcome = Outcome()
    options = {
        "held_out_share": held_out_share,
        "unlabelled": unlabelled,
        "caption_lines": caption_lines,
        "size": size,
        "fit": fit,
        "pad_colour": pad_colour,
        "max_side": max_side,
        "samples_per_shard": samples_per_shard,
    }
    with (
        kept_when_interrupted(),
        open_processes("cpu", patience=FOREVER) as processes,
        ExitStack() as stack,
    ):

        def begin() -> tuple[Pack, list[Plan]]:
            if held_out_share is not None and not 0 <= held_out_share < 1:
                raise UserError(
                    f"--held-out-share: expected a number from 0 to below 1, got {held_out_share}"
                )
            if max_side is not None and (max_side < 1 or size is not None):
                raise UserError("--max-side: expected 1 or more, and no --size beside it")
            shaped = fit or ("crop" if size else None)
            shape = Shape(parse_size(size) if size else None, shaped, pad_colour, max_side)
            check_colour(pad_colour)
            refuse_source(out, source)
            refuse_other_data(out, str(source))
            refuse_other_shards(out, options)
            entries = find_entries(source, outcome, unlabelled, caption_lines)
            if not entries:
                raise UserError(f"nothing usable in {source}: {outcome.reasons() or 'it is empty'}")
            numbers = {name: number for number, name in enumerate(name_classes(entries, source))}
            entries = in_mixed_order(entries)
            choose_splits(entries, held_out_share, lambda entry: is_usable(entry, shape), outcome)
            pack = Pack(FinishedShards(out / STAGING, "records", {}), shape, numbers)
            plans = plan_shards(entries, samples_per_shard)
            stack.enter_context(sole_writer(out))
            make_room(pack.finished, len(plans))
            return pack, plans

        pack, plans = processes.from_main(begin)

        def pack_share(own: Sequence[Plan]) -> Iterator[Outcome]:
            refuse_lacking([pack.finished.folder])
            most = default_workers() if workers is None else workers
            with closing(map_ahead(pack, own, min(most, len(own) // 2))) as packed:
                images = sum(len(plan.entries) for plan in own)
                yield from processes.shown(packed, images, "writing shards", num_read)

        done = processes.share_out(plans, pack_share)
        processes.on_main(lambda: complete(source, out, pack, plans, done, outcome, options))


def check_colour(name: str) -> None:
    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise UserError(f"--pad-colour: expected a colour such as white or #8090ff, got {name}") from None


def refuse_other_shards(out: Path, options: dict[str, Any]) -> None:
    """Raises UserError if `out` holds shards that were made with other options, or not by this command."""
    card = read_dataset_card(out)
    is_own = not DERIVED & card.keys() and ("source" in card or (out / STAGING).is_dir())
    if not is_own and [*out.glob("*.tar")]:
        raise UserError(
            f"{out} holds shards that mmvit shards did not make: remove them, or name another folder"
        )
    refuse_other_options(out, card.get("options", {}), options)


def name_classes(entries: list[Entry], source: Path) -> list[str]:
    """The names of the classes, sorted; in the order of their numbers if all are different numbers.

    Raises:
        UserError: for a list whose numbers have a gap, and for a single class where there are no captions.
    """
    names = {entry.label for entry in entries if entry.label is not None}
    captioned = any(entry.caption is not None or entry.captions for entry in entries)
    if len(names) == 1 and not captioned:
        inner = source / min(names)
        within = source.is_dir() and inner.is_dir() and any(path.is_dir() for path in inner.iterdir())
        raise UserError(
            f"{source} has only one class, {min(names)!r}; a classifier needs two or more: give each its own "
            "folder or name, or leave classes out (--unlabelled)"
            + (f"; if the classes are the folders in {inner}, use mmvit shards {inner}" if within else "")
        )
    numbers = {int(name) for name in names if name.isdecimal()}
    if len(numbers) < len(names) or not names:
        return sorted(names)
    if max(numbers) >= len(numbers) and not source.is_dir():  # folders may well be called 1999 and 2020
        missing = next(number for number in itertools.count() if number not in numbers)
        raise UserError(
            f"{source} numbers its classes up to {max(numbers)}, but class {missing} has no image: number "
            "them from 0 without gaps, or give names"
        )
    return sorted(names, key=int)


def in_mixed_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: digest(entry.key))


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def choose_splits(
    entries: list[Entry], share: float | None, is_usable: Callable[[Entry], bool], outcome: Outcome
) -> None:
    """Sets the split of every entry: its own, or held-out or train by a rule of its key or group alone."""
    own = Counter(entry.split for entry in entries if entry.split)
    if own:
        found = ", ".join(f"{split} {own[split]:,}" for split in in_order(own))
        outcome.remark(f"The source has splits of its own: {found}.")
    if own.get(HELD_OUT) and share:
        raise UserError(
            f"the source has {own[HELD_OUT]:,} held-out images of its own; leave --held-out-share out"
        )
    has_others = any(split != TRAIN for split in own)
    for entry in entries:
        if entry.split is None and has_others:
            outcome.note("no split is given, so it is in train", entry.name)
        entry.split = entry.split or TRAIN
    if share is None:
        share = 0 if has_others else HELD_OUT_SHARE
    chosen = choose_held_out([entry for entry in entries if entry.split == TRAIN], share, is_usable)
    for entry in chosen:
        entry.split = HELD_OUT
    for group, splits in splits_of_groups(entries).items():
        if TRAIN in splits and len(splits) > 1:
            outcome.note("groups both in train and in another split", group)


def choose_held_out(entries: list[Entry], share: float, is_usable: Callable[[Entry], bool]) -> list[Entry]:
    """The entries to hold out, whole groups, by a hash alone. Where the hashes would choose none or all of
    several, or none that is usable, one more or one fewer is held out."""
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        members.setdefault(entry.key if entry.group is None else f"group {entry.group}", []).append(entry)
    places = {name: int.from_bytes(hashlib.sha256(digest(name)).digest()[:8]) / 2**64 for name in members}
    ranked = sorted(places, key=places.get)
    number = sum(place < share for place in places.values())
    if share > 0 and len(ranked) > 1:
        number = min(max(number, 1), len(ranked) - 1)
        while number < len(ranked) - 1 and not any(
            is_usable(entry) for name in ranked[:number] for entry in members[name]
        ):
            number += 1
    chosen = keep_classes(ranked[:number], members)
    if share > 0 and not chosen:  # the next that may go
        chosen = next(filter(None, (keep_classes([name], members) for name in ranked[number:])), [])
    return [entry for name in chosen for entry in members[name]]


def keep_classes(ranked: list[str], members: dict[str, list[Entry]]) -> list[str]:
    """Those of `ranked` that can be held out so that each class keeps an image to train on."""
    left = Counter(entry.label for group in members.values() for entry in group)
    chosen = []
    for name in ranked:
        own = Counter(entry.label for entry in members[name] if entry.label is not None)
        if all(left[label] > count for label, count in own.items()):
            left -= own
            chosen.append(name)
    return chosen


def splits_of_groups(entries: Iterable[Entry]) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = {}
    for entry in entries:
        if entry.group is not None:
            splits.setdefault(entry.group, set()).add(entry.split)
    return splits


def make_room(finished: FinishedShards, number: int) -> None:
    """Makes the folder of shards that are finished before all are, and says what is in it already."""
    if there := [*finished.folder.glob("*.tar")]:
        print(
            f"going on from an interrupted run, which finished {len(there):,} of {number:,} shards",
            flush=True,
        )
    finished.records.mkdir(parents=True, exist_ok=True)
    for left in finished.folder.glob(".*.partial"):
        left.unlink()


def complete(
    source: Path,
    out: Path,
    pack: Pack,
    plans: Sequence[Plan],
    done: Sequence[Outcome],
    outcome: Outcome,
    options: dict[str, Any],
) -> None:
    """Publishes all shards, writes dataset.json and prints what all processes have counted."""
    entries = [entry for plan in plans for entry in plan.entries]
    for counted in done:
        outcome.add(counted)
    staged = pack.finished.folder
    try:
        refuse_unusable(outcome, pack.numbers, source)
    except UserError:  # nothing has been replaced yet
        shutil.rmtree(staged)
        raise
    before = read_dataset_card(out).get("samples", {})  # splits of an earlier run are replaced, too
    splits = {TRAIN, HELD_OUT, OLD_HELD_OUT, *(entry.split for entry in entries), *before}
    names = [plan.name for plan in plans if outcome.written[split_of(Path(plan.name))]]
    refuse_lacking(staged / name for name in names)
    publish(staged, out, names, splits)
    facts: dict[str, Any] = {"classes": [*pack.numbers]} if pack.numbers else {}
    if pack.shape.fit:
        facts["image_fit"] = pack.shape.fit
    write_dataset_card(out, outcome, source=str(source), options=options, **facts)
    shutil.rmtree(staged)
    remark_on_images(outcome.originals, pack.shape, outcome)
    remark_on_captions(entries, outcome)
    remark_on_classes([*pack.numbers], outcome)
    if (
        options["held_out_share"] != 0
        and not outcome.written.get(HELD_OUT)
        and not outcome.written.get("test")
    ):
        outcome.remark(
            "Nothing is held out, as there is only one image, or one of each class; data.held_out of a "
            "recipe needs some."
        )
    outcome.print(out)


def refuse_unusable(outcome: Outcome, classes: Iterable[str], source: Path) -> None:
    """Raises UserError if no image, or none of a class, could be used."""
    if not outcome.written:
        raise UserError(f"no image of {source} could be used: {outcome.reasons()}")
    used = {name for members in outcome.of_class.values() for name in members}
    if empty := [name for name in classes if name not in used]:
        raise UserError(
            f"no image of the class{'es' if len(empty) > 1 else ''} {shorten(empty)} could be used: "
            f"{outcome.reasons()}; repair them, or leave these classes out"
        )


def num_read(done: Outcome) -> int:
    return done.written.total() + done.skipped.total()


def is_usable(entry: Entry, shape: Shape) -> bool:
    try:
        image_files(entry.path, shape)
    except BadSample:
        return False
    return True


def remark_on_images(seen: Counter[ImageFacts], shape: Shape, outcome: Outcome) -> None:
    of_all = f"of {seen.total():,} images"
    if transparent := sum(n for facts, n in seen.items() if facts.is_transparent):
        outcome.remark(f"{transparent:,} {of_all} have transparency; models see them on white.")
    if turned := sum(n for facts, n in seen.items() if facts.is_turned):
        outcome.remark(f"{turned:,} {of_all} are turned upright, as their EXIF tag says.")
    changed = sum(n for facts, n in seen.items() if not has_shape(facts.size, shape.size or (1, 1)))
    if not changed:
        return
    target = "x".join(map(str, shape.size)) if shape.size else "a square"
    if shape.fit == "pad":
        outcome.remark(f"{changed:,} {of_all} were padded with {shape.pad_colour} to {target}.")
    elif shape.fit == "crop":
        outcome.remark(f"{changed:,} {of_all} were cropped to {target}; --fit pad keeps all of them.")
    else:
        outcome.remark(
            f"{changed:,} {of_all} are not square; training crops them to the recipe's image size around the "
            "centre. --fit pad keeps all of them."
        )


def remark_on_classes(classes: list[str], outcome: Outcome) -> None:
    if untrained := [name for name in classes if not outcome.of_class.get(TRAIN, {}).get(name)]:
        outcome.remark(f"Warning: no training image of {shorten(untrained)}.")
    others = [split for split in outcome.of_class if split != TRAIN]
    if only := [
        name for name in classes
        if others and name not in untrained and not any(outcome.of_class[split].get(name) for split in others)
    ]:  # fmt: skip
        outcome.remark(f"Warning: no image outside {TRAIN} of {shorten(only)}.")


def remark_on_captions(entries: list[Entry], outcome: Outcome) -> None:
    lengths = {
        entry.name: max(map(len, (entry.caption or "", *(entry.captions or {}).values())))
        for entry in entries
    }
    num_long = sum(length > LONG_CAPTION for length in lengths.values())
    if num_long:
        longest = max(lengths, key=lengths.get)
        outcome.remark(
            f"{num_long / len(entries):.1%} of the captions are longer than {LONG_CAPTION} characters, the "
            f"longest has {lengths[longest]:,} ({longest}). A model reads model.text_length tokens of about "
            "four characters each, by default 32, and cuts the rest."
        )


if __name__ == "__main__":
    run_script(main)
