"""The code in README and documentation runs and gives the stated output."""

import contextlib
import io
import re
from pathlib import Path

import matplotlib as mpl
import pytest

import matfact

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
DOCS = ROOT / "docs"
# Blocks marked ``py`` need what tests have not: a cluster, a GPU, weights of another's.
PAGES = {
    str(page.relative_to(DOCS)): re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for page in sorted(DOCS.rglob("*.md"))
    if "generated" not in page.parts
}


def test_every_example_of_the_readme_shows_its_output():
    assert EXAMPLES
    assert README.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize(("code", "expected"), EXAMPLES)
def test_readme_prints_what_is_shown(code, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == expected


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_examples_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    namespace = {}
    for code in PAGES[page]:
        exec(code, namespace)


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_estimators_named_in_the_readme_are_public():
    named = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert named <= set(matfact.__all__)
    assert {"DoubleSparseFactorizer", "Palm4MSA", "ButterflyFit"} <= named
