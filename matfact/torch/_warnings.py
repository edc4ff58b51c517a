"""Warnings."""


class CompressionWarning(UserWarning):
    """A layer was not compressed as requested."""
