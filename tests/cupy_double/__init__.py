"""A stand-in for CuPy made from NumPy: what works with it does not rely on the host.

Its arrays have a type of their own. Like those of CuPy they refuse to become NumPy arrays unless
asked by name, and do not mix with them. Only functions that CuPy has exist, with its arguments
(``names.json``). Beyond CuPy it counts: each wait for a number from the device, each array that is
copied from it, and each copied to it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

_COMPAT = array_api_compat.__name__
_NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
#: Functions whose results have a size that only the device knows: the host waits for it.
_SIZED_BY_DATA = {
    "argwhere", "bincount", "extract", "flatnonzero", "nonzero", "unique", "unique_all",
    "unique_counts", "unique_inverse", "unique_values",
}  # fmt: skip
_TO_DEVICE = {"array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"}


class Traffic:
    """What went between host and device.

    Attributes
    ----------
    waits : int
        Times that the host waited for the device: for a number, an array or the size of one.
    down, up : list of ndarray
        The arrays copied from the device, and to it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.waits, self.down, self.up = 0, [], []


traffic = Traffic()


class Device:
    """The only device. Like that of CuPy it cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, device: Any = None) -> None:
        self.id = getattr(device, "id", device) or 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def __str__(self) -> str:
        return f"<CUDA Device {self.id}>"


def _refuse(*args: object, **kwargs: object) -> Any:
    raise TypeError(
        "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a "
        "NumPy array explicitly."
    )


def _own(value: Any) -> Any:
    """Return what NumPy understands for an argument, refusing arrays of the host."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(map(_own, value))
    return value


def _wrapped(value: Any) -> Any:
    """Return results as arrays of the device; NumPy's scalars become arrays, as in CuPy."""
    if isinstance(value, np.ndarray | np.generic):
        return ndarray._of(np.asarray(value))
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(_wrapped, value))
    return tuple(map(_wrapped, value)) if isinstance(value, tuple) else value


def _waited(array: ndarray) -> np.ndarray:
    traffic.waits += 1
    return array._host


class ndarray:  # noqa: N801 (the name of CuPy)
    """An array on the device."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]
    __array__ = __array_function__ = __array_interface__ = property(_refuse)
    __array_priority__ = 100

    _host: np.ndarray

    @classmethod
    def _of(cls, host: np.ndarray) -> ndarray:
        if host.dtype.kind not in "?biufc" or host.dtype.char in "gG":
            raise ValueError(f"Unsupported dtype {host.dtype}")
        array = cls.__new__(cls)
        array._host = host
        return array

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: Device())
    T = property(lambda self: _wrapped(self._host.T))
    mT = property(lambda self: _wrapped(self._host.mT))  # noqa: N815
    real = property(lambda self: _wrapped(self._host.real))
    imag = property(lambda self: _wrapped(self._host.imag))

    def get(self, stream=None, order="C", out=None, blocking=True) -> np.ndarray:  # type: ignore[no-untyped-def]
        """Return a copy on the host."""
        host = np.array(_waited(self), order=order)
        traffic.down.append(host)
        return host

    def item(self) -> Any:
        """Return the only entry as a number of Python."""
        return _waited(self).item()

    def tolist(self) -> Any:
        """Return the entries as numbers of Python."""
        traffic.down.append(self._host)
        return _waited(self).tolist()

    def __getitem__(self, key: Any) -> ndarray:
        return _wrapped(self._host[_index(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_index(key)] = _own(value)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return repr(_waited(self))

    def __float__(self) -> float:
        return float(_waited(self))

    def __int__(self) -> int:
        return int(_waited(self))

    def __bool__(self) -> bool:
        return bool(_waited(self))

    def __complex__(self) -> complex:
        return complex(_waited(self))

    def __index__(self) -> int:
        return operator.index(_waited(self))


def _index(key: Any) -> Any:
    keys = key if isinstance(key, tuple) else (key,)
    traffic.waits += sum(isinstance(k, ndarray) and k.dtype == bool for k in keys)
    return _own(key)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: ndarray, *others: Any) -> Any:
        result = getattr(self._host, name)(*map(_own, others))
        if name.startswith("__i") and name not in ("__invert__",) and result is not NotImplemented:
            return self
        return result if result is NotImplemented else _wrapped(result)

    return apply


for _symbol in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor",
    "lshift", "rshift",
):  # fmt: skip
    for _kind in ("", "r", "i"):
        setattr(ndarray, f"__{_kind}{_symbol}__", _operator(f"__{_kind}{_symbol}__"))
for _symbol in ("lt", "le", "eq", "ne", "gt", "ge", "neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{_symbol}__", _operator(f"__{_symbol}__"))


def _function(name: str, arguments: str, source: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of NumPy, with the arguments that CuPy takes."""
    scope: dict[str, Any] = {}
    exec(f"def signature{arguments}: pass", scope)
    signature = inspect.signature(scope["signature"])

    @functools.wraps(source, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        kwargs.pop("blocking", None)
        if name in _TO_DEVICE:
            if not isinstance(args[0], ndarray):
                traffic.up.append(np.asarray(args[0]))
            args = (getattr(args[0], "_host", args[0]), *args[1:])
        traffic.waits += name in _SIZED_BY_DATA
        given = {key: _own(value) for key, value in kwargs.items()}
        return _wrapped(source(*map(_own, args) if name not in _TO_DEVICE else args, **given))

    return call


for _name, _arguments in _NAMES["ndarray"].items():
    if not hasattr(ndarray, _name):
        setattr(ndarray, _name, _function(_name, _arguments, getattr(np.ndarray, _name)))


def _module(name: str, source: Any) -> ModuleType:
    module = ModuleType(name)
    for key, arguments in _NAMES[name].items():
        setattr(module, key, _function(key, arguments, getattr(source, key)))
    return module


def _modules() -> dict[str, ModuleType]:
    """Return the modules of the double by name."""
    cupy = _module("cupy", np)
    cupy.linalg, cupy.fft = _module("cupy.linalg", np.linalg), _module("cupy.fft", np.fft)
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.device = ModuleType("cupy.cuda.device")
    cupy.cuda.Device = cupy.cuda.device.Device = Device
    cupy.ndarray = ndarray
    cupy.asnumpy = lambda a: a.get() if isinstance(a, ndarray) else np.asarray(a)
    cupy.__version__ = _NAMES["version"]
    for name in (
        "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "intp",
        "float16", "float32", "float64", "complex64", "complex128", "integer", "floating",
        "dtype", "finfo", "iinfo", "newaxis", "pi", "inf", "nan", "e",
    ):  # fmt: skip
        setattr(cupy, name, getattr(np, name))
    parts = (cupy, cupy.linalg, cupy.fft, cupy.cuda, cupy.cuda.device)
    return {module.__name__: module for module in parts}


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """Let ``import cupy`` give the double, also where CuPy itself is installed."""
    hidden = _taken_out()
    sys.modules.update(_modules())
    traffic.clear()
    try:
        yield sys.modules["cupy"]
    finally:
        _taken_out()
        sys.modules.update(hidden)
        if f"{_COMPAT}.cupy" in hidden:
            array_api_compat.cupy = hidden[f"{_COMPAT}.cupy"]


def _taken_out() -> dict[str, ModuleType]:
    """Take CuPy, and what was made for it, out of the imported modules."""
    vars(array_api_compat).pop("cupy", None)
    names = [n for n in sys.modules if n.removeprefix(f"{_COMPAT}.").split(".")[0] == "cupy"]
    return {name: sys.modules.pop(name) for name in names}
