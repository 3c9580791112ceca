"""Write an index beside every shard, so that training begins at once, and resumes anywhere.

    mmvit index data/emoji
    mmvit index "data/photos/train-{000000..000099}.tar"
    mmvit index s3://bucket/photos --out photos-index

The last reads shards that lie elsewhere, and writes what to copy beside them.

An index is a small file, SHARD.index, that says where in the shard each sample lies. mmvit shards, encode,
subset and prepare write it with the shard; this command is for shards from elsewhere. An index that fits its
shard stays, so after an interruption the same command goes on. A shard without one is indexed whenever a run
first needs it; the result is kept in ~/.cache/mmvit (or $XDG_CACHE_HOME/mmvit), and so is that of remote
shards without --out. Compressed shards (.tar.gz) get none: unpack them.

All counts are in shards.json, in the form of webdataset's wids: with it beside them, training on thousands of
remote shards begins after one request.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.data.workers import default_workers, map_ahead
from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.index import length_of
from mmvit.streams.remote_index import write_any_index
from mmvit.streams.shard_lists import write_list
from mmvit.streams.shards import BadShard, expand_shards


def main(
    shards: Annotated[list[str], Argument(help="folders, globs or tar files")],
    workers: Annotated[
        int | None, Option(min=0, help="processes that read shards (default: one for each core but one)")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="folder for the indexes (default: beside local shards; of others the cache)"),
    ] = None,
) -> None:
    found = list(dict.fromkeys(expand_shards(shards)))
    if packed := [shard for shard in found if shard.suffix != ".tar"]:
        raise UserError(
            f"{packed[0]} is compressed, so no sample can be read without all before it: unpack it"
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
    for problem in problems:
        print(f"warning: {problem}")


if __name__ == "__main__":
    run_script(main)
