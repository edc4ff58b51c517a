"""Positions and codes in few bits. What is read is bounded before it is expanded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

#: Gaps looked at together.
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
    return np.frombuffer(content, np.uint8).copy()  # torch may write into it


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
        if not found.size:
            continue
        first_row, last_row = found[0] // columns, found[-1] // columns
        begins = np.arange(first_row, last_row + 1) * columns
        counts = np.diff(np.searchsorted(found, begins), append=found.size)
        indices[done : done + found.size] = found - np.repeat(begins, counts)
        lengths[first_row : last_row + 1] += counts
        done += found.size
    return indices, np.concatenate([[0], np.cumsum(lengths)])


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (uint8) of `bits` bits each, one after the other, highest bit first."""
    eights = np.zeros((-(-codes.size // 8), 8), np.uint16)
    eights.reshape(-1)[: codes.size] = codes
    content = np.zeros((len(eights), bits + 1), np.uint8)
    for number, (byte, shift) in enumerate(_windows(bits)):
        window = eights[:, number] << shift
        content[:, byte] |= (window >> 8).astype(np.uint8)
        content[:, byte + 1] |= (window & 255).astype(np.uint8)
    return content[:, :bits].reshape(-1)[: -(-codes.size * bits // 8)]


def unpacked(content: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the `count` codes that `packed` packed."""
    need(content.dtype == np.uint8, "codes are not bytes")
    need(content.shape == (-(-count * bits // 8),), f"{count} codes have another number of bytes")
    beyond = -count * bits % 8
    need(not (content[-1:] & ((1 << beyond) - 1)).any(), "bits follow the last code")
    bytes_of_eights = np.zeros((-(-count // 8), bits + 1), np.uint16)
    rest = content.size % bits
    whole = content[: content.size - rest].reshape(-1, bits)
    bytes_of_eights[: len(whole), :bits] = whole
    bytes_of_eights[len(whole) :, :rest] = content[content.size - rest :]
    codes = np.empty((len(bytes_of_eights), 8), np.uint8)
    for number, (byte, shift) in enumerate(_windows(bits)):
        window = bytes_of_eights[:, byte] << 8 | bytes_of_eights[:, byte + 1]
        codes[:, number] = window >> shift & (1 << bits) - 1
    return codes.reshape(-1)[:count]


def _windows(bits: int) -> Iterator[tuple[int, int]]:
    """Yield where each of eight codes stands: in which two bytes, and how far from their end."""
    for place in range(0, 8 * bits, bits):
        yield place // 8, 16 - bits - place % 8
