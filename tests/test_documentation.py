"""The code in README and documentation runs and gives the stated output."""

import contextlib
import importlib
import inspect
import io
import re
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

import matfact
from tests import cupy_double

same_output = OutputChecker().check_output
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
DOCS = ROOT / "docs"
# A block, and what it prints where this is shown. Blocks marked ``py`` need what tests have not: a
# cluster, a GPU, weights of another's, hours.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
EXAMPLES = BLOCK.findall(README)
PAGES = {
    str(page.relative_to(DOCS)): BLOCK.findall(page.read_text())
    for page in sorted(DOCS.rglob("*.md"))
    if "generated" not in page.parts
}


def run(blocks):
    """Run blocks in turn, as a reader does, and compare what they print with what is shown."""
    namespace = {}
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if shown:
            assert same_output(shown, printed.getvalue(), ELLIPSIS), printed.getvalue()


def test_every_example_of_the_readme_shows_its_output():
    assert EXAMPLES
    assert all(shown for _, shown in EXAMPLES)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 120


def test_another_output_than_the_one_shown_is_noticed():
    run([("print(1.23)", "1...\n")])
    with pytest.raises(AssertionError, match="False"):
        run([("print(1.23)", "1.24\n")])


@pytest.mark.parametrize("block", EXAMPLES)
def test_readme_prints_what_is_shown(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run([block])


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_examples_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    run(PAGES[page])


def test_the_example_with_cupy_runs_on_its_stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "how-to" / "gpu.md").read_text()
    (code,) = [
        block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "cupy" in block
    ]
    # Its random numbers: those of the stand-in would be NumPy's.
    code = code.replace("cupy.random.standard_normal((256, 256), dtype=cupy.float32)", "matrix")
    with cupy_double.installed() as cupy:
        matrix = cupy.asarray(np.random.default_rng(0).standard_normal((256, 256), np.float32))
        namespace = {"matrix": matrix}
        exec(code, namespace)
        product = namespace["product"] @ np.ones(256, np.float32)
        np.testing.assert_allclose(product, namespace["y"].get(), rtol=1e-4, atol=1e-4)


def test_version_and_date_agree_in_package_changelog_and_citation():
    version, date = re.search(r"^## ([\d.]+) \((.*)\)$", CHANGELOG, re.MULTILINE).groups()
    assert version == matfact.__version__
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {version}", f"date-released: {date}"} <= set(citation)


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_estimators_named_in_the_readme_are_public():
    named = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert named <= set(matfact.__all__)
    assert {"DoubleSparseFactorizer", "Palm4MSA", "ButterflyFit"} <= named


def test_no_marks_of_sphinx_are_left():
    marks = re.compile(r":(?:class|func|meth|mod|attr|data):`|\[\d\]_|^ *\.\. \[\d\]", re.MULTILINE)
    for folder, suffix in (("matfact", "*.py"), ("benchmarks", "*.py"), ("docs", "*.md")):
        for file in sorted((ROOT / folder).rglob(suffix)):
            assert not marks.search(file.read_text()), file


def test_every_public_name_is_in_the_reference():
    listed = {}
    for page in (DOCS / "api").glob("*/index.md"):
        module = re.search(r"^# .*: `(.*)`$", page.read_text(), re.MULTILINE)[1]
        names = re.findall(r"^- `(\w+)`$", page.read_text(), re.MULTILINE)
        assert len(set(names)) == len(names), page
        listed[importlib.import_module(module)] = names
    objects = {id(getattr(module, name)) for module, names in listed.items() for name in names}

    def public(module):
        if hasattr(module, "__all__"):
            # A module is a page of its own.
            return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
        return [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]

    # Names that a package repeats are where they come from.
    assert [
        f"{module.__name__}.{name}"
        for module in listed
        for name in public(module)
        if id(getattr(module, name)) not in objects
    ] == []
    modules = {getattr(matfact, name) for name in matfact.__all__}
    assert {module for module in modules if inspect.ismodule(module)} <= set(listed)
    assert {matfact, matfact.torch, matfact.transformers} <= set(listed)
