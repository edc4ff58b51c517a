"""Array libraries, devices and dtypes, which no other module deals with.

Other modules take the namespace of their input and use the Python Array API standard. Operations
that the standard lacks (selection, Cholesky solves) are here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import scipy.linalg

Array = Any  #: an array of any library that follows the Array API standard
#: Dtypes that replace NumPy's extended precision, by dtype character.
_DOUBLE = {"g": np.float64, "G": np.complex128}
#: Dtypes that replace those of 64 bits on a device without them, by name.
_NARROW = {"int64": "int32", "float64": "float32", "complex128": "complex64"}
#: The dtypes of each library and device seen so far, by name.
_dtypes_of: dict[tuple[str, str], dict[str, Any]] = {}


def _compat() -> ModuleType:
    """Import array_api_compat late: loading a network needs only NumPy."""
    import array_api_compat

    return array_api_compat


def namespace(*arrays: Array) -> ModuleType:
    """Return the Array API namespace shared by `arrays`."""
    if all(type(array) is np.ndarray for array in arrays):
        from array_api_compat import numpy  # fast path: small fits call this hundreds of times

        return numpy
    return _compat().array_namespace(*arrays)


def is_numpy(array: Array) -> bool:
    """Whether `array` is a NumPy array, which SciPy and Numba can use."""
    return isinstance(array, np.ndarray)


def is_array(obj: Any) -> bool:
    """Whether `obj` is an array of an Array API library (lists and DataFrames are not)."""
    return _compat().is_array_api_obj(obj)


def detached(array: Array) -> Array:
    """Return `array` detached from the autograd graph (torch only)."""
    return array.detach() if _compat().is_torch_array(array) else array


def device(array: Array) -> Any:
    """Return the device `array` lives on."""
    return _compat().device(array)


def _dtype(array: Array, name: str) -> Any:
    """Return the dtype called `name`, or a narrower one if the device of `array` lacks it."""
    xp, place = namespace(array), device(array)
    key = (xp.__name__, str(place))  # devices of CuPy cannot be hashed
    if key not in _dtypes_of:
        _dtypes_of[key] = xp.__array_namespace_info__().dtypes(device=place)
    dtypes = _dtypes_of[key]
    return dtypes[name] if name in dtypes else dtypes[_NARROW[name]]


def double(array: Array) -> Any:
    """Return the dtype float64, or float32 if the device of `array` lacks it."""
    return np.float64 if is_numpy(array) else _dtype(array, "float64")


def integer(array: Array) -> Any:
    """Return the dtype int64, or int32 if the device of `array` lacks it."""
    return np.int64 if is_numpy(array) else _dtype(array, "int64")


def to_numpy(array: Array) -> np.ndarray:
    """Copy `array` to the host as a NumPy array (16-bit floats become float32)."""
    if _compat().is_torch_array(array):
        array = detached(array).cpu().resolve_conj()
        return (array.float() if is_half(array) else array).numpy()
    if _compat().is_cupy_array(array):
        array = array.get()
    elif not is_numpy(array) and hasattr(array, "__dlpack__"):
        array = np.from_dlpack(array, device="cpu")
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def host_view(array: Array) -> np.ndarray | None:
    """Return `array` as a NumPy array that shares its memory, or None if that is impossible.

    bfloat16, which NumPy lacks, is viewed as 16-bit integers.
    """
    if is_numpy(array):
        return array
    if not _compat().is_torch_array(array) or array.device.type != "cpu":
        return None
    if array.requires_grad or array.is_conj():
        return None
    return (array.view(namespace(array).int16) if is_bfloat16(array) else array).numpy()


def is_on_host(array: Array) -> bool:
    """Whether the host can read `array` without waiting for another device."""
    return host_view(array) is not None


def version(array: Array) -> int:
    """Return a number that changes when `array` is written to (torch only; 0 elsewhere)."""
    tracked = _compat().is_torch_array(array) and not array.is_inference()
    return array._version if tracked else 0


def is_bfloat16(array: Array) -> bool:
    """Whether `array` has dtype bfloat16, which NumPy lacks."""
    return str(array.dtype).rpartition(".")[2] == "bfloat16"


def like(values: Any, reference: Array, dtype: Any = None) -> Array:
    """Return host `values` as an array with the library and device of `reference`.

    Dtypes of 64 bits are narrowed if the device lacks them, unless `dtype` asks for one.
    """
    xp = namespace(reference)
    if not is_numpy(reference):
        values = np.ascontiguousarray(values)
        if dtype is None and values.dtype.name in _NARROW:
            dtype = _dtype(reference, values.dtype.name)
        if _compat().is_torch_array(reference) and not values.flags.writeable:
            values = values.copy()  # torch does not support read-only memory
    return xp.asarray(values, dtype=dtype, device=device(reference))


def contiguous(array: Array) -> Array:
    """Return `array`, copied if it is a NumPy array that is not in C order."""
    return np.ascontiguousarray(array) if is_numpy(array) else array


def is_half(array: Array) -> bool:
    """Whether `array` has a 16-bit floating dtype, used for storage but not for computing."""
    if is_numpy(array) and array.dtype.itemsize != 2:
        return False  # fast path: small fits call this dozens of times
    return str(array.dtype).rpartition(".")[2] in {"float16", "bfloat16"}


def compute_array(array: Array) -> Array:
    """Return `array` in the dtype that solvers compute in.

    float32, float64 and complex dtypes are kept; 16-bit floats become float32, integers and
    booleans float64, where the device has it. In NumPy, foreign byte order becomes native and
    extended precision is rounded to double.
    """
    if is_numpy(array):
        if array.dtype.char in "fdFD" and array.dtype.isnative:
            return array
        array = array.astype(storage_dtype(array), copy=False)
    xp = namespace(array)
    if is_half(array):
        return xp.astype(array, xp.float32)
    if xp.isdtype(array.dtype, ("real floating", "complex floating")):
        return array
    return xp.astype(array, double(array))


def storage_dtype(array: Array) -> Any:
    """Return the dtype of results for `array`: its own, or float64, where the device has it.

    In NumPy, extended precision becomes double, and all dtypes are in native byte order.
    """
    if is_numpy(array):
        if array.dtype.kind in "fc":
            return np.dtype(_DOUBLE.get(array.dtype.char, array.dtype)).newbyteorder("=")
        return np.dtype(np.float64)
    xp = namespace(array)
    floating = is_half(array) or xp.isdtype(array.dtype, ("real floating", "complex floating"))
    return array.dtype if floating else double(array)


def is_complex(array: Array) -> bool:
    """Whether `array` has a complex dtype."""
    if is_numpy(array):
        return array.dtype.kind == "c"
    return bool(namespace(array).isdtype(array.dtype, "complex floating"))


def slabs(n_rows: int, size: int = 256) -> Iterator[slice]:
    """Yield slices of `size` rows, to bound the memory of intermediate results."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def zeroed(array: Array, support: Array) -> Array:
    """Set the finite matrix `array` to zero off the support, in place, and return it."""
    # Multiplying is ten times as fast as selecting in NumPy.
    for rows in slabs(array.shape[0]):
        array[rows, ...] *= namespace(array).astype(support[rows, ...], array.dtype)
    return array


