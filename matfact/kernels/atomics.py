"""Atomics, addresses and yielding, for threads that share work in compiled code."""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_ORDER = "seq_cst"


def _system(*names: str) -> str | None:
    """Return the first of the given functions that the C library has."""
    return next((name for name in names if llvmlite.binding.address_of_symbol(name)), None)


_YIELD = _system("sched_yield", "SwitchToThread")


@intrinsic
def fetch_add(typingctx, array, position, increment):  # type: ignore[no-untyped-def]
    """Atomically add to ``array[position]`` and return the old value."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _place(context, builder, array, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], _ORDER)

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def publish(typingctx, array, position, number):  # type: ignore[no-untyped-def]
    """Set ``array[position]`` with release semantics: earlier writes become visible first."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _place(context, builder, array, arguments)
        return builder.atomic_rmw("xchg", pointer, arguments[2], _ORDER)

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def look(typingctx, array, position):  # type: ignore[no-untyped-def]
    """Return ``array[position]`` with acquire semantics."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load_atomic(_place(context, builder, array, arguments), _ORDER, 8)

    return types.int64(array, types.intp), generate


@intrinsic
def give_way(typingctx):  # type: ignore[no-untyped-def]
    """Yield the processor to a waiting thread."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if _YIELD is not None:
            _call(builder, _YIELD)
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def pointer(typingctx, address, like):  # type: ignore[no-untyped-def]
    """Return a pointer to an address, with the dtype of the array `like`."""
    kind = types.CPointer(like.dtype)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), generate


def _place(context, builder, array, arguments):  # type: ignore[no-untyped-def]
    data = context.make_array(array)(context, builder, arguments[0]).data
    return builder.gep(data, [arguments[1]])


def _call(builder, name):  # type: ignore[no-untyped-def]
    kind = ir.FunctionType(ir.IntType(32), [])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
