"""Index shards, so that training starts quickly and resumes at any sample.

    mmvit index data/emoji
    mmvit index "data/photos/train-{000000..000099}.tar"
    mmvit index s3://bucket/photos --out photos-index
    torchrun --nproc_per_node 8 -m mmvit index s3://bucket/photos --out photos-index

The last two read remote shards, and write files to copy beside them. Processes that torchrun starts share out
the shards.

An index is a small file beside the shard, SHARD.index, with the position of every sample. mmvit shards,
encode, subset and prepare write it with the shard; this command is for shards made in other ways. It skips
shards whose index is current, so you can run it again after an interruption. A run that needs a shard without
an index makes one and keeps it in ~/.cache/mmvit (or $XDG_CACHE_HOME/mmvit); so does this command for remote
shards without --out. Compressed shards (.tar.gz) cannot be indexed: unpack them first.

The command also writes shards.json, the number of samples in each shard, in the format of webdataset's wids:
with this file beside them, training on thousands of remote shards starts after one request.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.finished import refuse_lacking
from mmvit.errors import UserError
from mmvit.streams.address import Address
from mmvit.streams.index import beside
from mmvit.streams.remote_index import write_any_index
from mmvit.streams.shard_lists import LIST, write_list
from mmvit.streams.shards import BadShard, expand_shards
from mmvit.streams.workers import default_workers, map_ahead
from mmvit.training.distributed import FOREVER, open_processes


def main(
    shards: Annotated[list[str], Argument(help="folders, globs or tar files")],
    workers: Annotated[
        int | None, Option(min=0, help="processes that read shards (default: one per core, less one)")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="folder for the indexes (default: beside local shards; the cache for remote ones)"),
    ] = None,
) -> None:
    with open_processes("cpu", patience=FOREVER) as processes:
        found = processes.from_main(lambda: find(shards))

        def index_share(own: Sequence[Path | Address]) -> Iterable[tuple[int, int, str]]:
            most = default_workers() if workers is None else workers
            indexed = map_ahead(partial(write_any_index, out=out), own, min(most, len(own) // 2))
            return processes.shown(indexed, len(own), "indexing shards")

        indexed = processes.share_out(found, index_share)
        processes.on_main(lambda: complete(found, indexed, out))


def find(patterns: list[str]) -> list[Path | Address]:
    found = list(dict.fromkeys(expand_shards(patterns)))
    if packed := [shard for shard in found if shard.suffix != ".tar"]:
        raise UserError(
            f"{packed[0]} is compressed, so a sample cannot be read without all before it: unpack it"
        )
    return found


def complete(
    found: Sequence[Path | Address], indexed: Sequence[tuple[int, int, str]], out: Path | None
) -> None:
    """Writes the lists of shards, and prints what all processes have found."""
    counts: dict[Path, dict[str, tuple[int, int]]] = {}  # by the folder of the list, samples and bytes
    for shard, (samples, length, _) in zip(found, indexed, strict=True):
        if out or isinstance(shard, Path):
            counts.setdefault(out or shard.parent, {})[shard.name] = samples, length
    refuse_lacking(beside(folder / name) for folder, listed in counts.items() for name in listed)
    for folder, listed in counts.items():
        write_list(folder, listed)
    samples = sum(samples for samples, _, _ in indexed)
    print(f"{samples:,} samples in {len(found):,} shard{'s' * (len(found) != 1)}")
    for folder, listed in counts.items():
        made = "1 index" if len(listed) == 1 else f"{len(listed):,} indexes"
        print(f"{LIST} and {made} are in {folder}")
    for shard, (_, _, problem) in zip(found, indexed, strict=True):
        if problem:
            print(f"warning: {BadShard(shard, problem)}")


if __name__ == "__main__":
    run_script(main)
