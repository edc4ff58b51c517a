"""Places where arrays can be that NumPy does not see, each with its name.

The strict library has devices that NumPy cannot read, and some without dtypes of 64 bits. The
double of CuPy is there always, CuPy itself where there is a GPU.
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
class Place:
    """A device of a library."""

    name: str
    put: Callable[[np.ndarray], Any]
    dtypes: frozenset[str] = frozenset(_NARROW)

    def __call__(self, array: np.ndarray) -> Any:
        """Return `array` there, in a dtype that the device has."""
        name = array.dtype.name
        return self.put(array.astype(name if name in self.dtypes else _NARROW.get(name, name)))


def _strict(device: Any) -> Place:
    dtypes = frozenset(_INFO.dtypes(device=device))
    name = str(device).split("'")[1]
    return Place(name, lambda array: array_api_strict.asarray(array, device=device), dtypes)


@contextlib.contextmanager
def _double() -> Iterator[Place]:
    with cupy_double.installed() as cupy:
        yield Place("cupy-double", cupy.asarray)


#: Each place by name, as a context in which it is there.
PLACES: dict[str, Callable[[], Any]] = {"cupy-double": _double}
for _device in _INFO.devices():
    if _device != _INFO.default_device():
        _place = _strict(_device)
        PLACES[_place.name] = lambda place=_place: contextlib.nullcontext(place)
try:
    import cupy

    cupy.cuda.runtime.getDeviceCount()
    PLACES["cupy"] = lambda: contextlib.nullcontext(Place("cupy", cupy.asarray))
except Exception:  # no CuPy, or no GPU
    pass
