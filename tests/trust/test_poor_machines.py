"""Containers with a numeric user, without a home or a writable folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import matfact

ROOT = Path(__file__).parents[2]
#: Of a matrix, and of a network that writes a folder: code and what it prints.
OF_MATRIX, OF_NETWORK = (
    re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]
    for page in ("docs/getting-started.md", "README.md")
)
NOBODY = 12345  #: the number of no user that has a name or a home


@pytest.fixture(scope="module")
def installation():
    """A copy of the package without compiled code, which nobody but root may write to."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            Path(matfact.__file__).parent,
            Path(folder, "matfact"),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)  # so that it can be removed


@pytest.fixture(scope="module")
def nobody(installation):
    """Return a function that runs Python without a home, as root in the name of no user."""
    if not hasattr(os, "getuid"):
        pytest.skip("needs users with numbers")
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    path = os.pathsep.join([installation, *{sysconfig.get_path(n) for n in ("purelib", "platlib")}])
    environment = {"PATH": os.defpath, "PYTHONPATH": path} | ({} if user else {"HOME": "/dev/null"})

    def run(*arguments, python=None, folder=installation):
        return subprocess.run(
            [python or readable, *arguments], cwd=folder, env=environment, capture_output=True,
            text=True, check=False, **user,
        )  # fmt: skip

    def may_read(python):
        try:
            return python and not run("-c", "import numba, sklearn", python=python).returncode
        except PermissionError:
            return False

    # Root's own Python may lie in root's home, beside one of the system.
    system = shutil.which("python{}.{}".format(*sys.version_info), path=os.defpath)
    readable = next(filter(may_read, (sys.executable, system)), None)
    if readable is None:
        pytest.skip("other users cannot read this Python")
    return run


def test_the_first_example_needs_no_home_and_no_folder(nobody):
    code, expected = OF_MATRIX
    done = nobody("-W", "error", "-c", code)
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ["compare", "--sizes", "64", "--per-size", "1", "--output", "comparison"],
    ["compress", "demo", "compressed", "--layers", r"layer\.0\.attention", "--density", "0.25"],
])  # fmt: skip
def test_the_commands_of_the_readme_need_no_home(nobody, arguments):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        done = nobody("-c", "from matfact.cli import app; app()", *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        assert len(os.listdir(folder)) == 1  # the requested file, and nothing else


@pytest.mark.slow
def test_the_network_of_the_readme_needs_no_home(nobody):
    code, expected = OF_NETWORK
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        done = nobody("-c", code, folder=folder)
        assert (done.stdout, done.returncode) == (expected, 0), done.stderr


def test_a_page_is_written_where_matplotlib_finds_no_folder(tmp_path):
    code = (
        "import sys, tempfile; tempfile.tempdir = '/dev/null'\n"
        "from matfact import compare_projections\n"
        "study = compare_projections({'W': [[1.0, 2.0], [3.0, 5.0]]}, ['magnitude'])\n"
        "study.to_html(sys.argv[1])\n"
        "try:\n"
        "    import matplotlib.figure\n"
        "except OSError:\n"
        "    print('no folder')\n"
    )
    environment = os.environ | {"MPLCONFIGDIR": "/dev/null/none"}
    page = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-c", code, str(page)], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "no folder\n", done.stderr
    assert "<h2>Every fit</h2>" in page.read_text()
    assert "<img" not in page.read_text()
