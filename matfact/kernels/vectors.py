"""SIMD vectors in registers, for Numba kernels.

LLVM does not reliably keep an array of accumulators in registers. Here a vector of a fixed number
of bytes is a Numba type, so that ``total = fma(scalar, load(…), total)`` in a loop compiles to one
broadcast, one load and one fused multiply-add where the processor has them, and is correct
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_INT32 = ir.IntType(32)
#: Stand-ins for dtypes that Numba lacks: the bits of float16 and of bfloat16.
_FLOAT16, _BFLOAT16 = types.uint16, types.int16


class Vector(types.Type):
    """`count` numbers of `dtype` in registers; complex numbers take two lanes."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Vector({dtype}, {count})")

    @property
    def is_complex(self) -> bool:
        """Whether a number takes two lanes."""
        return isinstance(self.dtype, types.Complex)

    @property
    def real(self) -> Any:
        """Dtype of a lane."""
        return self.dtype.underlying_float if self.is_complex else self.dtype


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.real).get_value_type()
        lanes = vector.count * (1 + vector.is_complex)
        super().__init__(manager, vector, ir.VectorType(element, lanes))


@intrinsic(prefer_literal=True)
def zeros(typingctx, array, nbytes):  # type: ignore[no-untyped-def]
    """Return the zero vector with the dtype of `array` and a constant number of bytes.

    It sets the vector width of the functions below and of the kernels it is passed to.
    """
    vector = Vector(array.dtype, nbytes.literal_value * 8 // array.dtype.bitwidth)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return ir.Constant(context.get_value_type(vector), None)

    return vector(array, nbytes), generate


@intrinsic
def width(typingctx, vector):  # type: ignore[no-untyped-def]
    """Return the number of lanes of `vector`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, vector.count)

    return types.intp(vector), generate


@intrinsic
def load(typingctx, array, row, like):  # type: ignore[no-untyped-def]
    """Read the `row`-th vector of a flat `array` of vectors with the type of `like`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _place(context, builder, signature, arguments, like)
        return builder.load(pointer, align=_alignment(array.dtype))

    return like(array, types.intp, like), generate


@intrinsic
def scatter(typingctx, array, indices, first, vector):  # type: ignore[no-untyped-def]
    """Write the lanes of `vector` to ``array[indices[first]], array[indices[first + 1]], …``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = _data(context, builder, array, arguments[0])
        positions = builder.gep(_data(context, builder, indices, arguments[1]), [arguments[2]])
        for lane in range(vector.count):
            index = builder.load(builder.gep(positions, [ir.Constant(_INT32, lane)]))
            if indices.dtype.bitwidth < 64:
                index = builder.zext(index, ir.IntType(64))
            entry = _extracted(context, builder, arguments[3], lane, vector)
            builder.store(entry, builder.gep(target, [index]))
        return context.get_dummy_value()

    return types.none(array, indices, types.intp, vector), generate


@intrinsic
def store(typingctx, array, row, vector):  # type: ignore[no-untyped-def]
    """Write `vector` as the `row`-th of a flat `array` of such vectors."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _place(context, builder, signature, arguments, vector)
        builder.store(arguments[2], pointer, align=_alignment(array.dtype))
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def store_values(typingctx, array, first, vector):  # type: ignore[no-untyped-def]
    """Write `vector` to ``array[first:]``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.gep(_data(context, builder, array, arguments[0]), [arguments[1]])
        pointer = builder.bitcast(pointer, arguments[2].type.as_pointer())
        builder.store(arguments[2], pointer, align=_alignment(array.dtype))
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def load_values(typingctx, values, first, like):  # type: ignore[no-untyped-def]
    """``values[first:]`` as a vector of the type of `like`, computed in its dtype."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.gep(_data(context, builder, values, arguments[0]), [arguments[1]])
        kind = arguments[2].type
        raw = kind if like.is_complex else ir.VectorType(pointer.type.pointee, like.count)
        pointer = builder.bitcast(pointer, raw.as_pointer())
        loaded = builder.load(pointer, align=_alignment(values.dtype))
        return _widened(builder, values.dtype, loaded, kind)

    return like(values, types.intp, like), generate


@intrinsic
def prefetch(typingctx, array, position):  # type: ignore[no-untyped-def]
    """Prefetch ``array[position]``, which need not exist."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.gep(_data(context, builder, array, arguments[0]), [arguments[1]])
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *[_INT32] * 3])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [pointer, *(ir.Constant(_INT32, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


@intrinsic
def value(typingctx, values, position, like):  # type: ignore[no-untyped-def]
    """``values[position]``, computed in the dtype of the array `like`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.gep(_data(context, builder, values, arguments[0]), [arguments[1]])
        loaded = builder.load(pointer)
        return _widened(builder, values.dtype, loaded, context.get_value_type(like.dtype))

    return like.dtype(values, types.intp, like), generate


@intrinsic
def position(typingctx, indices, place):  # type: ignore[no-untyped-def]
    """``indices[place]`` for unsigned indices, without wraparound."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.gep(_data(context, builder, indices, arguments[0]), [arguments[1]])
        return builder.zext(builder.load(pointer), ir.IntType(64))

    return types.int64(indices, types.intp), generate


@intrinsic
def spread(typingctx, scalar, like):  # type: ignore[no-untyped-def]
    """Return a vector with the type of `like` and `scalar` in every lane."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        undefined = ir.Constant(arguments[1].type, ir.Undefined)
        single = _inserted(builder, undefined, arguments[0], 0, like)
        lanes = arguments[1].type.count
        return _shuffled(builder, single, [i * like.is_complex % 2 for i in range(lanes)])

    return like(scalar, like), generate


@intrinsic
def fma(typingctx, left, right, total):  # type: ignore[no-untyped-def]
    """``left · right + total`` of vectors, rounded once if the processor supports it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        factor, other, result = arguments
        if not total.is_complex:
            return _multiplied(builder, factor, other, result)
        places = range(factor.type.count)
        signs = ir.Constant(factor.type, [-1.0, 1.0] * total.count)
        real, imaginary = (
            _shuffled(builder, factor, [i // 2 * 2 + part for i in places]) for part in (0, 1)
        )
        result = _multiplied(builder, real, other, result)
        turned = _shuffled(builder, other, [i ^ 1 for i in places])
        return _multiplied(builder, builder.fmul(imaginary, signs), turned, result)

    return total(left, right, total), generate


@intrinsic
def add(typingctx, left, right):  # type: ignore[no-untyped-def]
    """Return the sum of two vectors."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fadd(*arguments)

    return left(left, right), generate


@intrinsic
def subtract(typingctx, left, right):  # type: ignore[no-untyped-def]
    """Return the difference of two vectors."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fsub(*arguments)

    return left(left, right), generate


@intrinsic
def first_lanes(typingctx, count, left, right):  # type: ignore[no-untyped-def]
    """Return the first `count` lanes of `left`, and the others of `right`, of real numbers."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lanes = ir.VectorType(_INT32, left.count)
        number = builder.trunc(arguments[0], _INT32)
        limit = builder.insert_element(
            ir.Constant(lanes, ir.Undefined), number, ir.Constant(_INT32, 0)
        )
        limit = _shuffled(builder, limit, [0] * left.count)
        is_first = builder.icmp_signed("<", ir.Constant(lanes, [*range(left.count)]), limit)
        return builder.select(is_first, arguments[1], arguments[2])

    return left(types.int64, left, right), generate


@intrinsic
def multiply(typingctx, left, right):  # type: ignore[no-untyped-def]
    """Return the product of two vectors of real numbers, lane by lane."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fmul(*arguments)

    return left(left, right), generate


@intrinsic
def total(typingctx, vector):  # type: ignore[no-untyped-def]
    """Return the sum of the lanes of `vector`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        scalar, parts = context.get_value_type(vector.real), 1 + vector.is_complex
        lanes = ir.VectorType(scalar, vector.count)
        kind = ir.FunctionType(scalar, [scalar, lanes])
        name = f"llvm.vector.reduce.fadd.v{vector.count}f{vector.real.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        zero = ir.Constant(scalar, 0.0)
        sums = [
            builder.call(
                function,
                [zero, _shuffled(builder, arguments[0], range(part, lanes.count * parts, parts))],
                fastmath=("reassoc",),
            )
            for part in range(parts)
        ]
        return _number(context, builder, sums, vector)

    return vector.dtype(vector), generate


def _alignment(dtype: Any) -> int:
    return (dtype.bitwidth // 2 if isinstance(dtype, types.Complex) else dtype.bitwidth) // 8


def _multiplied(builder: Any, left: Any, right: Any, total: Any) -> Any:
    product = builder.fmul(left, right, flags=("contract",))
    return builder.fadd(product, total, flags=("contract",))


def _shuffled(builder: Any, vector: Any, lanes: Iterable[int]) -> Any:
    places = list(lanes)
    order = ir.Constant(ir.VectorType(_INT32, len(places)), places)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _inserted(builder: Any, vector: Any, entry: Any, place: int, kind: Vector) -> Any:
    """Return a vector with a number inserted at a position."""
    parts = [builder.extract_value(entry, i) for i in (0, 1)] if kind.is_complex else [entry]
    for i, part in enumerate(parts):
        vector = builder.insert_element(vector, part, ir.Constant(_INT32, place * len(parts) + i))
    return vector


def _extracted(context: Any, builder: Any, vector: Any, place: int, kind: Vector) -> Any:
    """Return the number at a position of a vector."""
    lanes = [2 * place, 2 * place + 1] if kind.is_complex else [place]
    parts = [builder.extract_element(vector, ir.Constant(_INT32, lane)) for lane in lanes]
    return _number(context, builder, parts, kind)


def _number(context: Any, builder: Any, parts: list[Any], kind: Vector) -> Any:
    """Return a number of the dtype of a vector from its one or two parts."""
    if not kind.is_complex:
        return parts[0]
    number = ir.Constant(context.get_value_type(kind.dtype), ir.Undefined)
    for i, part in enumerate(parts):
        number = builder.insert_value(number, part, i)
    return number


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _place(context: Any, builder: Any, signature: Any, arguments: Any, vector: Vector) -> Any:
    """Return the address of vector ``arguments[1]`` in array ``arguments[0]``."""
    data = _data(context, builder, signature.args[0], arguments[0])
    count = ir.Constant(arguments[1].type, vector.count)
    pointer = builder.gep(data, [builder.mul(arguments[1], count)])
    return builder.bitcast(pointer, context.get_value_type(vector).as_pointer())


def _widened(builder: Any, dtype: Any, loaded: Any, target: Any) -> Any:
    """Convert a loaded value of `dtype` to the type `target` (vectors or scalars)."""
    if dtype == _FLOAT16:
        return builder.fpext(builder.bitcast(loaded, _shaped(target, ir.HalfType())), target)
    if dtype == _BFLOAT16:  # the upper half of a float32
        wide, single = _shaped(target, _INT32), _shaped(target, ir.FloatType())
        sixteen = [16] * target.count if isinstance(target, ir.VectorType) else 16
        bits = builder.shl(builder.zext(loaded, wide), ir.Constant(wide, sixteen))
        loaded = builder.bitcast(bits, single)
        return loaded if single == target else builder.fpext(loaded, target)
    return builder.sitofp(loaded, target) if dtype == types.int8 else loaded


def _shaped(like: Any, element: Any) -> Any:
    """Return the type `element`, or a vector of it as long as `like`."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element
