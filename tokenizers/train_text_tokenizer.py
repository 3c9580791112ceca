"""Learns a text tokenizer (byte-level BPE, lower case, NFKC) from captions in shards or in a text file.

    python tokenizers/train_text_tokenizer.py "data/emoji/train-*.tar" tokenizers/emoji-text
    python tokenizers/train_text_tokenizer.py captions.txt my-text --vocab-size 4096

takes 4 s on two cores. Of shards, all languages in `json` and the `txt` are read; of a text file, every line.
Writes OUT/tokenizer.json, and prints how many tokens captions take by language.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmvit.data.captions import PAD, TextTokenizer, read_text
from mmvit.data.shards import BadSample, BadShard, expand_shards, read_shard
from mmvit.errors import UserError, run_script

NUM_BYTES = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", help="shards (pattern or folder), or a text file with a caption in each line"
    )
    parser.add_argument("out", type=Path, help="folder to write tokenizer.json to")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help=f"tokens, with {PAD} and {NUM_BYTES} bytes"
    )
    arguments = parser.parse_args()
    if arguments.vocab_size <= NUM_BYTES + 1:
        raise UserError(
            f"--vocab-size {arguments.vocab_size} leaves no room for merges; {PAD} and the bytes take "
            f"{NUM_BYTES + 1}"
        )

    captions = collect_captions(arguments.source)
    tokenizer = learn([caption for group in captions.values() for caption in group], arguments.vocab_size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments.out / "tokenizer.json")
    print_lengths(tokenizer, captions)
    print(f"{tokenizer.vocab_size:,} tokens in {arguments.out / 'tokenizer.json'}")


def collect_captions(source: str) -> dict[str, list[str]]:
    """Captions by language; those of unknown language under "txt"."""
    if Path(source).is_file() and not source.endswith((".tar", ".tar.gz", ".tgz")):
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start:,}"
            ) from None
        captions = {"txt": [line for line in lines if line.strip()]}
    else:
        captions = captions_in_shards(source)
    if not any(captions.values()):
        raise UserError(
            f"no captions in {source}; samples need a txt, or a json {{'captions': {{language: caption}}}}"
        )
    return captions


def captions_in_shards(pattern: str) -> dict[str, list[str]]:
    captions = defaultdict(list)
    num_bad = 0
    for shard in expand_shards(pattern):
        try:
            for sample in read_shard(shard):
                try:
                    by_language = (
                        json.loads(read_text(sample, "json")).get("captions", {})
                        if "json" in sample.files
                        else {}
                    )
                    for language, caption in by_language.items():
                        captions[language].append(caption)
                    if "txt" in sample.files and not by_language:
                        captions["txt"].append(read_text(sample, "txt"))
                except (BadSample, ValueError, AttributeError) as error:
                    num_bad += 1
                    print(f"skipped {sample.key} in {shard}: {error}")
        except BadShard as error:
            print(f"the rest of a shard is left out: {error}")
    return captions


def learn(captions: list[str], vocab_size: int) -> TextTokenizer:
    """Learns the merges. The same captions give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    # A space in front of every word, the first one too: a word then has the same tokens wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return TextTokenizer(tokenizer)


def print_lengths(tokenizer: TextTokenizer, captions: dict[str, list[str]]) -> None:
    table = Table(title="tokens per caption", title_justify="left")
    for column in ("language", "captions", "mean", "99%", "longest"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for language, group in captions.items():
        lengths = np.array([len(tokenizer.tokenize(caption)) for caption in group])
        table.add_row(
            language,
            f"{len(group):,}",
            f"{lengths.mean():.1f}",
            f"{np.percentile(lengths, 99):.0f}",
            f"{lengths.max()}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
