"""Gathering numbers of an array into a vector.

A chain of scalar loads is faster than the gather instructions of most processors, and faster still
if several unsigned indices are loaded at once. Where gather instructions are fast, they take less
than two thirds of its time. Both load the same numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_name
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from matfact.kernels.vectors import Vector, _data, _inserted

_INT32 = ir.IntType(32)
#: Instructions, by dtype and lanes.
_INSTRUCTIONS = {
    (types.float32, 16): "llvm.x86.avx512.mask.gather.dps.512",
    (types.float64, 8): "llvm.x86.avx512.mask.gather.dpd.512",
}
#: Processors on which they are fast. On older ones with AVX-512, updates against the Downfall
#: attack have made them slow; on those of AMD they always were.
_FAST = ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d")


@intrinsic
def gather(typingctx, array, indices, first, like):  # type: ignore[no-untyped-def]
    """``array[indices[first]], array[indices[first + 1]], …`` as a vector."""
    instruction = _instruction(indices, like)
    generate = _loading(array, indices, like)
    if instruction:
        generate = _gathering(array, indices, instruction)
    return like(array, indices, types.intp, like), generate


def _instruction(indices: Any, like: Vector) -> str | None:
    """Return the instruction to use, None for scalar loads."""
    settings: Any = config
    name, features = settings.CPU_NAME or get_host_cpu_name(), settings.CPU_FEATURES
    features = get_host_cpu_features() if features is None else features
    if name not in _FAST or "+avx512f" not in features.split(","):
        return None
    if like.is_complex or indices.dtype.bitwidth != 16:
        return None
    return _INSTRUCTIONS.get((like.real, like.count))


def _loading(array: Any, indices: Any, like: Vector) -> Any:
    """Return the code of a chain of scalar loads."""
    bits, word = indices.dtype.bitwidth, ir.IntType(64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source = _data(context, builder, array, arguments[0])
        words = builder.gep(_data(context, builder, indices, arguments[1]), [arguments[2]])
        words = builder.bitcast(words, word.as_pointer())
        result = ir.Constant(arguments[3].type, ir.Undefined)
        for lane in range(like.count):
            place, shift = divmod(lane * bits, 64)
            if shift == 0:
                rest = builder.load(builder.gep(words, [ir.Constant(_INT32, place)]), align=2)
            index = builder.and_(rest, ir.Constant(word, (1 << bits) - 1))
            rest = builder.lshr(rest, ir.Constant(word, bits))
            entry = builder.load(builder.gep(source, [index]))
            result = _inserted(builder, result, entry, lane, like)
        return result

    return generate


def _gathering(array: Any, indices: Any, instruction: str) -> Any:
    """Return the code of a gather of a full vector by an instruction of the processor."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = arguments[3].type
        wide, mask = ir.VectorType(_INT32, kind.count), ir.VectorType(ir.IntType(1), kind.count)
        narrow = ir.VectorType(context.get_value_type(indices.dtype), kind.count)
        source = _data(context, builder, array, arguments[0])
        source = builder.bitcast(source, ir.IntType(8).as_pointer())
        places = builder.gep(_data(context, builder, indices, arguments[1]), [arguments[2]])
        places = builder.load(builder.bitcast(places, narrow.as_pointer()), align=2)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [kind, source.type, wide, mask, _INT32]),
            instruction,
        )
        operands = (
            ir.Constant(kind, None), source, builder.zext(places, wide),
            ir.Constant(mask, [1] * kind.count), ir.Constant(_INT32, array.dtype.bitwidth // 8),
        )  # fmt: skip
        return builder.call(function, operands)

    return generate