def restricted(array: Array, support: Array) -> Array:
    """Return a copy of the finite matrix `array`, zero off the support."""
    return zeroed(namespace(array).asarray(array, copy=True), support)


def wide(array: Array) -> Array:
    """Return `array` in double precision, where the device has it, for error measures."""
    if is_numpy(array) and array.dtype.char in "dD":
        return array
    xp = namespace(array)
    if is_numpy(array):
        dtype = xp.complex128 if is_complex(array) else xp.float64
    else:
        dtype = _dtype(array, "complex128" if is_complex(array) else "float64")
    return array if array.dtype == dtype else xp.astype(array, dtype)


def norm(array: Array) -> float:
    """Return the Frobenius norm of `array` as a float, accumulated in double precision."""
    plain = _plain_norm(array)
    if 1e-140 < plain < math.inf:
        return plain
    # Squares have overflowed or underflowed.
    array = wide(array)
    scale = power_of_two(max_abs(array))
    return scale * _plain_norm(array * (1 / scale)) if scale else 0.0


def squared_norm(array: Array) -> Array:
    """Return the squared Frobenius norm: a float in NumPy, and elsewhere not read yet.

    Unlike `norm`, it does not tell numbers whose squares overflow or underflow elsewhere.
    """
    if is_numpy(array):
        return norm(array) ** 2
    return namespace(array).linalg.vector_norm(wide(array)) ** 2


def normalized(vector: Array) -> Array:
    """Return `vector` divided by its norm, itself if it is zero, without reading the norm."""
    if is_numpy(vector):
        length = norm(vector)
        return vector / length if length > 0 else vector
    xp = namespace(vector)
    length = xp.astype(xp.linalg.vector_norm(wide(vector)), vector.dtype)
    return vector / xp.where(length > 0, length, xp.ones_like(length))


def _plain_norm(array: Array) -> float:
    """Return the Frobenius norm of `array` if the squares of its entries are normal numbers."""
    if not is_numpy(array):
        return float(namespace(array).linalg.vector_norm(wide(array)))
    flat, energy = array.reshape(-1), 0.0
    for part in slabs(flat.size, 1 << 16):
        entries = wide(flat[part]).view(np.float64)
        energy += float(np.vdot(entries, entries))  # unlike @, does not warn of infinity
    return math.sqrt(energy)


def inner(a: Array, b: Array) -> Array:
    """Return the inner product of two real arrays of the same shape.

    It is a float in NumPy, and elsewhere an array on the device: reading it, by `numbers`,
    makes the host wait.
    """
    if is_numpy(a):
        return float(np.vdot(a, b))
    return namespace(a).sum(a * b)


