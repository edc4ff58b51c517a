"""Reading an array of bytes, for Numba kernels: numbers, and codes of a few bits in words."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from matfact.kernels.vectors import _INT32, _data, _shuffled

_CODE_BITS = 4  #: bits between two codes of a word


@intrinsic
def load_bytes(typingctx, values, first, like):  # type: ignore[no-untyped-def]
    """Read a vector of the type of `like` that begins at byte `first` of an array of bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = arguments[2].type
        return builder.load(_bytes(context, builder, values, arguments, kind), align=1)

    return like(values, types.intp, like), generate


@intrinsic
def number(typingctx, values, first, like):  # type: ignore[no-untyped-def]
    """Read a number of the dtype of the array `like` at byte `first` of an array of bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(like.dtype)
        return builder.load(_bytes(context, builder, values, arguments, kind), align=1)

    return like.dtype(values, types.intp, like), generate


@intrinsic
def add_lanes(typingctx, total, tables, first, words, at):  # type: ignore[no-untyped-def]
    """Add to each lane what a word of codes names: a lane of each of as many vectors.

    The vectors are ``tables[first:]``, the words, one for each lane, begin at byte `at`. Compilers
    make one instruction of such a choice where the processor has one.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind, word = arguments[0].type, ir.IntType(total.dtype.bitwidth)
        whole = ir.VectorType(word, kind.count)
        loaded = builder.load(_bytes(context, builder, words, arguments[3:], whole), align=1)
        place = builder.gep(_data(context, builder, tables, arguments[1]), [arguments[2]])
        place = builder.bitcast(place, kind.as_pointer())
        found = []
        for i in range(word.width // _CODE_BITS):
            table = builder.load(builder.gep(place, [ir.Constant(_INT32, i)]), align=4)
            codes = builder.lshr(loaded, ir.Constant(whole, [_CODE_BITS * i] * kind.count))
            codes = builder.and_(codes, ir.Constant(whole, [kind.count - 1] * kind.count))
            chosen = ir.Constant(kind, ir.Undefined)
            for lane in (ir.Constant(_INT32, lane) for lane in range(kind.count)):
                entry = builder.extract_element(table, builder.extract_element(codes, lane))
                chosen = builder.insert_element(chosen, entry, lane)
            found.append(chosen)
        return builder.fadd(arguments[0], _sum(builder, found))

    return total(total, tables, types.intp, words, types.intp), generate


@intrinsic
def add_rows(typingctx, total, tables, first, words, at):  # type: ignore[no-untyped-def]
    """Add the rows that a word of codes names: one of each of as many tables.

    Tables, from ``tables[first]`` on, have as many rows as 64 bytes hold numbers; rows are vectors
    of the type of `total`. The word begins at byte `at`.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind, word, long = arguments[0].type, ir.IntType(total.dtype.bitwidth), ir.IntType(64)
        rows = 512 // word.width
        loaded = builder.load(_bytes(context, builder, words, arguments[3:], word), align=1)
        loaded = loaded if word == long else builder.zext(loaded, long)
        place = builder.gep(_data(context, builder, tables, arguments[1]), [arguments[2]])
        place = builder.bitcast(place, kind.as_pointer())
        found = []
        for i in range(word.width // _CODE_BITS):
            code = builder.lshr(loaded, ir.Constant(long, _CODE_BITS * i))
            code = builder.and_(code, ir.Constant(long, rows - 1))
            table = builder.gep(place, [ir.Constant(long, rows * i)])
            found.append(builder.load(builder.gep(table, [code]), align=4))
        return builder.fadd(arguments[0], _sum(builder, found))

    return total(total, tables, types.intp, words, types.intp), generate


@intrinsic
def bit_signs(typingctx, bit, like):  # type: ignore[no-untyped-def]
    """Return a vector with 1 in the lanes whose number has a bit set, and −1 in the others."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = arguments[1].type
        whole = ir.VectorType(_INT32, kind.count)
        single = builder.insert_element(
            ir.Constant(whole, ir.Undefined),
            builder.trunc(arguments[0], _INT32),
            ir.Constant(_INT32, 0),
        )
        shift = _shuffled(builder, single, [0] * kind.count)
        bits = builder.lshr(ir.Constant(whole, list(range(kind.count))), shift)
        bits = builder.and_(bits, ir.Constant(whole, [1] * kind.count))
        doubled = builder.shl(bits, ir.Constant(whole, [1] * kind.count))
        return builder.sitofp(builder.sub(doubled, ir.Constant(whole, [1] * kind.count)), kind)

    return like(types.intp, like), generate


def _bytes(context: Any, builder: Any, kind: Any, arguments: Any, wanted: Any) -> Any:
    """Return the address of byte ``arguments[1]`` of array ``arguments[0]``, for a type."""
    pointer = builder.gep(_data(context, builder, kind, arguments[0]), [arguments[1]])
    return builder.bitcast(pointer, wanted.as_pointer())


def _sum(builder: Any, vectors: list[Any]) -> Any:
    """Return the sum of vectors, added in pairs: additions need not wait for all before."""
    while len(vectors) > 1:
        vectors = [builder.fadd(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    return vectors[0]
