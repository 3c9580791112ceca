"""Take the same share of every class of a split, to measure how far a few labels go.

    mmvit subset data/fashion-mnist data/fashion-mnist-1 --share 0.01
    mmvit subset data/pets data/pets-10 --share 0.1 --seed 1

Takes the samples of each class with the smallest hash of seed and key, rounded to the nearest number and at
least one, so a smaller share with the same seed is part of a larger one. Other splits are not copied.
"""

import hashlib
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    inherited_facts,
    read_dataset_card,
    read_samples,
    write_dataset_card,
)
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.address import place
from mmvit.streams.shards import shards_of


def main(
    source: Annotated[Path, Argument(help="folder of shards with cls", parser=place)],
    out: Annotated[Path, Argument(help="folder to write the shards to")],
    share: Annotated[float, Option(help="share of each class, above 0 and up to 1")],
    seed: Annotated[int, Option(help="another seed takes other samples")] = 0,
    split: Annotated[str, Option(help="split to take from")] = "train",
) -> None:
    if not 0 < share <= 1:
        raise UserError(f"--share: expected a number above 0 and up to 1, got {share}")
    facts = inherited_facts(source, out, adds="share")
    outcome, places = Outcome(), {}
    shards = shards_of(source, split)
    total = read_dataset_card(source).get("samples", {}).get(split)
    for sample in with_progress(read_samples(shards, outcome), total, f"reading {split}"):
        if "cls" not in sample.files:
            outcome.skip("no cls", sample.key)
            continue
        place = hashlib.sha256(f"{seed} {sample.key}".encode()).digest()
        places.setdefault(sample.files["cls"].strip(), []).append((place, sample.key))
    if not places:
        raise UserError(f"no sample of {split} in {source} has a cls")
    taken = {
        key
        for members in places.values()
        for _, key in sorted(members)[: max(1, round(share * len(members)))]
    }
    names = {str(number): name for number, name in enumerate(facts.get("classes", []))}
    with ShardWriter(out, split) as writer:
        chosen = (sample for sample in read_samples(shards, Outcome()) if sample.key in taken)
        for sample in with_progress(chosen, len(taken), f"writing {split}"):
            writer.write(sample.key, sample.files)
            number = sample.files["cls"].strip().decode(errors="replace")
            outcome.wrote(split, label=names.get(number, number))
    write_dataset_card(out, outcome, **{**facts, "share": share, "seed": seed})
    outcome.print(out)


if __name__ == "__main__":
    run_script(main)
