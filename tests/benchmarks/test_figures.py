"""Figures of the documentation are drawn from its data files."""

import pytest

from benchmarks import figures


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_point_of_a_figure_is_in_its_data_file(name, tmp_path, monkeypatch):
    panels, draw = [], figures.drawn
    monkeypatch.setattr(
        figures, "drawn", lambda given, **options: panels.extend(given) or draw(given, **options)
    )
    figures.save(figures.FIGURES[name], tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    content = figures.read(figures.IMAGES.parent / "data" / f"{name}.json")
    numbers = {
        value
        for part in content["sets"].values()
        for row in part["rows"]
        for value in row.values()
        if isinstance(value, (int, float))
    }
    assert panels
    for panel in panels:
        assert all(panel.lines.values())
        assert {point[1] for points in panel.lines.values() for point in points} <= numbers
