"""The measures, the most important first; each yields rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import matfact
from benchmarks.gpu.device import Device
from matfact import backend
from matfact.metrics import relative_error
from matfact.operators import (
    DenseFactor,
    Factor,
    FactorProduct,
    QuantizedFactor,
    SignFactor,
    SparseFactor,
)
from matfact.operators._quantized import group_bounds
from matfact.torch import (
    FactorizedLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    keep_unchecked,
)
from matfact.torch.kernels import operators, roads
from matfact.torch.layers._chain import factor_module

Row = dict[str, Any]


def sparse(rows: int, columns: int, density: float, seed: int = 0) -> SparseFactor:
    """Return a random factor, whose first row is empty."""
    rng = np.random.default_rng(seed)
    places = np.unique(rng.integers(columns, rows * columns, int(density * rows * columns)))
    values = rng.standard_normal(len(places), dtype=np.float32)
    return SparseFactor.from_locations(values, places, (rows, columns))


def coded(pattern: Factor, group_size: int | None) -> QuantizedFactor:
    rng = np.random.default_rng(1)
    levels = rng.integers(-7, 8, pattern.values.shape).astype(np.int8)
    n_groups = len(group_bounds(pattern, group_size)) - 1
    scales = rng.random(n_groups).astype(np.float32) + 0.5
    return QuantizedFactor(levels, scales, 4, group_size, pattern)


def dense_pattern(rows: int, columns: int) -> DenseFactor:
    return DenseFactor(np.ones((rows, columns), np.float32))


def signs(rows: int, columns: int) -> SignFactor:
    rng = np.random.default_rng(2)
    return SignFactor.from_dense(rng.standard_normal((rows, columns)).astype(np.float32))


def stored(rows: int, columns: int) -> dict[str, Callable[[], Factor]]:
    """Return how to make each kind of stored matrix."""
    return {
        "sparse 25 %": lambda: sparse(rows, columns, 0.25),
        "sparse 5 %": lambda: sparse(rows, columns, 0.05),
        "codes": lambda: coded(dense_pattern(rows, columns), None),
        "signs": lambda: signs(rows, columns),
        "sparse 25 %, codes": lambda: coded(sparse(rows, columns, 0.25), None),
        "codes in groups of 64": lambda: coded(dense_pattern(rows, columns), 64),
    }


def ways(module: Any, x: Tensor, device: Device) -> dict[str, Callable[[], Tensor]]:
    """Return the products of a stored matrix on each road, by its name."""
    held, rows = dict(module.named_buffers()), module.rows
    mask, indices, indptr = (held.get(name) for name in ("mask", "indices", "indptr"))
    found: dict[str, Callable[[], Tensor]] = {"torch": lambda: module._by_torch(x)}
    if device.has_kernels:
        from matfact.torch.kernels import launch

        values, codes, bits = held.get("codes"), None, mask
        if "codes" in held:
            is_grouped = module.group_size is not None
            codes = (module.scales.detach(), module.groups, module.unit, is_grouped)
            bits = held["codes"] if mask is None else mask
        elif "signs" in held:
            values = bits = module.signs
        else:
            values = module.values.detach()
        found["tiles"] = functools.partial(
            launch.tiles, x, rows, values, bits=bits, indptr=indptr, codes=codes,
            is_signs="signs" in held,
        )  # fmt: skip
        if indices is not None:
            found["rows"] = functools.partial(
                launch.rows, x, rows, values, indices=indices, indptr=indptr, codes=codes
            )
    if indices is not None and "codes" not in held:
        values = module.values.detach()
        found["cusparse"] = lambda: operators.by_cusparse(x, values, indices, indptr)
    return found


def kernels(device: Device) -> Iterator[Row]:
    """Compare each kernel with double precision."""
    if not device.has_kernels:
        yield {"failure": "Triton's kernels cannot run: see how to install or interpret Triton"}
        return
    shapes = device.pick([(1000, 1024), (77, 1003)], [(13, 40)])
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    dtypes = device.pick((torch.float16, torch.bfloat16, torch.float32), (torch.float32,))
    for (rows, columns), dtype in ((s, d) for s in shapes for d in dtypes):
        for name, make in stored(rows, columns).items():
            module = factor_module(make()).to(device.name, dtype)
            exact = module.dense().detach().double()
            for n in device.pick((1, 3, 17, 300), (1, 17)):
                x = device.randn(n, columns, dtype=dtype)
                for road, call in ways(module, x, device).items():
                    if road in ("tiles", "rows"):
                        yield _error(name, road, dtype, (n, rows, columns), call(), x, exact)
    for dtype in dtypes:
        yield from _blocks(device, dtype)


def _blocks(device: Device, dtype: torch.dtype) -> Iterator[Row]:
    from matfact.torch.kernels import launch

    patterns = device.pick(
        [(1, 512, 2, 2), (3, 5, 4, 3), (2, 1, 64, 80), (1, 64, 64, 64), (1, 3, 17, 130)],
        [(1, 8, 2, 2), (1, 2, 17, 18)],
    )
    for pattern in patterns:
        a, d, b, c = pattern
        for n in device.pick((1, 17, 1000), (1, 17)):
            values = device.randn(*pattern, dtype=dtype)
            x, g = device.randn(n, a * c * d, dtype=dtype), device.randn(n, a * b * d, dtype=dtype)
            exact = operators._by_blocks(x.double(), values.double())
            got = launch.kronecker(x, values)
            yield _row("Kronecker-sparse", "tiles", dtype, (n, *pattern), got, exact)
            inputs, outputs = x.double().reshape(n, a, c, d), g.double().reshape(n, a, b, d)
            exact = torch.einsum("nabd,nacd->adbc", outputs, inputs)
            got = launch.kronecker_gradient(x, g, list(pattern))
            yield _row("gradient of blocks", "tiles", dtype, (n, *pattern), got, exact)


def _error(name: str, road: str, dtype: Any, size: Any, got: Tensor, x: Tensor, A: Tensor) -> Row:
    return _row(name, road, dtype, size, got, x.double() @ A.T)


def _row(name: str, road: str, dtype: Any, size: Any, got: Tensor, exact: Tensor) -> Row:
    error = float((got.double() - exact).norm() / exact.norm())
    # Values of codes are rounded to the dtype where they are made dense.
    limit = 8 * torch.finfo(dtype).eps
    kind = str(dtype).removeprefix("torch.")
    return {"structure": name, "road": road, "dtype": kind, "size": size, "error": error,
            "limit": limit}  # fmt: skip


def solvers(device: Device) -> Iterator[Row]:
    """Time the double sparse factorization, and compare its error with that of the host."""
    side = device.pick(8192, 256)
    A = device.randn(side, side)
    rate = 2 * side**3 / device.seconds([lambda: A @ A])
    yield {"structure": "dense product", "size": (side, side), "rate": rate}
    for n in device.pick((1024, 4096), (64,)):
        W = device.randn(n, n)
        fit = matfact.DoubleSparseFactorizer(density=0.25).fit
        with FlopCounterMode(display=False) as counter:
            product = fit(W).operator_
        seconds = device.wall(lambda W=W, fit=fit: fit(W))
        flops = counter.get_total_flops()
        row = {"structure": "DSF 25 %", "size": (n, n), "seconds": seconds, "flops": flops,
               "share": flops / seconds / rate, "error": _distance(W, product)}  # fmt: skip
        if n <= 1024:
            host = W.cpu().numpy()
            row["host_error"] = _distance(host, fit(host).operator_)
            row["limit"] = 1.02 * row["host_error"]
        yield row


def _distance(W: Any, product: Any) -> float:
    return float(relative_error(backend.to_numpy(W), backend.to_numpy(product.toarray())))


def matrices(device: Device) -> Iterator[Row]:
    """Time each stored matrix on each road, beside the dense matrix and what the rule predicts."""
    dtype = torch.float16 if not device.rehearses else torch.float32
    for n in device.pick((4096, 8192), (64,)):
        for name, make in stored(n, n).items():
            module = factor_module(make()).to(device.name, dtype).requires_grad_(False).eval()
            count = device.copies(module.n_values)
            modules = [copy.deepcopy(module) for _ in range(count)]
            weights = [device.randn(n, n, dtype=dtype) for _ in range(device.copies(2 * n * n))]
            for batch in device.pick((1, 16, 256, 4096), (1, 16)):
                x = device.randn(batch, n, dtype=dtype)
                dense = device.seconds(
                    [functools.partial(nn.functional.linear, x, W) for W in weights]
                )
                predicted = _predicted(module, name, batch, dtype.itemsize)
                for road in ways(module, x, device):
                    calls = [ways(each, x, device)[road] for each in modules]
                    replays = road in ("tiles", "rows")  # others may wait for the device
                    seconds = device.seconds(calls, replays)
                    yield {"structure": name, "size": (n, n), "batch": batch, "road": road,
                           "seconds": seconds, "dense": dense,
                           "predicted": predicted.get(road)}  # fmt: skip


def _predicted(module: Any, name: str, batch: int, itemsize: int) -> dict[str, float]:
    kind: roads.Kind = "sparse" if "sparse" in name else "signs" if "signs" in name else "codes"
    size = 1 if "codes" in name else itemsize
    storage = roads.Storage(
        kind, module.rows, module.columns, module.n_values, size, "groups" in name
    )
    return {str(k): v for k, v in roads.times(storage, batch, itemsize).items()}


def layers(device: Device) -> Iterator[Row]:
    """Time whole layers in eval mode, called from Python and replayed from a graph."""
    dtype = torch.float16 if not device.rehearses else torch.float32
    n = device.pick(4096, 64)
    makers: dict[str, Callable[[], nn.Module]] = {
        "Monarch": lambda: MonarchLinear(n, n, random_state=0),
        "two sparse 25 %": lambda: SparseProductLinear(n, n, density=0.5, random_state=0),
        "two sparse 5 %": lambda: SparseProductLinear(n, n, density=0.1, random_state=0),
        "low rank 25 %": lambda: LowRankLinear(n, n, rank=n // 8, random_state=0),
        "2:4": lambda: FactorizedLinear(_two_four(n)),
    }
    for name, make in makers.items():
        layer: Any = keep_unchecked(make().to(device.name, dtype).eval().requires_grad_(False))
        dense = nn.Linear(n, n, device=device.name, dtype=dtype).requires_grad_(False)
        for batch in device.pick((1, 16, 256, 4096), (1, 16)):
            x = device.randn(batch, n, dtype=dtype)
            base = [functools.partial(dense, x)] * 10
            for in_graph in device.pick((False, True), (False,)):
                layer.inference = "factors" if in_graph else "auto"
                taken = layer.gpu_roads(batch, in_graph=in_graph)
                yield {
                    "structure": name + (" in a graph" if in_graph else ""),
                    "size": (n, n),
                    "batch": batch,
                    "seconds": device.seconds([functools.partial(layer, x)] * 10, in_graph),
                    "dense": device.seconds(base, in_graph),
                    "predicted": taken.factors_seconds,
                    "road": ", ".join((taken.method, *taken.factors)),
                }


def _two_four(n: int) -> FactorProduct:
    rng = np.random.default_rng(0)
    order = rng.random((n, n // 4, 4)).argsort(axis=2)
    W = np.where(order < 2, 1 + rng.random(order.shape), 0).reshape(n, n)
    return FactorProduct([SparseFactor.from_dense(W.astype(np.float32))])


def training(device: Device) -> Iterator[Row]:
    """Time a step of training: the product and both gradients."""
    n = device.pick(4096, 64)
    dtype = torch.bfloat16 if not device.rehearses else torch.float32
    for name, make in {"Monarch": MonarchLinear, "dense": nn.Linear}.items():
        layer = make(n, n).to(device.name, dtype)
        for batch in device.pick((256, 4096), (16,)):
            x = device.randn(batch, n, dtype=dtype).requires_grad_()

            def step(layer: nn.Module = layer, x: Tensor = x) -> None:
                layer(x).sum().backward()

            yield {"structure": f"{name}, training", "size": (n, n), "batch": batch,
                   "seconds": device.seconds([step] * 5, replays=False)}  # fmt: skip


def methods(device: Device) -> Iterator[Row]:
    """Compare errors of fits with those of the host in double precision."""
    n = device.pick(256, 32)
    W = device.randn(n, n)
    exact = W.double().cpu().numpy()
    arrays: dict[str, Any] = {"torch": W}
    if not device.rehearses:
        try:
            import cupy

            arrays["CuPy"] = cupy.asarray(W.cpu().numpy())
        except ImportError:
            yield {"structure": "CuPy", "failure": "not installed"}
    for make in (
        matfact.DoubleSparseFactorizer, matfact.MonarchProjector, matfact.LowRank,
        matfact.ButterflyFit, matfact.Palm4MSA, matfact.MagnitudePruner, matfact.BlockSVD,
    ):  # fmt: skip
        limit = 1.02 * _distance(exact, make().fit(exact).operator_) + 1e-6
        for library, array in arrays.items():
            error = _distance(array, make().fit(array).operator_)
            yield {"structure": make.__name__, "road": library, "size": (n, n), "error": error,
                   "limit": limit}  # fmt: skip


def network(device: Device) -> Iterator[Row]:
    """Time networks from end to end: a stack of large layers, and pretrained ones."""
    width = device.pick(4096, 32)
    stack = nn.Sequential(*(
        each for _ in range(device.pick(4, 1))
        for each in (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    ))  # fmt: skip
    batches = device.pick((1, 16, 4096), (1, 16))
    samples = [(batch, device.randn(batch, width)) for batch in batches]
    for row in _end_to_end(device, "stack", stack, ".*", samples):
        yield row | {"weights": "random"}
    # Samples and tokens of each.
    sizes = device.pick({"encoder": [(1, 24), (32, 24)], "smollm2": [(1, 1), (1, 512)]}, {})
    for name, shapes in sizes.items():
        for row in _from_package(device, name, shapes):
            yield row | {"weights": "pretrained"}


def _from_package(device: Device, name: str, shapes: list[tuple[int, int]]) -> Iterator[Row]:
    """Time a network of another package on tokens, or say that something is not installed."""
    try:
        # Imported late: it needs matplotlib and more, which a machine with a GPU may lack.
        from benchmarks import generate

        model = generate.network(name)
    except ImportError as error:
        yield {"structure": name, "failure": f"{name} is left out: {error}"}
        return
    if model is None:
        yield {"structure": name, "failure": f"{name} is left out: its package is not installed"}
        return
    tokens = [(n * k, torch.ones(n, k, dtype=torch.long)) for n, k in shapes]
    yield from _end_to_end(device, name, model, generate.LAYERS[name], tokens)


def _end_to_end(
    device: Device, name: str, model: Any, layers: str, samples: list[tuple[int, Tensor]]
) -> Iterator[Row]:
    """Time a network, dense and with Monarch layers."""
    from matfact.torch import compress

    model = model.to(device.name).eval()
    small, _ = compress(copy.deepcopy(model), "monarch", layers=layers)
    keep_unchecked(small).eval()
    dtype = torch.float32 if device.rehearses else torch.float16
    for form, network in {"dense": model, "Monarch": small}.items():
        network.to(dtype).requires_grad_(False)
        for batch, x in samples:
            x = x.to(device.name, dtype if x.is_floating_point() else x.dtype)
            seconds = device.seconds([functools.partial(network, x)] * 3, replays=False)
            yield {"structure": f"{name}, {form}", "batch": batch, "seconds": seconds}


STEPS: dict[str, Callable[[Device], Iterator[Row]]] = {
    "kernels": kernels,
    "solvers": solvers,
    "matrices": matrices,
    "layers": layers,
    "training": training,
    "methods": methods,
    "network": network,
}
