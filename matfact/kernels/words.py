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
def code(typingctx, values, first, place, like):  # type: ignore[no-untyped-def]
    """Return a code of the word at byte `first`, which is as long as a number of `like`.

    A code says which lane of a vector of 64 bytes to take.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word, long = ir.IntType(like.dtype.bitwidth), ir.IntType(64)
        loaded = builder.load(_bytes(context, builder, values, arguments, word), align=1)
        loaded = loaded if word == long else builder.zext(loaded, long)
        shift = builder.mul(arguments[2], ir.Constant(long, _CODE_BITS))
        mask = ir.Constant(long, 512 // like.dtype.bitwidth - 1)
        return builder.and_(builder.lshr(loaded, shift), mask)

    return types.int64(values, types.intp, types.intp, like), generate


@intrinsic
def looked_up(typingctx, table, values, first, place):  # type: ignore[no-untyped-def]
    """Return the lanes of `table` that the codes of as many words name, from byte `first` on.

    Compilers make one instruction of it where the processor has one.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lanes, word = table.count, ir.IntType(table.dtype.bitwidth)
        kind = ir.VectorType(word, lanes)
        words = builder.load(_bytes(context, builder, values, arguments[1:], kind), align=1)
        shift = builder.mul(arguments[3], ir.Constant(ir.IntType(64), _CODE_BITS))
        shift = shift if word.width == 64 else builder.trunc(shift, word)
        single = builder.insert_element(
            ir.Constant(kind, ir.Undefined), shift, ir.Constant(_INT32, 0)
        )
        words = builder.lshr(words, _shuffled(builder, single, [0] * lanes))
        words = builder.and_(words, ir.Constant(kind, [lanes - 1] * lanes))
        result = ir.Constant(arguments[0].type, ir.Undefined)
        for lane in (ir.Constant(_INT32, i) for i in range(lanes)):
            entry = builder.extract_element(arguments[0], builder.extract_element(words, lane))
            result = builder.insert_element(result, entry, lane)
        return result

    return table(table, values, types.intp, types.intp), generate


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
