"""What Numba keeps on disk belongs to the sources it was compiled from."""

import hashlib
from pathlib import Path

from matfact.kernels import fused


def test_compiled_kernels_change_with_their_sources():
    folder = Path(fused.__file__).parent
    content = b"".join(
        (folder / f"{name}.py").read_bytes()
        for name in ("atomics", "blocks", "csr", "panels", "vectors")
    )
    expected = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()[:16]
    assert expected == fused.SOURCES, f"set fused.SOURCES to {expected!r}"
