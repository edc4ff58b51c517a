"""A cache of measurements for each test that asks for it."""

import pytest

from matfact.kernels import measured


@pytest.fixture
def times(tmp_path, monkeypatch):
    """The file of what is measured, in a folder that does not exist yet; nothing is known."""
    monkeypatch.setattr(measured, "_is_busy", lambda: False)
    monkeypatch.setattr(measured, "_cache_folder", lambda: tmp_path / "new")
    measured._known.cache_clear()
    yield measured._file()
    measured._known.cache_clear()
