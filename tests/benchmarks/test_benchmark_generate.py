"""The benchmark of whole networks runs at tiny size, and measures each form against dense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# The benchmarks are not installed with the library.
from benchmarks import generate  # noqa: E402
from benchmarks.networks import models  # noqa: E402
from matfact.torch import FactorizedConv  # noqa: E402

ROOT = Path(__file__).parents[2]
FORMS = ("dense bfloat16", "0.5 32 bits", "0.25 16 bits", "0.25 8 bits")


def test_each_form_is_measured_against_dense(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "generate", "--quick", "--forms", *FORMS]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    measured = {(row["form"], row["phase"]) for row in rows}
    names = ("dense 32 bits", *FORMS)
    assert measured == {(form, phase) for form in names for phase in ("prompt", "decoding")}
    assert all(row["speedup"] == row["best"] == 1 for row in rows if row["form"] == names[0])
    table = (tmp_path / "generate.md").read_text()
    assert all(f"| {form} | " in table for form in names)


@pytest.mark.parametrize("density", generate.DENSITIES)
def test_forms_store_what_they_say_and_leave_the_dense_network_alone(density):
    dense = models.build("resnet20", width=4)
    before = [p.clone() for p in dense.parameters()]
    for bits, dtype in ((32, torch.float32), (16, torch.bfloat16)):
        small = generate.built("resnet20", dense, f"{density} {bits} bits")
        kernels = [m for m in small.modules() if isinstance(m, FactorizedConv)]
        products = [kernel for m in kernels for kernel in m.kernels]
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert len(kernels) == 18
        for product in products:
            size = product.out_features * product.in_features
            stored = sum(factor.n_values for factor in product.factors)
            assert stored == pytest.approx(density * size, abs=2)
    assert all(torch.equal(p, b) for p, b in zip(dense.parameters(), before, strict=True))
