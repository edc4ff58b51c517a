"""How a layer is applied if no gradient is needed."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

Inference = Literal["auto", "dense", "factors"]


class InferenceModule(nn.Module):
    """Module with an attribute ``inference``, which may be set at any time."""

    _inference: Inference

    @property
    def inference(self) -> Inference:
        """What eval mode uses: the factors, the cached dense product, or the faster of them."""
        return self._inference

    @inference.setter
    def inference(self, given: Inference) -> None:
        if given not in get_args(Inference):
            raise ValueError(f"inference must be 'auto', 'dense' or 'factors', got {given!r}.")
        self._inference = given


def check_tensor(given: Any) -> None:
    """Raise ``TypeError`` if the input of a layer is no tensor."""
    if not isinstance(given, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(given).__name__}.")
