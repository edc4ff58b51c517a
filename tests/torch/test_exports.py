"""The public names of `matfact.torch` exist."""

import pytest

pytest.importorskip("torch")
import matfact.torch


def test_every_public_name_can_be_imported():
    assert all(getattr(matfact.torch, name) is not None for name in matfact.torch.__all__)
    assert set(matfact.torch.__all__) <= set(dir(matfact.torch))


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="attribute prune_everything"):
        matfact.torch.prune_everything  # noqa: B018
