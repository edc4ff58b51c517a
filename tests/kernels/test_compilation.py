"""Compiled kernels are cached if possible, and work without a cache."""

import importlib.util
from pathlib import Path

import pytest

import matfact

SOURCE = """
from matfact.kernels.compilation import compiled

@compiled()
def twice(x):
    return 2 * x
"""


@pytest.fixture
def twice(tmp_path):
    """Return a function that compiles one as a process would that starts now."""
    file = tmp_path / "module" / "kernel.py"
    file.parent.mkdir()
    file.write_text(SOURCE)

    def start():
        spec = importlib.util.spec_from_file_location("kernel", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.twice

    return start


def forbid_cache_beside(tmp_path):
    (tmp_path / "module" / "__pycache__").write_text("a file, where not even root makes a folder")


def stored(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in (".nbi", ".nbc"))


def hits(kernel):
    return sum(kernel.stats.cache_hits.values())


def test_compiled_code_is_kept_beside_the_source(twice, tmp_path):
    assert twice()(2.0) == 4.0
    assert len(stored(tmp_path)) == 2
    again = twice()
    assert again(2.0) == 4.0
    assert hits(again) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HOME", "/dev/null"),
        ("HOME", "relative"),
        ("HOME", None),
        ("XDG_CACHE_HOME", "relative"),
        ("XDG_CACHE_HOME", ""),
    ],
)
def test_kernels_need_no_folder_to_be_kept_in(twice, tmp_path, monkeypatch, variable, value):
    forbid_cache_beside(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    if value is None:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a number without a name
    else:
        monkeypatch.setenv(variable, value)
    assert twice()(2.0) == 4.0
    assert not list((tmp_path / "here").iterdir())


def test_a_folder_that_is_asked_for_is_used_where_there_is_no_home(twice, tmp_path, monkeypatch):
    forbid_cache_beside(tmp_path)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "asked"))
    assert twice()(2.0) == 4.0
    assert len(stored(tmp_path / "asked")) == 2


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder"])
def test_a_damaged_cache_costs_time_alone(twice, tmp_path, kind, damage):
    twice()(2.0)
    (file,) = [path for path in stored(tmp_path) if path.suffix == kind]
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "text": b"text\n"}[damage]
        )
    assert twice()(2.0) == 4.0
    again = twice()
    assert again(2.0) == 4.0
    assert hits(again) == (damage != "folder")  # which is left to those who made it


def test_a_cache_that_vanishes_or_fills_up_costs_time_alone(twice, tmp_path, monkeypatch):
    kernel = twice()

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_index", full)
    assert kernel(2.0) == 4.0
    assert not stored(tmp_path)


def test_no_kernel_is_kept_in_another_way():
    package = Path(matfact.__file__).parent
    assert not [path for path in package.rglob("*.py") if "cache=True" in path.read_text("utf-8")]
