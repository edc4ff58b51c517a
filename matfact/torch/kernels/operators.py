"""The kernels as operators of torch: Triton on CUDA, plain torch on the CPU, gradients of both.

Samples are rows: each operator takes `x` of shape (n, columns) and returns (n, rows).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from matfact.torch.kernels import roads

#: Whether Triton can compile the kernels.
HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Kernels that have run, so that they are compiled.
_RUN: set[Any] = set()


def has_kernels(capability: tuple[int, int]) -> bool:
    """Whether kernels can run on a GPU of the given compute capability."""
    return HAS_TRITON and capability >= roads.KERNELS_FROM


@custom_op("matfact::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(
    x: Tensor, values: Tensor, mask: Tensor, indices: Tensor, indptr: Tensor
) -> Tensor:
    """Return ``x @ A.T`` for scattered values.

    The mask has one bit an entry, `indices` the column of each value: two bytes of an unsigned
    number, or an int32.
    """
    return x @ scattered(values, indices, indptr, x.shape[1]).T


@custom_op("matfact::coded_linear", mutates_args=(), device_types="cpu")
def coded_linear(
    x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor, unit: int, is_grouped: bool,
    mask: Tensor | None, indices: Tensor | None, indptr: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return ``x @ A.T`` for codes, scattered as in `sparse_linear` or dense without a mask.

    Values are levels times the scales of their groups ÷ `unit`. `groups` has the number of the
    first group of each row, and that of all groups at its end. Where rows are not grouped, none has
    more than one.
    """
    return x @ _coded(codes, scales, groups, unit, indices, indptr, x.shape[1]).T


@custom_op("matfact::sign_linear", mutates_args=(), device_types="cpu")
def sign_linear(x: Tensor, signs: Tensor, rows: int) -> Tensor:
    """Return ``x @ A.T`` for a matrix of `rows` rows of signs, one bit each."""
    return x @ signs_of(signs, rows, x.shape[1], x.dtype).T


@custom_op("matfact::kronecker_linear", mutates_args=(), device_types="cpu")
def kronecker_linear(x: Tensor, values: Tensor) -> Tensor:
    """Return the product with a Kronecker-sparse factor with values of shape (a, d, b, c)."""
    return _by_blocks(x, values)


