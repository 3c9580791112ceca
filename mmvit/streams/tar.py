"""The files in a tar that is not trusted and may be damaged, read once from front to back.

Python's tarfile takes what it can get: at a damaged header, or at the end mark of the first of two archives
in one file, it stops as if nothing came after; it believes any size, and any chain of headers. Here whatever
is not read is told, and all sizes are bounded (POSIX.1-2017, pax, "ustar Interchange Format").
"""

import io
import os
import re
from collections.abc import Collection, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
RECORD = 20 * BLOCK  # an archive's length is a multiple of this
MOST_BYTES = 2**28  # of a file
MOST_NAME = 4096  # characters of a path
MOST_HEADER = 2**20  # of an extended header, which holds a name
CHUNK = 2**20

FILES, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, FOLDER = b"07\0", b"L", b"K", b"x", b"g", b"5"
OTHERS = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "sparse",
}
WITHOUT_DATA = b"12346"
NO_TAR = "not a tar file"


class File(NamedTuple):
    """A file in a tar, from the `start` of its headers to the `end` of its last block; its bytes, None if it
    was not wanted, begin at `offset`."""

    name: str
    start: int
    offset: int
    end: int
    data: bytes | None


class Problem(NamedTuple):
    """What was not read: the file `name`, or if that is None a part in which any files may have been."""

    name: str | None
    text: str


class BadTar(Exception):
    """The archive cannot be read any further."""


class Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def read_files(
    stream: BinaryIO, wanted: Collection[str] | None = None, part_at: int | None = None
) -> Iterator[File | Problem]:
    """Yields files and problems in the order in which they lie in a tar.

    After a damaged part, reading goes on at the next header. The end mark of an archive that another one
    follows, as in `cat a.tar b.tar`, is passed over.

    Args:
        wanted: endings of names, such as ".png"; None reads all files.
        part_at: the stream is the part of an archive that begins at this byte, and so has no end mark.

    Raises:
        BadTar: if the archive is truncated, or holds no header.
    """
    blocks = Blocks(stream, part_at or 0)
    endings = None if wanted is None else tuple(wanted)
    zeros = begin = 0  # blocks of zeros just before; where the headers of the next file begin
    extended = Extended()
    while block := blocks.next():
        start = blocks.place - BLOCK
        if not any(block):
            zeros += 1
            continue
        header = parse(block)
        if header is None:
            if not blocks.find_header():
                if part_at is None and start == zeros * BLOCK:  # nothing but zeros before
                    raise no_tar(block)
                raise BadTar(f"no tar header from byte {start:,} to byte {blocks.place:,}")
            start -= zeros * BLOCK
            yield Problem(None, f"{blocks.place - start:,} damaged bytes from byte {start:,} on")
            zeros, extended = 0, Extended()
            continue
        if zeros == 1 or (zeros and start % RECORD):
            yield Problem(None, f"{zeros * BLOCK:,} zeros before byte {start:,}")
        zeros = 0
        begin = start if extended == Extended() else begin
        if header.kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            if header.size > MOST_HEADER:
                raise BadTar(f"an extended header of {header.size:,} bytes at byte {start:,}")
            data = blocks.read(header.size, "an extended header")
            extended = extended.and_from(header.kind, data)
            continue
        name = (extended.name or header.name).decode("utf-8", "backslashreplace")
        name = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], name)  # for terminals
        size = header.size if extended.size is None else extended.size
        fault, extended = extended.fault, Extended()
        if header.kind == FOLDER:
            continue
        if len(name) > MOST_NAME:
            name, fault = f"{name[:80]}...", f"has a name of {len(name):,} characters"
        if size > MOST_BYTES:
            fault = f"has {size:,} bytes, more than {MOST_BYTES:,}"
        if header.kind not in FILES:
            fault = f"is {OTHERS.get(header.kind, 'a file of an unknown kind')}"
        if fault:
            yield Problem(name, f"{name} {fault}")
            blocks.skip(0 if header.kind in WITHOUT_DATA else size, name)
        else:
            offset, data = blocks.place, None
            if endings is None or name.lower().endswith(endings):
                data = blocks.read(size, name)
            else:
                blocks.skip(size, name)
            yield File(name, begin, offset, blocks.place, data)
    if not zeros and part_at is None:
        raise BadTar("the archive has no end mark")


