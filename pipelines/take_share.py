"""Takes a share of a split with its classes, as many of each: to measure how far few labels go.

    python pipelines/take_share.py data/fashion-mnist data/fashion-mnist-1 --share 0.01 --seed 0

Of each class the samples with the smallest hash of seed and key are taken, rounded to the nearest number and
at least one; so a smaller share of the same seed is part of a larger one. The other splits stay where they
are.
"""

import argparse
import hashlib
from pathlib import Path

from mmvit.data.shards import shards_of
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    inherited_facts,
    read_samples,
    refuse_other_data,
    with_progress,
    write_dataset_card,
)
from mmvit.errors import UserError, refuse_source, run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of shards with cls")
    parser.add_argument("out", type=Path, help="folder to write shards to")
    parser.add_argument("--share", type=float, required=True, help="of each class, from 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", help="which to take from (%(default)s)")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        raise UserError(f"--share {options.share} is not in (0, 1]")
    refuse_source(options.out, options.source)
    outcome, places = Outcome(), {}
    shards = shards_of(options.source, options.split)
    for sample in read_samples(shards, outcome):
        if "cls" not in sample.files:
            outcome.skip("no cls", sample.key)
            continue
        place = hashlib.sha256(f"{options.seed} {sample.key}".encode()).digest()
        places.setdefault(sample.files["cls"].strip(), []).append((place, sample.key))
    if not places:
        raise UserError(f"no sample of {options.split} in {options.source} has a cls")
    taken = {
        key
        for members in places.values()
        for _, key in sorted(members)[: max(1, round(options.share * len(members)))]
    }
    classes = inherited_facts(options.source).get("classes", [])
    names = {str(number): name for number, name in enumerate(classes)}
    refuse_other_data(options.out, inherited_facts(options.source).get("source"))
    with ShardWriter(options.out, options.split) as writer:
        chosen = (sample for sample in read_samples(shards, Outcome()) if sample.key in taken)
        for sample in with_progress(chosen, len(taken), f"writing {options.split}"):
            writer.write(sample.key, sample.files)
            number = sample.files["cls"].strip().decode(errors="replace")
            outcome.wrote(options.split, label=names.get(number, number))
    facts = {**inherited_facts(options.source), "share": options.share, "seed": options.seed}
    write_dataset_card(options.out, outcome, **facts)
    outcome.print(options.out)


if __name__ == "__main__":
    run_script(main)