def numbers(*scalars: Array) -> list[float]:
    """Return arrays without axes as floats, all of them read from their device at once."""
    if all(isinstance(scalar, int | float | np.ndarray | np.generic) for scalar in scalars):
        return [float(scalar) for scalar in scalars]
    xp, dtype = namespace(*scalars), double(scalars[0])
    together = xp.stack([xp.astype(scalar, dtype) for scalar in scalars])
    return [float(number) for number in to_numpy(together)]


def unit(array: Array) -> float:
    """Return the power of two `u` such that the largest magnitude is in [u, 2u).

    It is never subnormal, so its reciprocal does not overflow.
    """
    magnitude = max_abs(array)
    xp = namespace(array)
    if magnitude == math.inf:  # of complex numbers with finite parts
        magnitude = max(max_abs(xp.real(array)), max_abs(xp.imag(array)))
    if not magnitude:
        return 1.0
    return max(2.0 ** (math.frexp(magnitude)[1] - 1), float(xp.finfo(array.dtype).smallest_normal))


def power_of_two(magnitude: float) -> float:
    """Return a power of two near `magnitude` with a finite reciprocal; 0 for 0.

    Multiplying by it or by its reciprocal is exact, and faster than division.
    """
    if magnitude == 0.0:
        return 0.0
    return 2.0 ** min(max(math.frexp(magnitude)[1], -1000), 1000)


def max_abs(array: Array) -> float:
    """Return the largest magnitude in `array`, 0 if it is empty."""
    xp = namespace(array)
    return float(xp.max(xp.abs(array))) if _compat().size(array) else 0.0


def kth_largest(array: Array, k: int, axis: int = -1) -> Array:
    """Return the `k`-th largest entry along `axis` (1 ≤ k ≤ length), keeping the axis.

    Uses selection where the library has it (NumPy, CuPy, torch), else a sort.
    """
    xp = namespace(array)
    position = array.shape[axis] - k
    if hasattr(xp, "partition"):
        array = xp.partition(array, position, axis=axis)
    elif hasattr(xp, "kthvalue"):
        return xp.kthvalue(array, position + 1, dim=axis, keepdim=True).values
    else:
        array = xp.sort(array, axis=axis)
    place = [slice(None)] * array.ndim
    place[axis] = slice(position, position + 1)
    return array[tuple(place)]


def smallest(vector: Array, count: int) -> Array:
    """Return the `count` smallest entries of `vector`, in any order. `vector` is overwritten."""
    host = host_view(vector)
    if host is None:
        return namespace(vector).sort(vector)[:count]
    if 0 < count < host.size:
        host.partition(count)
    return host[:count]


def count_nonzero(mask: Array, axis: int | None = None, *, keepdims: bool = False) -> Array:
    """Return the number of true entries of `mask` along `axis`."""
    if is_numpy(mask):
        return np.count_nonzero(mask, axis=axis, keepdims=keepdims)
    xp = namespace(mask)
    dtype = integer(mask)
    return xp.sum(xp.astype(mask, dtype), axis=axis, dtype=dtype, keepdims=keepdims)


def flatnonzero(mask: Array) -> Array:
    """Return the positions of true entries in the flattened `mask`, on its device."""
    if is_numpy(mask):
        return np.flatnonzero(mask)
    xp = namespace(mask)
    return xp.nonzero(xp.reshape(mask, (-1,)))[0]


def spd_inverse(matrix: Array) -> Array:
    """Return the inverse of a symmetric positive definite `matrix`, by Cholesky."""
    if is_numpy(matrix):
        potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
        factor, info = potrf(matrix, lower=False)
        if info:
            raise np.linalg.LinAlgError("matrix is not positive definite")
        inverse, _ = potri(factor, lower=False)
        upper = np.triu(inverse)
        return upper + np.triu(inverse, 1).T
    return namespace(matrix).linalg.inv(matrix)


def spd_solve(matrix: Array, rhs: Array) -> Array:
    """Return the solution `X` of ``matrix X = rhs`` for a symmetric positive definite `matrix`.

    On NumPy both arguments must be C-contiguous and are overwritten.
    """
    xp = namespace(matrix)
    if not is_numpy(matrix):
        return xp.linalg.solve(matrix, rhs)
    # LAPACK sees the arrays transposed: Xᵀ L Lᵀ = rhsᵀ, solved in place from the right.
    potrf = scipy.linalg.get_lapack_funcs("potrf", (matrix,))
    trsm = scipy.linalg.get_blas_funcs("trsm", (matrix,))
    factor, info = potrf(matrix.T, lower=True, clean=False, overwrite_a=True)
    if info:
        raise np.linalg.LinAlgError("matrix is not positive definite")
    options = {"side": 1, "lower": 1, "overwrite_b": True}
    half = trsm(1.0, factor, rhs.T, trans_a=1, **options)
    return trsm(1.0, factor, half, **options).T


def add_diagonal(matrix: Array, values: Array) -> Array:
    """Return a copy of the square `matrix` with `values` added to its diagonal."""
    xp = namespace(matrix)
    if is_numpy(matrix):
        result = matrix.copy()
        np.einsum("ii->i", result)[:] += values
        return result
    eye = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix))
    return matrix + eye * values
