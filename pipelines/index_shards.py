"""Write an index beside every shard, so that training begins at once, and resumes anywhere.

    mmvit index data/emoji
    mmvit index "data/photos/train-{000000..000099}.tar"

An index is a small file, SHARD.index, that says where in the shard each sample lies. A shard without one is
indexed whenever a run first needs it; the result is kept in ~/.cache/mmvit (or $XDG_CACHE_HOME/mmvit). An
index that no longer fits its shard is not used. Compressed shards (.tar.gz) get none: unpack them.
"""

from typing import Annotated

from typer import Argument

from mmvit.cli import run_script
from mmvit.data.index import beside, save_index, scan
from mmvit.data.shards import BadShard, expand_shards
from mmvit.errors import UserError
from mmvit.progress import with_progress


def main(shards: Annotated[list[str], Argument(help="folders, globs or tar files")]) -> None:
    found = expand_shards(shards)
    if packed := [shard for shard in found if shard.suffix != ".tar"]:
        raise UserError(
            f"{packed[0]} is compressed, so no sample can be read without all before it: unpack it"
        )
    samples, problems = 0, []
    for shard in with_progress(found, len(found), "indexing shards"):
        index = scan(shard)
        try:
            save_index(index, beside(shard))
        except OSError as error:
            raise UserError(f"cannot write beside {shard}: {error.strerror}") from None
        samples += index.samples
        problems += [str(BadShard(shard, index.problem))] if index.problem else []
    print(f"{samples:,} samples in {len(found):,} shard{'s' * (len(found) != 1)}")
    for problem in problems:
        print(f"warning: {problem}")


if __name__ == "__main__":
    run_script(main)