@custom_op("matfact::kronecker_gradient", mutates_args=(), device_types="cpu")
def kronecker_gradient(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """Return the gradient of the values of `kronecker_linear`, of the given shape."""
    return _gradient(x, grad, shape)


def scattered(values: Tensor, indices: Tensor, indptr: Tensor, columns: int) -> Tensor:
    """Return the dense matrix of scattered values."""
    rows = indptr.shape[0] - 1
    place = _columns_of(indices).long() + columns * _rows_of(indptr, indices.shape[0])
    return values.new_zeros(rows * columns).scatter(0, place, values).reshape(rows, columns)


def _rows_of(indptr: Tensor, count: int) -> Tensor:
    """Return the row of each value."""
    begins = indptr[1:-1]  # of all rows but the first
    steps = indptr.new_zeros(count + 1).scatter_add(0, begins, torch.ones_like(begins))
    return steps[:count].cumsum(0)


def _columns_of(indices: Tensor) -> Tensor:
    """Return the column of each value."""
    if indices.dtype != torch.uint8:
        return indices
    lower, upper = indices.int().unbind(1)  # a view as integers cannot be exported
    return lower + 256 * upper


def by_cusparse(x: Tensor, values: Tensor, indices: Tensor, indptr: Tensor) -> Tensor:
    """Return ``x @ A.T`` for scattered values, as torch multiplies by compressed rows."""
    shape = len(indptr) - 1, x.shape[1]
    positions = indptr.int(), _columns_of(indices).int()
    matrix = torch.sparse_csr_tensor(*positions, values, shape, check_invariants=False)
    return (matrix @ x.T).T.contiguous()


def _by_blocks(x: Tensor, values: Tensor) -> Tensor:
    """Return the product with a Kronecker-sparse factor, by batched products."""
    a, d, b, c = values.shape
    samples = x.T.reshape(a, c, d, len(x)).transpose(1, 2)
    product = torch.matmul(values, samples).transpose(1, 2)
    return product.reshape(a * b * d, len(x)).clone(memory_format=torch.contiguous_format).T


def _coded(
    codes: Tensor, scales: Tensor, groups: Tensor, unit: int,
    indices: Tensor | None, indptr: Tensor | None, columns: int,
) -> Tensor:  # fmt: skip
    """Return the dense matrix of codes."""
    rows = len(groups) - 1
    if indptr is None:
        indptr = torch.arange(rows + 1, device=codes.device) * columns
    count = codes.numel()
    row = _rows_of(indptr, count)
    before = torch.arange(count, device=codes.device) - indptr[row]
    number = ((before + 1) * groups.diff()[row] - 1) // indptr.diff()[row]
    values = codes.reshape(-1).to(scales.dtype) / unit * scales[groups[row].long() + number]
    if indices is None:
        return values.reshape(rows, columns)
    return scattered(values, indices, indptr, columns)


def signs_of(signs: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix of signs."""
    # Without shifts and masks of bits, which ONNX lacks.
    powers = 2 ** torch.arange(7, -1, -1, device=signs.device)
    numbers = torch.arange(256, device=signs.device)
    table = (2 * (numbers[:, None] // powers % 2) - 1).to(dtype)
    matrix = functional.embedding(signs.int(), table)  # eight for each byte
    return matrix.reshape(-1)[: rows * columns].reshape(rows, columns)


# On CUDA the number of samples decides, also in compiled graphs, where it may be symbolic.


@sparse_linear.register_kernel("cuda")
def sparse_on_cuda(
    x: Tensor, values: Tensor, mask: Tensor, indices: Tensor, indptr: Tensor
) -> Tensor:
    """Return the product on the fastest road."""
    rows = len(indptr) - 1
    road = _road("sparse", x, rows, values)
    if road == "tiles":
        return _launch("tiles", x, rows, values, bits=mask, indptr=indptr)
    if road == "rows":
        return _launch("rows", x, rows, values, indices=indices, indptr=indptr)
    if road == "cusparse":
        return by_cusparse(x, values, indices, indptr)
    return x @ scattered(values, indices, indptr, x.shape[1]).T


@coded_linear.register_kernel("cuda")
def coded_on_cuda(
    x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor, unit: int, is_grouped: bool,
    mask: Tensor | None, indices: Tensor | None, indptr: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the product on the fastest road."""
    rows, held = len(groups) - 1, (scales, groups, unit, is_grouped)
    road = _road("codes" if mask is None else "sparse", x, rows, codes, is_grouped)
    if road == "tiles":
        bits = codes if mask is None else mask
        return _launch("tiles", x, rows, codes, bits=bits, indptr=indptr, codes=held)
    if road == "rows":
        return _launch("rows", x, rows, codes, indices=indices, indptr=indptr, codes=held)
    return x @ _coded(codes, scales, groups, unit, indices, indptr, x.shape[1]).T


@sign_linear.register_kernel("cuda")
def sign_on_cuda(x: Tensor, signs: Tensor, rows: int) -> Tensor:
    """Return the product on the fastest road."""
    if _road("signs", x, rows, signs) == "tiles":
        return _launch("tiles", x, rows, signs, bits=signs, is_signs=True)
    return x @ signs_of(signs, rows, x.shape[1], x.dtype).T


@kronecker_linear.register_kernel("cuda")
def kronecker_on_cuda(x: Tensor, values: Tensor) -> Tensor:
    """Return the product on the fastest road."""
    a, d, b, c = values.shape
    road = _fastest(x, roads.blocks((a, d, b, c), len(x), x.itemsize), (a, d, b, c))
    return _launch("kronecker", x, values) if road == "tiles" else _by_blocks(x, values)


@kronecker_gradient.register_kernel("cuda")
def gradient_on_cuda(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """Return the gradient, by a kernel where there are some."""
    if _fastest(x, {"torch": 1, "tiles": 0}, ("gradient", *shape)) == "tiles":
        return _launch("kronecker_gradient", x, grad, shape)
    return _gradient(x, grad, shape)


def _road(
    kind: roads.Kind, x: Tensor, rows: int, values: Tensor, is_grouped: bool = False
) -> roads.Road:
    """Return the fastest road for a stored matrix."""
    stored = rows * x.shape[1] if kind == "signs" else values.numel()
    storage = roads.Storage(kind, rows, x.shape[1], stored, values.itemsize, is_grouped)
    return _fastest(x, roads.times(storage, len(x), x.itemsize), storage)


def _fastest(x: Tensor, times: Mapping[roads.Road, float], factor: Any) -> roads.Road:
    """Return the fastest road for a `factor`, which tells it from factors of other kernels.

    While a CUDA graph is captured nothing can be compiled, so kernels must have run before.
    """
    road = roads.quickest(times) if has_kernels(_capability(x)) else "torch"
    call = road, factor, x.shape, x.dtype, x.device
    if road == "torch" or (torch.cuda.is_current_stream_capturing() and call not in _RUN):
        return "torch"
    _RUN.add(call)
    return road


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def _launch(name: str, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Run a kernel on the device of `x`, which need not be the current one."""
    from matfact.torch.kernels import launch

    with torch.cuda.device_of(x):
        out: Tensor = getattr(launch, name)(x, *arguments, **named)
    return out


def _gradient(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    a, d, b, c = shape
    samples = x.reshape(len(x), a, c, d)
    return torch.einsum("nabd,nacd->adbc", grad.reshape(len(x), a, b, d), samples).contiguous()


@sparse_linear.register_fake
def _sparse_fake(
    x: Tensor, values: Tensor, mask: Tensor, indices: Tensor, indptr: Tensor
) -> Tensor:
    return x.new_empty(x.shape[0], indptr.shape[0] - 1)


@coded_linear.register_fake
def _coded_fake(
    x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor, unit: int, is_grouped: bool,
    mask: Tensor | None, indices: Tensor | None, indptr: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], groups.shape[0] - 1)


@sign_linear.register_fake
def _sign_fake(x: Tensor, signs: Tensor, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@kronecker_linear.register_fake
def _kronecker_fake(x: Tensor, values: Tensor) -> Tensor:
    a, d, b, _ = values.shape
    return x.new_empty(a * b * d, x.shape[0]).T


@kronecker_gradient.register_fake
def _gradient_fake(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


# Gradients are made of differentiable operations, so that they have gradients too.


def _keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, indices, indptr = inputs
    ctx.save_for_backward(x, values, indices, indptr)


def _sparse_backward(ctx: Any, grad: Tensor) -> Any:
    x, values, indices, indptr = ctx.saved_tensors
    of_x = of_values = None
    if ctx.needs_input_grad[0]:
        of_x = grad @ scattered(values, indices, indptr, x.shape[1])
    if ctx.needs_input_grad[1]:
        place = _rows_of(indptr, len(values)), _columns_of(indices)
        of_values = (grad.T @ x)[place]
    return of_x, of_values, None, None, None


def _keep_coded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, groups, unit, _, _, indices, indptr = inputs
    ctx.save_for_backward(x, codes, scales, groups, indices, indptr)
    ctx.unit = unit


def _coded_backward(ctx: Any, grad: Tensor) -> Any:
    x, codes, scales, groups, indices, indptr = ctx.saved_tensors
    of_x = of_scales = None

    def matrix(scales: Tensor) -> Tensor:
        return _coded(codes, scales, groups, ctx.unit, indices, indptr, x.shape[1])

    if ctx.needs_input_grad[0]:
        of_x = grad @ matrix(scales)
    if ctx.needs_input_grad[2]:
        pull = torch.func.vjp(matrix, scales)[1]
        (of_scales,) = pull(grad.T @ x)
    return of_x, None, of_scales, None, None, None, None, None, None


def _keep_signs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, signs, _ = inputs
    ctx.save_for_backward(x, signs)


def _sign_backward(ctx: Any, grad: Tensor) -> Any:
    x, signs = ctx.saved_tensors
    return grad @ signs_of(signs, grad.shape[1], x.shape[1], x.dtype), None, None


def _keep_kronecker(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kronecker_backward(ctx: Any, grad: Tensor) -> Any:
    x, values = ctx.saved_tensors
    of_x = kronecker_linear(grad, values.mT) if ctx.needs_input_grad[0] else None
    shape = list(values.shape)
    return of_x, kronecker_gradient(x, grad, shape) if ctx.needs_input_grad[1] else None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, _ = inputs
    ctx.save_for_backward(x, grad)


def _gradient_backward(ctx: Any, of_values: Tensor) -> Any:
    x, grad = ctx.saved_tensors
    of_x = kronecker_linear(grad, of_values.mT) if ctx.needs_input_grad[0] else None
    return of_x, kronecker_linear(x, of_values) if ctx.needs_input_grad[1] else None, None


sparse_linear.register_autograd(_sparse_backward, setup_context=_keep_sparse)
coded_linear.register_autograd(_coded_backward, setup_context=_keep_coded)
sign_linear.register_autograd(_sign_backward, setup_context=_keep_signs)
kronecker_linear.register_autograd(_kronecker_backward, setup_context=_keep_kronecker)
kronecker_gradient.register_autograd(_gradient_backward, setup_context=_keep_gradient)
