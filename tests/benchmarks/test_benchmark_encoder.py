"""Measures of the sentence transformer benchmark."""

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.networks import encoder


def test_embeddings_agree_with_themselves_and_with_rotations_of_themselves():
    rng = np.random.default_rng(0)
    E = rng.standard_normal((30, 8))
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    for other in (E, E @ rotation):
        found = encoder.retrieval(E, other)
        assert found == pytest.approx({"rank_correlation": 1.0, "top10": 1.0, "top1": 1.0})


def test_unrelated_embeddings_agree_by_chance():
    rng = np.random.default_rng(1)
    found = encoder.retrieval(rng.standard_normal((60, 8)), rng.standard_normal((60, 8)))
    assert abs(found["rank_correlation"]) < 0.1  # 60 correlations of 59 values: ± 0.02
    assert abs(found["top10"] - 10 / 59) < 0.1


def test_excerpts_hold_sentences_to_calibrate_and_others_to_test():
    calibration, test = (
        encoder.sentences(encoder.EXCERPTS, name)
        for name in ("northanger-abbey", "pride-and-prejudice")
    )
    assert min(len(calibration), len(test)) >= 20
    assert not set(calibration) & set(test)
    assert all(40 <= len(sentence) <= 300 for sentence in calibration + test)
    assert encoder.spread(calibration, 5) == [
        calibration[i * len(calibration) // 5] for i in range(5)
    ]


def test_cells_of_the_full_form_cover_the_table():
    cells = list(encoder.cells(quick=False))
    full = {(cell["method"], cell["density"]) for cell in cells if cell["form"] == "full"}
    assert full == {(m, d) for m in encoder.METHODS for d in (0.5, 0.4, 0.3, 0.25, 0.1)}
    assert len({str(cell) for cell in cells}) == len(cells)
