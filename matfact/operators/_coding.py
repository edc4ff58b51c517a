"""Positions and codes in few bits. What is read is bounded before it is expanded."""

from __future__ import annotations

import zlib

import numpy as np

#: Numbers expanded at a time: a multiple of 8, so that packed ones begin with a byte.
_COUNT = 1 << 16
#: The gap that stands for so many places without a value.
_SKIP = 255


def need(condition: bool, otherwise: str) -> None:
    """Raise ``ValueError`` unless a condition holds."""
    if not condition:
        raise ValueError(otherwise)


def huffman(content: np.ndarray) -> np.ndarray:
    """Return bytes in a Huffman code, as a raw deflate stream without references back."""
    coder = zlib.compressobj(9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(coder.compress(content.data) + coder.flush(), np.uint8)


def expanded(coded: np.ndarray, most: int) -> np.ndarray:
    """Return what a Huffman code stands for, at most `most` bytes.

    Such a code has a bit or more for each byte: what claims to hold more is refused, not expanded.
    """
    need(coded.dtype == np.uint8 and coded.ndim == 1, "a Huffman code is not a vector of bytes")
    most = min(most, 8 * coded.size)
    decoder = zlib.decompressobj(wbits=-15)
    try:
        content = decoder.decompress(coded.data, most + 1)
    except zlib.error as error:
        raise ValueError(f"a Huffman code is damaged: {error}") from None
    need(len(content) <= most, f"a Huffman code stands for more than {most} bytes")
    need(decoder.eof and not decoder.unused_data, "a Huffman code is cut, or bytes follow it")
    return np.frombuffer(content, np.uint8)


def gaps(locations: np.ndarray) -> np.ndarray:
    """Return how many places lie before each of some increasing ones, after the one before.

    They are bytes; 255 stands for as many places without a value, as often as it takes.
    """
    skips, rests = np.divmod(np.diff(locations, prepend=-1) - 1, _SKIP)
    ends = np.cumsum(skips + 1)
    result = np.full(ends[-1] if ends.size else 0, _SKIP, np.uint8)
    result[ends - 1] = rests
    return result


def places(steps: np.ndarray, count: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and row pointers of the `count` places that gaps tell."""
    rows, columns = shape
    need(np.count_nonzero(steps != _SKIP) == count, f"gaps do not tell {count} places")
    need(not count or steps[-1] != _SKIP, "gaps go on after the last place")
    indices = np.empty(count, np.uint16 if columns <= 1 << 16 else np.int32)
    lengths, at, done = np.zeros(rows, np.int64), -1, 0
    for first in range(0, steps.size, _COUNT):
        part = steps[first : first + _COUNT]
        is_place = part != _SKIP
        ends = at + np.cumsum(part + is_place.astype(np.int64))
        at, found = int(ends[-1]), ends[is_place]
        need(at < rows * columns, "gaps lead beyond the matrix")
        row, indices[done : done + found.size] = np.divmod(found, columns)
        if found.size:
            lengths[row[0] : row[-1] + 1] += np.bincount(row - row[0])
        done += found.size
    return indices, np.concatenate([[0], np.cumsum(lengths)])


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (uint8) of `bits` bits each, one after the other, highest bit first."""
    parts = [
        np.packbits(np.unpackbits(codes[first : first + _COUNT, None], axis=1)[:, 8 - bits :])
        for first in range(0, codes.size, _COUNT)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpacked(content: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the `count` codes that :func:`packed` packed."""
    need(content.dtype == np.uint8, "codes are not bytes")
    need(content.shape == (-(-count * bits // 8),), f"{count} codes have another number of bytes")
    beyond = -count * bits % 8
    need(not (content[-1:] & ((1 << beyond) - 1)).any(), "bits follow the last code")
    codes = np.empty(count, np.uint8)
    for first in range(0, count, _COUNT):
        part = codes[first : first + _COUNT]
        each = np.unpackbits(content[first * bits // 8 :], count=part.size * bits)
        part[:] = np.packbits(each.reshape(-1, bits), axis=1)[:, 0] >> (8 - bits)
    return codes
