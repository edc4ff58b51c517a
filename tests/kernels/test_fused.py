"""Numba's disk cache matches the current sources."""

import hashlib
from pathlib import Path

import pytest

from matfact.kernels import fused, gradients, rows

INLINED = {
    fused: (
        "atomics",
        "blocks",
        "coded",
        "csr",
        "gathers",
        "panels",
        "quantized",
        "signs",
        "vectors",
        "words",
    ),
    gradients: ("atomics", "panels", "vectors"),
    rows: ("atomics", "fused", "gathers", "vectors"),
}


@pytest.mark.parametrize("module", INLINED)
def test_compiled_kernels_change_with_their_sources(module):
    folder = Path(module.__file__).parent
    content = b"".join((folder / f"{name}.py").read_bytes() for name in INLINED[module])
    expected = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()[:16]
    assert expected == module.SOURCES, f"set {module.__name__}.SOURCES to {expected!r}"
