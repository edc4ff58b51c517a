"""Array libraries and devices that results have to stay with.

The strict library has devices that NumPy cannot read, and some without dtypes of 64 bits. CuPy is
the real one where there is a GPU; its double is there always.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import array_api_strict
import numpy as np

from tests import cupy_double

_INFO = array_api_strict.__array_namespace_info__()
_NARROW = {"float64": "float32", "complex128": "complex64", "int64": "int32"}


@dataclasses.dataclass(frozen=True)
class Library:
    """A place where arrays are, in some library."""

    put: Callable[[np.ndarray], Any]
    dtypes: frozenset[str] = frozenset(_NARROW)

    def __call__(self, array: np.ndarray) -> Any:
        """Return `array` there, in a dtype that the device has."""
        name = array.dtype.name
        return self.put(array.astype(name if name in self.dtypes else _NARROW.get(name, name)))


def _strict(device: Any) -> Library:
    dtypes = frozenset(_INFO.dtypes(device=device))
    return Library(lambda array: array_api_strict.asarray(array, device=device), dtypes)


def _finds_entries(device: Any) -> bool:
    """Whether the strict library itself can find nonzeros there: some releases of it cannot."""
    try:
        array_api_strict.nonzero(array_api_strict.ones(1, dtype=array_api_strict.bool, device=device))
    except ValueError:
        return False
    return True


STRICT = {
    str(device).split("'")[1]: _strict(device)
    for device in _INFO.devices()
    if device != _INFO.default_device() and _finds_entries(device)
}


@contextlib.contextmanager
def _double() -> Iterator[Library]:
    with cupy_double.installed() as cupy:
        yield Library(lambda array: cupy.asarray(array))


#: Each library or device by name, as a context in which it is there.
LIBRARIES: dict[str, Callable[[], Any]] = {
    name: lambda library=library: contextlib.nullcontext(library)
    for name, library in STRICT.items()
}
LIBRARIES["cupy-double"] = _double
try:
    import cupy

    cupy.cuda.runtime.getDeviceCount()
    LIBRARIES["cupy"] = lambda: contextlib.nullcontext(Library(cupy.asarray))
except Exception:  # no CuPy, or no GPU
    pass
