"""Index shards, so that training starts quickly and resumes at any sample.

    mmvit index data/emoji
    mmvit index "data/photos/train-{000000..000099}.tar"
    mmvit index s3://bucket/photos --out photos-index

The last command reads remote shards, and writes files to copy beside them.

An index is a small file beside the shard, SHARD.index, with the position of every sample. mmvit shards,
encode, subset and prepare write it with the shard; this command is for shards made in other ways. It skips
shards whose index is current, so you can run it again after an interruption. A run that needs a shard without
an index makes one and keeps it in ~/.cache/mmvit (or $XDG_CACHE_HOME/mmvit); so does this command for remote
shards without --out. Compressed shards (.tar.gz) cannot be indexed: unpack them first.

The command also writes shards.json, the number of samples in each shard, in the format of webdataset's wids:
with this file beside them, training on thousands of remote shards starts after one request.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.index import length_of
from mmvit.streams.remote_index import write_any_index
from mmvit.streams.shard_lists import LIST, write_list
from mmvit.streams.shards import BadShard, expand_shards
from mmvit.streams.workers import default_workers, map_ahead


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
    found = list(dict.fromkeys(expand_shards(shards)))
    if packed := [shard for shard in found if shard.suffix != ".tar"]:
        raise UserError(
            f"{packed[0]} is compressed, so a sample cannot be read without all before it: unpack it"
        )
    workers = min(default_workers() if workers is None else workers, len(found) // 2)
    write = partial(write_any_index, out=out)
    indexed = with_progress(map_ahead(write, found, workers), len(found), "indexing shards")
    samples, problems = 0, []
    counts: dict[Path, dict[str, tuple[int, int]]] = {}  # by the folder of the list, samples and bytes
    for shard, (number, problem) in zip(found, indexed, strict=True):
        samples += number
        if out or isinstance(shard, Path):
            counts.setdefault(out or shard.parent, {})[shard.name] = number, length_of(shard)
        problems += [str(BadShard(shard, problem))] if problem else []
    for folder, listed in counts.items():
        write_list(folder, listed)
    print(f"{samples:,} samples in {len(found):,} shard{'s' * (len(found) != 1)}")
    for folder, listed in counts.items():
        made = "1 index" if len(listed) == 1 else f"{len(listed):,} indexes"
        print(f"{LIST} and {made} are in {folder}")
    for problem in problems:
        print(f"warning: {problem}")


if __name__ == "__main__":
    run_script(main)
