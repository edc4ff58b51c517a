"""What users are warned of."""


class CompressionWarning(UserWarning):
    """A layer was not compressed as it was asked for."""
