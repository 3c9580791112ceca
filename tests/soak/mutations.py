"""Damage and malice for files of every kind: bytes, JSON, PNG, .npy, tar, safetensors and zip archives.

Everything is drawn from a `random.Random`, so that a seed repeats it. What has checksums or lengths gets new
ones half of the time: otherwise nothing behind them would ever be reached.
"""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
VALUES = (
    None, True, False, -1, 0, 1, 3, 2**16, 2**31, 2**40, 2**63, 10**30, 10**400, -(10**30), 0.5, -0.5, 1e-300,
    1e308, float("nan"), float("inf"), "", "x", "0", "-1", "a" * 5000, "half \ud83d", "nul\0", "\x1b[31m",
    "/etc/passwd", "../../x", [],
    [1], [[]], [-1, 2], [2**40, 2**40], ["x"] * 300, {}, {"kind": "x"}, {"": None},
)  # fmt: skip
RAW = (
    b"[" * 100_000,
    b'{"a":' * 30_000,
    b"1" * 5000,
    b'"\\ud800"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"\0" * 600,
    b" " * 70_000,
)

BOMBS = tuple(zlib.compress(bytes(length)) for length in (10, 2**16, 2**22))

Mutation = Callable[[bytes, random.Random], bytes]


def mutate(data: bytes, name: str, rng: random.Random) -> bytes:
    """`data` of the file `name`, damaged one to three times."""
    suffix = name.rpartition(".")[2].lower()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        special = SPECIAL.get(suffix)
        mutation = special if special and rng.random() < 0.6 else mutate_bytes
        data = mutation(data, rng)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, zeros or inserts somewhere."""
    if not data:
        return rng.choice((b"", b"\0", rng.randbytes(20)))
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 512, 4096))
    rest = data[at + length :]
    match rng.randrange(10):
        case 0 | 1 | 2:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 3:
            return data[:at]
        case 4:
            return data[:at] + rest
        case 5:
            return data[:at] + data[at : at + length] * rng.choice((2, 3, 100)) + rest
        case 6:
            return data[:at] + rng.choice((b"\0", b"\xff", b" ")) * length + rest
        case 7:
            number, form = rng.choice(NUMBERS), rng.choice(("<B", "<H", "<I", "<Q", ">H", ">I", ">Q"))
            packed = struct.pack(form, number % 256 ** struct.calcsize(form))
            return data[:at] + packed + data[at + len(packed) :]
        case 8:
            return data[:at] + rng.choice((*RAW, rng.randbytes(length))) + data[at:]
        case _:
            source = rng.randrange(len(data))
            return data[:at] + data[source : source + length] + rest


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Puts another value, key or order somewhere into a JSON document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    return json.dumps(mutate_value(document, rng)).encode("utf-8", "surrogatepass")


def mutate_value(value: Any, rng: random.Random) -> Any:
    places = list(inner_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    container, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[rng.choice(("", "x", "kind", key + "x", key.upper(), "half \ud83d"))] = container.pop(
                key
            )
        case 2:
            other, place = rng.choice(places)
            container[key], other[place] = other[place], container[key]
        case 3 if isinstance(container[key], int | float):
            factor = rng.choice((-1, 0, 0.5, 2, 3, 1000, 10**9, 10**20))
            container[key] = type(container[key])(container[key] * factor) if factor != 0.5 else 0.5
        case 4 if isinstance(container, list):
            container *= rng.choice((0, 2, 50))
        case _:
            container[key] = rng.choice(VALUES)
    return value


def inner_places(value: Any) -> Any:
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from inner_places(inner)


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Damages one line of JSON lines."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    lines[number] = mutate_json(lines[number], rng)
    return b"\n".join(lines)


def mutate_png(data: bytes, rng: random.Random) -> bytes:
    """Changes a chunk, and makes its checksum right again; of pixels, what is compressed."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return mutate_bytes(data, rng)
    number = rng.randrange(len(chunks))
    name, content = chunks[number]
    match rng.randrange(6):
        case 0 if name == b"IDAT":
            try:
                content = zlib.compress(mutate_bytes(zlib.decompress(content), rng))
            except zlib.error:
                content = mutate_bytes(content, rng)
        case 1:
            name = rng.choice(
                (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fdAT", b"IEND")
            )
        case 2:
            bomb = rng.choice(BOMBS)
            chunks.insert(1, (rng.choice((b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"tRNS")), b"a\0\0" + bomb))
            number = 0
            name, content = chunks[0]
        case 3:
            chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
            name, content = chunks[number]
        case _:
            content = mutate_bytes(content, rng)
    chunks[number] = name, content
    return data[:8] + b"".join(
        struct.pack(">I", len(content) % 2**32)
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def mutate_npy(data: bytes, rng: random.Random) -> bytes:
    """Changes the text of the header, which keeps its length or gets another one."""
    shape = rng.choice(
        ("(2, 2)", "(4,)", "()", "(0, 0)", "(-2, -2)", "(2**62, 2)", "(99999999, 99999999)", "(2, 2, 1)")
    )
    kind = rng.choice(
        ("'<u2'", "'>u2'", "'|O'", "'<f4'", "'<u8'", "'|S4'", "[('a', '<u2')]", "'<M8[s]'", "'<c16'", "'V0'")
    )
    order = rng.choice(("False", "True", "1", "None"))
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text = rng.choice(
        (text, text, mutate_bytes(text, rng), b"(" * 5000, text + b" " * rng.choice((1, 70_000)))
    )
    version = rng.choice((1, 1, 1, 2, 3, 255))
    length = struct.pack("<H", len(text) % 2**16) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes((version, rng.choice((0, 0, 1)))) + length + text + data[-8:]


def mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """Changes a field of a header, and makes its checksum right again; or moves, drops and repeats blocks."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    if not headers:
        return mutate_bytes(data, rng)
    number = rng.choice(headers)
    header = bytearray(blocks[number].ljust(512, b"\0"))
    match rng.randrange(9):
        case 0:
            header[156] = rng.choice(b"01234567LKxgSDVM\0\xff")
        case 1:
            size = rng.choice((0, 1, 511, 513, 2**20, 2**33 - 1))
            header[124:136] = rng.choice(
                (b"%011o\0" % size, b"-0000000001\0", b"\x80" + rng.randbytes(11), b"9" * 12)
            )
        case 2:
            names = (
                b"../../evil.png",
                b"/etc/evil.png",
                b"a" * 100,
                b"\xff\xfe.png",
                b"\x1b[31m.png",
                b".png",
                b"",
                b"a/.b/.png",
            )
            header[:100] = rng.choice(names).ljust(100, b"\0")
        case 3:
            record = rng.choice(
                (
                    b"size=99999999999",
                    b"size=-1",
                    b"size=x",
                    b"path=../evil.png",
                    b"GNU.sparse.size=9",
                    b"path=" + b"a" * 9000,
                )
            )
            text = b"%d %s\n" % (len(record) + 4, record)
            extra = bytearray(header)
            extra[156:157] = rng.choice((b"x", b"g", b"L"))
            extra[124:136] = b"%011o\0" % len(text)
            padded = text.ljust(-(-len(text) // 512) * 512, b"\0")
            blocks[number:number] = [sealed(extra), padded] * rng.choice((1, 1, 3, 2000))
            return b"".join(blocks)
        case 4:
            del blocks[number : number + rng.choice((1, 2, 8))]
            return b"".join(blocks)
        case 5:
            blocks[number:number] = [
                rng.choice((bytes(512), rng.randbytes(512), rng.choice(blocks)))
            ] * rng.choice((1, 2, 20))
            return b"".join(blocks)
        case 6:
            blocks[number:] = blocks[rng.choice(headers) :]
            return b"".join(blocks)
        case 7:
            return data + data[: rng.randrange(len(data))]
        case _:
            header[rng.randrange(512)] = rng.randrange(256)
    blocks[number] = sealed(header)
    return b"".join(blocks)


def sealed(header: bytearray) -> bytes:
    """A tar header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the header, and its length with it."""
    (length,) = struct.unpack_from("<Q", data.ljust(8, b"\0"))
    text = mutate_json(data[8 : 8 + length], rng)
    if rng.random() < 0.3:
        kinds = (b'"F64"', b'"I64"', b'"BOOL"', b'"F8_E4M3"', b'"F4"', b'"C64"', b'"U16"', b'"X"', b'"BF16"')
        text = text.replace(b'"F32"', rng.choice(kinds), 1)
    claimed = rng.choice((len(text), len(text), len(text), rng.choice(NUMBERS)))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Changes a member of an .npz or of a file of torch's, or packs all of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename: archive.read(member) for member in archive.infolist()}
    except Exception:
        return mutate_bytes(data, rng)
    if not members:
        return mutate_bytes(data, rng)
    name = rng.choice(list(members))
    packing, out = zipfile.ZIP_STORED, io.BytesIO()
    match rng.randrange(6):
        case 0:
            members.pop(name)
        case 1:
            members[rng.choice(("../../evil", "/evil", "x" * 5000, name + "x"))] = members.pop(name)
        case 2:
            packing = zipfile.ZIP_DEFLATED
        case 3 if name.endswith(".npy"):
            members[name] = mutate_npy(members[name], rng)
        case _:
            members[name] = mutate_bytes(members[name], rng)
    with zipfile.ZipFile(out, "w", packing) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


SPECIAL: dict[str, Mutation] = {
    "json": mutate_json,
    "jsonl": mutate_lines,
    "png": mutate_png,
    "npy": mutate_npy,
    "tar": mutate_tar,
    "safetensors": mutate_safetensors,
    **dict.fromkeys(("npz", "pth", "pt", "pkl", "bin"), mutate_zip),
}