class Extended(NamedTuple):
    """What extended headers say of the file that follows; `fault` is why it cannot be read."""

    name: bytes = b""
    size: int | None = None
    fault: str = ""

    def and_from(self, kind: bytes, data: bytes) -> "Extended":
        if kind == LONG_NAME:
            return self._replace(name=data.split(b"\0")[0])
        if kind != PAX:
            return self
        found = dict(pax_records(data))
        size, fault = self.size, self.fault
        if (digits := found.get(b"size")) is not None:
            if re.fullmatch(rb"\d{1,18}", digits):
                size = int(digits)
            else:
                fault = "has a size that is no number, or far too large"
        if any(key.startswith(b"GNU.sparse.") for key in found):
            fault = "is sparse"
        return Extended(found.get(b"path", self.name), size, fault)


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """`21 path=a/long/name\\n` and the like; stops at a record that is no such line."""
    place = 0
    while found := re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, place):
        end = place + int(found[1])
        if end <= found.end() or data[end - 1 : end] != b"\n":
            return
        yield found[2], data[found.end() : end - 1]
        place = end


def parse(block: bytes) -> Header | None:
    """The header in a block of 512 bytes; None unless its checksum is right."""
    checksum = number(block[148:156])
    if checksum is None or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    size = number(block[124:136])
    if size is None:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return Header(name, size, block[156:157])


def number(field: bytes) -> int | None:
    """An octal number, or GNU's binary one for sizes of 8 GiB and more; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None  # int takes -5, 0o5 and 1_0


def no_tar(block: bytes) -> BadTar:
    return BadTar(f"{NO_TAR}: it begins with {repr(block[:16])[1:]}")


class Blocks:
    """A stream in blocks of 512 bytes; `place` is the byte of the archive that it has come to."""

    def __init__(self, stream: BinaryIO, place: int = 0):
        self.stream, self.place = stream, place
        self.again = b""  # a block to return once more
        # only of a file that lies on a disk: elsewhere, to seek is to read
        self.length = os.fstat(stream.fileno()).st_size if isinstance(stream, io.BufferedReader) else None

    def next(self) -> bytes:
        """The next block, b"" at the end."""
        block, self.again = self.again or self.stream.read(BLOCK), b""
        self.place += len(block)
        if 0 < len(block) < BLOCK:
            if self.place == len(block) and b"\0" not in block:  # which all headers have
                raise no_tar(block)
            raise BadTar(f"the archive ends within a block, after {self.place:,} bytes")
        return block

    def find_header(self) -> bool:
        """Passes over blocks up to the next header, which `next` then returns; False if there is none."""
        while block := self.stream.read(BLOCK):
            self.place += len(block)
            if len(block) == BLOCK and block[257:262] == b"ustar" and parse(block) is not None:
                self.again, self.place = block, self.place - BLOCK
                return True
        return False

    def read(self, size: int, what: str) -> bytes:
        """The next `size` bytes, and past the block that they end in."""
        padded = -(-size // BLOCK) * BLOCK
        data = self.stream.read(padded)
        self.place += len(data)
        if len(data) < padded:
            raise cut_short(what, len(data), size)
        return data[:size]

    def skip(self, size: int, what: str) -> None:
        padded = left = -(-size // BLOCK) * BLOCK
        if self.length is not None and self.place + left <= self.length:
            self.stream.seek(left, os.SEEK_CUR)
            self.place += left
            return
        while left:
            passed = len(self.stream.read(min(left, CHUNK)))
            self.place += passed
            left -= passed
            if not passed:
                raise cut_short(what, padded - left, size)


def cut_short(what: str, length: int, size: int) -> BadTar:
    if length < size:
        return BadTar(f"{what} ends after {length:,} of {size:,} bytes")
    return BadTar(f"the archive ends within the last block of {what}")
