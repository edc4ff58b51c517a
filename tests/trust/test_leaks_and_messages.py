"""Fits leak no memory and print nothing; they only use warnings."""

import ast
import gc
import logging
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

import matfact
from matfact.checkpoint import compress
from tests.conformance.estimators import FACTORIZERS

PACKAGE = Path(matfact.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
W = np.random.RandomState(0).standard_normal((20, 20))


def fit_many(name, count):
    for _ in range(count):
        model = clone(FACTORIZERS[name]).fit(W)
        model.operator_ @ W
        del model


@pytest.mark.parametrize("name", [name for name in FACTORIZERS if "-" not in name])
def test_fits_do_not_keep_a_matrix_each(name):
    fit_many(name, 4)  # what is compiled and cached
    tracemalloc.start()
    try:
        fit_many(name, 1)
        before = tracemalloc.get_traced_memory()[0]
        fit_many(name, 20)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # NumPy keeps some kilobytes of small blocks for arrays to come; a leak keeps the matrix.
    assert kept < 20 * W.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORIZERS)
def test_a_thousand_fits_do_not_grow_the_process(name):
    psutil = pytest.importorskip("psutil")
    fit_many(name, 100)
    gc.collect()
    before = psutil.Process().memory_info().rss
    fit_many(name, 1000)
    gc.collect()
    # Of each fit no more than a third of a matrix.
    assert psutil.Process().memory_info().rss - before < 1 << 20


@pytest.mark.parametrize("name", FACTORIZERS)
def test_fits_print_nothing_and_warn_only_of_convergence(name, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for matrix in (W, np.zeros((8, 8)), np.ones((1, 9)), np.sign(W)):
            clone(FACTORIZERS[name]).fit(matrix)
    assert {warning.category for warning in caught} <= {ConvergenceWarning}
    assert capfd.readouterr() == ("", "")


def test_progress_can_be_read_in_the_log(tmp_path, caplog, capfd):
    save_file({"a.weight": W, "b": W[0]}, tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO, "matfact"):
        compress(tmp_path / "m.safetensors", tmp_path / "out", matfact.MagnitudePruner())
        matfact.compare_projections({"W": W}, ["magnitude"])
    said = [record.getMessage() for record in caplog.records]
    expected = ("00000", "00001", "of W: ok")
    assert all(part in text for part, text in zip(expected, said, strict=True))
    assert capfd.readouterr() == ("", "")


def calls(path):
    """Yield the name of each function called in a file, and the call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_but_the_command_line_prints():
    named = {"print", "sys.stdout.write", "sys.stderr.write", "pprint"}
    printing = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in SOURCES
        if "cli" not in path.parts
        for name, node in calls(path)
        if name in named
    ]
    assert printing == []


def test_every_warning_has_a_class_of_its_own():
    plain = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in SOURCES
        for name, node in calls(path)
        if name == "warnings.warn"
        and (len(node.args) < 2 or not ast.unparse(node.args[1]).endswith("Warning"))
    ]
    assert plain == []
