"""Learn a text tokenizer (byte-level BPE, lower case, NFKC) from captions in shards or in a text file.

    mmvit tokenizer text "data/emoji/train-*.tar" tokenizers/emoji-text
    mmvit tokenizer text captions.txt my-text --vocab-size 4096

The first takes 4 s on two cores. It reads all languages in `json` and the `txt` of shards, or every line of a
text file, writes OUT/tokenizer.json, and prints how many tokens captions take in each language.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.captions import PAD, TextTokenizer, read_captions, read_text
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.shards import BadSample, BadShard, expand_shards, read_shard

NUM_BYTES = 256


def main(
    source: Annotated[str, Argument(help="shards (a pattern or folder), or a text file, a caption per line")],
    out: Annotated[Path, Argument(help="folder to write tokenizer.json to")],
    vocab_size: Annotated[int, Option(help=f"tokens, including {PAD} and {NUM_BYTES} bytes")] = 4096,
) -> None:
    if vocab_size <= NUM_BYTES + 1:
        raise UserError(
            f"--vocab-size: expected more than {NUM_BYTES + 1}, the number of {PAD} and the bytes, "
            f"got {vocab_size}"
        )
    captions = collect_captions(source)
    print(f"learning {vocab_size:,} tokens from {sum(map(len, captions.values())):,} captions", flush=True)
    tokenizer = learn([caption for group in captions.values() for caption in group], vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    print_lengths(tokenizer, captions)
    print(f"{tokenizer.vocab_size:,} tokens in {out / 'tokenizer.json'}")


def collect_captions(source: str) -> dict[str, list[str]]:
    """Captions by language; those whose language is unknown under "txt"."""
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
    shards = expand_shards(pattern)
    for shard in with_progress(shards, len(shards), "reading shards"):
        try:
            for sample in read_shard(shard, only=("json", "txt")):
                try:
                    by_language = read_captions(sample) if "json" in sample.files else {}
                    for language, caption in by_language.items():
                        captions[language].append(caption)
                    if "txt" in sample.files and not by_language:
                        captions["txt"].append(read_text(sample, "txt"))
                except BadSample as error:
                    print(f"skipped {sample.key} in {shard}: {error}")
        except BadShard as error:
            print(f"skipped the rest of a shard: {error}")
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
    # A space before every word, even the first: a word then has the same tokens everywhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(captions, trainer)
    return TextTokenizer(tokenizer)


def print_lengths(tokenizer: TextTokenizer, captions: dict[str, list[str]]) -> None:
    table = Table(title="tokens per caption", title_justify="left")
    for column in ("language", "captions", "mean", "99%", "longest"):
        table.add_column(column, justify="left" if column == "language" else "right")
    spoken = [(language, caption) for language, group in captions.items() for caption in group]
    counts = defaultdict(list)
    for language, caption in with_progress(spoken, len(spoken), "counting tokens"):
        counts[language].append(len(tokenizer.tokenize(caption)))
    for language, lengths in counts.items():
        table.add_row(
            language,
            f"{len(lengths):,}",
            f"{np.mean(lengths):.1f}",
            f"{np.percentile(lengths, 99):.0f}",
            f"{max(lengths)}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
