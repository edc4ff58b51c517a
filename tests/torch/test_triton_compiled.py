"""Triton's kernels are compiled for GPUs, without one, with the tiles that launches choose."""

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from matfact.torch.kernels import _decoded, _kronecker, launch  # noqa: E402

KERNELS = {
    _decoded: ("by_tiles", "by_rows"),
    _kronecker: ("sums", "dots", "gradient_sums", "gradient_dots"),
}
#: Shared memory of a program on every GPU of compute capability 8.0 and later.
SHARED = 99 * 1024
NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Record launches instead of running them."""
    calls = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((self.kernel, arguments, constants))

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return calls


def compiled(kernel, arguments, constants, capability):
    kinds = [
        f"*{NAMES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        for value in arguments
    ]
    signature = dict(zip(kernel.arg_names, kinds, strict=False)) | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def tensor(*shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def decoded(n, dtype, is_coded, is_grouped=False):
    rows, columns, n_values = 100, 128, 1000
    values = tensor(n_values, dtype=torch.int8 if is_coded else dtype)
    positions = {"indptr": tensor(rows + 1, dtype=torch.int64)}
    codes = None
    if is_coded:
        groups = tensor(rows + 1, dtype=torch.int32)
        codes = (tensor(rows, dtype=dtype), groups, 4, is_grouped)
    return tensor(n, columns, dtype=dtype), rows, values, {**positions, "codes": codes}


def by_tiles(n, dtype, *kind):
    x, rows, values, held = decoded(n, dtype, *kind)
    launch.tiles(x, rows, values, bits=tensor(1600, dtype=torch.uint8), **held)


def by_rows(n, dtype, *kind):
    x, rows, values, held = decoded(n, dtype, *kind)
    launch.rows(x, rows, values, indices=tensor(1000, 2, dtype=torch.uint8), **held)


def signs(n, dtype):
    bits = tensor(1600, dtype=torch.uint8)
    launch.tiles(tensor(n, 128, dtype=dtype), 100, bits, bits=bits, is_signs=True)


def blocks(n, dtype, side):
    values = tensor(1, 256, side, side, dtype=dtype)
    x = tensor(n, 256 * side, dtype=dtype)
    launch.kronecker(x, values)
    launch.kronecker_gradient(x, x, list(values.shape))


LAUNCHES = {
    "one sample by tiles": (by_tiles, 1, torch.float16, False),
    "many samples by tiles": (by_tiles, 64, torch.bfloat16, False),
    "single precision by tiles": (by_tiles, 64, torch.float32, False),
    "codes by tiles": (by_tiles, 64, torch.float16, True),
    "grouped codes by tiles": (by_tiles, 8, torch.float16, True, True),
    "one sample by rows": (by_rows, 1, torch.float16, False),
    "grouped codes by rows": (by_rows, 16, torch.float16, True, True),
    "signs": (signs, 1, torch.float16),
    "butterfly": (blocks, 64, torch.float16, 2),
    "Monarch": (blocks, 64, torch.float16, 64),
    "one sample of Monarch": (blocks, 1, torch.float16, 64),
}


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus(name, capability, launched):
    launching, *arguments = LAUNCHES[name]
    launching(*arguments)
    assert launched
    for call in launched:
        kernel = compiled(*call, capability)
        assert kernel.metadata.shared <= SHARED
        assert "ld.global" in kernel.asm["ptx"]
        uses_cores = "mma" in kernel.asm["ptx"]
        is_single = name.startswith("single")  # which is not rounded to the precision of TF32
        has_dots = call[2].get("USES_DOT", "PRECISION" in call[2])
        assert uses_cores == (has_dots and not is_single)
