"""Damage to the bytes and contents of valid files."""

from __future__ import annotations

import copy
import enum
import hashlib
import io
import json
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Special(enum.Enum):
    """Special files in place of regular ones."""

    FIFO = "a pipe without a writer"
    ZERO = "an endless device"
    NULL = "an empty device"
    FOLDER = "a folder"
    LOOP = "a link to itself"
    SPARSE = "a sparse file of three gigabytes"


Files = dict[str, bytes | Special]  #: by name; single-file readers get one

HOSTILE: list[Any] = [
    0, 1, -1, 2, 7, 255, 2**16, 2**24, 2**31 - 1, 2**32, 2**53, 2**61 + 1, 2**62, 2**63, 2**64,
    0.0, -0.5, 1e308, float("nan"), True, False, None, "", "x", "\0", "../x", "/dev/zero",
    "a" * 999, [], [0], [[]], [1, 2, 3], [2**40, 2**40], {}, {"a": {}}, "F16", "BF16", "F64", "I8",
    "X", "dense", "bitmask", "csr", "gaps", "kronecker", "blocks", "selection",
    "sign", {"bits": 2, "group_size": None, "unit": 0, "dtype": "F32", "shape": [2, 3]},
]  # fmt: skip


def flipped(rng: random.Random, content: bytes) -> bytes:
    """Return `content` with a few bytes changed, cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            number = rng.choice((0, 1, 2**15, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            data[at : at + 8] = struct.pack("<Q", number)
        else:
            data[at : at + length] = rng.choice((b"\0", b"\xff", b"9", b"[", b"{", b'"')) * length
    return bytes(data)


def changed(rng: random.Random, content: Any) -> Any:
    """Return JSON `content` with a few values replaced, removed, repeated or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return copy.deepcopy(rng.choice(HOSTILE))
        inside, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside[key], int):
            inside[key] += rng.choice((-1, 1, 8, -8, 2**32, 2**63))
        elif kind == 2 and isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[key]))
        elif kind == 3:
            other, place = rng.choice(places)
            inside[key] = copy.deepcopy(other[place])
        elif kind == 4 and isinstance(inside, dict):
            inside[str(rng.choice(HOSTILE))[:99]] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(rng.choice(HOSTILE))
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Damage the bytes, the header, or the description of factors within the header."""
    kind = rng.randrange(4)
    if kind == 0:
        return flipped(rng, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if kind == 3 and (names := [name for name in header if name.endswith("coded")]):
        return _recoded(rng, header, data, rng.choice(names))
    inner = header.get("__metadata__", {}).get("matfact")
    if kind == 1 and inner:
        header["__metadata__"]["matfact"] = json.dumps(changed(rng, json.loads(inner)))
    else:
        header = changed(rng, header)
    if rng.random() < 0.2:
        data = flipped(rng, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _recoded(rng: random.Random, header: dict[str, Any], data: bytes, name: str) -> bytes:
    """Damage what a code stands for, or make a bomb of it, and code it again."""
    begin, end = header[name]["data_offsets"]
    plain = zlib.decompress(data[begin:end], wbits=-15)
    plain = flipped(rng, plain) if rng.random() < 0.9 else plain[:1] * (1 << rng.randint(8, 24))
    strategy = rng.choice((zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY))
    coder = zlib.compressobj(wbits=-15, strategy=strategy)
    coded = coder.compress(plain) + coder.flush()
    more = len(coded) - (end - begin)
    for entry in header.values():
        if entry.get("data_offsets", [0])[0] >= end:
            entry["data_offsets"] = [offset + more for offset in entry["data_offsets"]]
    header[name] |= {"shape": [len(coded)], "data_offsets": [begin, begin + len(coded)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[:begin] + coded + data[end:]


def damaged_zip(rng: random.Random, content: bytes) -> bytes:
    """Damage the archive, or one of its members with the checksum corrected."""
    if rng.random() < 0.4:
        return flipped(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if rng.random() < 0.02:  # a decompression bomb of several harmless members
        method = zipfile.ZIP_DEFLATED
        members |= {f"more{i}.npy": _compressible(rng) for i in range(rng.randint(4, 8))}
    else:
        victim = rng.choice(list(members))
        members[victim] = flipped(rng, members[victim])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _compressible(rng: random.Random) -> bytes:
    """Return a valid array, of 5 MiB, that compresses from tens to hundreds of times."""
    row = rng.randbytes(rng.choice((64, 1 << 10, 1 << 12))).ljust(1 << 18, b"\0")
    out = io.BytesIO()
    np.save(out, np.frombuffer(row * 20, np.uint8).view(np.float32).reshape(1024, -1))
    return out.getvalue()


def one(damage: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, Files], Files]:
    """Return a function that damages the only file."""

    def damaged(rng: random.Random, files: Files) -> Files:
        return {name: damage(rng, content) for name, content in files.items()}

    return damaged


def damaged_checkpoint(rng: random.Random, files: Files) -> Files:
    """Damage any file, usually with corrected checksums, to reach more code."""
    files = dict(files)
    victim = rng.choice(list(files))
    if rng.random() < 0.2:
        return files | {victim: flipped(rng, files[victim])}
    manifest = json.loads(files["manifest.json"])
    if victim == "manifest.json":
        manifest = changed(rng, manifest)
    else:
        files[victim] = damaged_safetensors(rng, files[victim])
        for shard in manifest["shards"]:
            shard["nbytes"] = len(files[shard["file"]])
            shard["sha256"] = hashlib.sha256(files[shard["file"]]).hexdigest()
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
    body, head = json.dumps(manifest).encode()[1:], b'{"sha256":"'
    digest = hashlib.sha256(head + b"0" * 64 + b'",' + body).hexdigest().encode()
    return files | {"manifest.json": head + digest + b'",' + body}


def damaged_record(rng: random.Random, files: Files) -> Files:
    """Damage the journal, or one of its lines with the checksum corrected."""
    lines = files["out/journal.log"].split(b"\n")
    if rng.random() < 0.3:
        return files | {"out/journal.log": flipped(rng, files["out/journal.log"])}
    at = rng.randrange(len(lines) - 1)
    text = json.dumps(changed(rng, json.loads(lines[at].partition(b" ")[2]))).encode()
    lines[at] = hashlib.sha256(text).hexdigest().encode() + b" " + text
    return files | {"out/journal.log": b"\n".join(lines)}


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """Damage the bytes or the contents."""
    if rng.random() < 0.3:
        return flipped(rng, content)
    return json.dumps(changed(rng, json.loads(content))).encode()


def damaged_index(rng: random.Random, files: Files) -> Files:
    """Damage the index of several files."""
    name = "model.safetensors.index.json"
    return files | {name: damaged_json(rng, files[name])}


def damaged_masks(rng: random.Random, files: Files) -> Files:
    """Damage weights stored with bitmasks: configuration, file, or the bytes of one part."""
    if rng.random() < 0.2:
        return files | {"config.json": damaged_json(rng, files["config.json"])}
    name = "model.safetensors"
    if rng.random() < 0.4:
        return files | {name: damaged_safetensors(rng, files[name])}
    content = bytearray(files[name])
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    part = rng.choice([n for n in header if n.endswith((".shape", ".bitmask", ".row_offsets"))])
    begin, end = (start + offset for offset in header[part]["data_offsets"])
    content[begin:end] = flipped(rng, content[begin:end]).ljust(end - begin, b"\0")[: end - begin]
    return files | {name: bytes(content)}


def damaged_gguf(rng: random.Random, content: bytes) -> bytes:
    """Damage the bytes, mostly those of the header."""
    end = len(content) // (1 if rng.random() < 0.3 else 3)
    if rng.random() < 0.3:
        return flipped(rng, content[:end]) + content[end:]
    data = bytearray(content)
    at = rng.randrange(end)  # keeps all lengths
    data[at] = rng.choice((0, 1, 255, data[at] ^ 1 << rng.randrange(8)))
    return bytes(data)


def damaged_arguments(rng: random.Random, files: Files) -> Files:
    """Return arguments of a command, some of them nonsensical."""
    arguments = json.loads(files["arguments"])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(1, len(arguments))
        if arguments[at - 1] == "--jobs":
            continue  # would start unlimited processes
        text = rng.choice((str(rng.choice(HOSTILE)), arguments[at][::-1], "-" + arguments[at], ","))
        arguments[at] = text.replace("\0", "\x01")
    return files | {"arguments": json.dumps(arguments).encode()}


def or_special(
    damage: Callable[[random.Random, Files], Files],
) -> Callable[[random.Random, Files], Files]:
    """Return a function that sometimes replaces a file by a special one."""

    def damaged(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.97:
            return damage(rng, files)
        victim = rng.choice([name for name in files if name != "arguments"])
        return files | {victim: rng.choice(list(Special))}

    return damaged


def put(path: Path, content: bytes | Special) -> None:
    """Write a file, or create a special one."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is Special.FIFO:
        os.mkfifo(path)
    elif content is Special.FOLDER:
        path.mkdir()
    elif content is Special.SPARSE:
        with path.open("wb") as file:
            file.truncate(3 << 30)
    else:
        targets = {Special.ZERO: "/dev/zero", Special.NULL: "/dev/null", Special.LOOP: path.name}
        path.symlink_to(targets[content])
