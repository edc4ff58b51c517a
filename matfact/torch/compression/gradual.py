"""Gradual compression, with training in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from matfact import metrics
from matfact.torch.compression._compress import Compressed, compress
from matfact.torch.compression._tasks import Method
from matfact.torch.layers._matricized import is_linear
from matfact.torch.running._tensors import outside_inference_mode
from matfact.torch.training._loop import check_finite


def cubic_densities(density: float, n_stages: int, initial: float = 1.0) -> list[float]:
    """Return densities that fall along a cubic schedule: fast at first, slowly at the end.

    Source: M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", ICLR workshop 2018, equation 1.

    Parameters
    ----------
    density : float
        Final density.
    n_stages : int
        Number of densities.
    initial : float, default=1.0
        Density before the first stage.

    Examples
    --------
    >>> from matfact.torch import cubic_densities
    >>> [round(density, 3) for density in cubic_densities(0.2, 4)]
    [0.538, 0.3, 0.213, 0.2]
    """
    metrics.check_density(density)
    if n_stages < 1:
        raise ValueError(f"n_stages must be at least 1, got {n_stages}.")
    remaining = [1 - stage / n_stages for stage in range(1, n_stages + 1)]
    return [density + (initial - density) * share**3 for share in remaining]


@outside_inference_mode
def compress_gradually(
    model: nn.Module,
    method: Method = "dsf",
    *,
    density: float,
    train: Callable[[nn.Module, int], Any],
    n_stages: int = 4,
    initial_density: float = 1.0,
    inplace: bool = False,
    **options: Any,
) -> Compressed:
    """Compress to decreasing densities, and train after each stage.

    Every stage factorizes the trained weights again, so supports follow the training. With
    ``method="magnitude"`` this is gradual magnitude pruning; any factorizer can be used.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    method : str or BaseFactorizer, default="dsf"
        As in `compress`.
    density : float
        Final density of each layer.
    train : callable
        Called with the network and the stage, from 0; trains in place. Each stage has new
        parameters and needs a new optimizer.
    n_stages : int, default=4
        Number of compressions.
    initial_density : float, default=1.0
        Density before the first stage, see `cubic_densities`.
    inplace : bool, default=False
        Whether to change `model` instead of a copy.
    **options
        Further parameters of `compress`, except `resume_folder`.

    Returns
    -------
    model : torch.nn.Module
        The network after the last training.
    report : CompressionReport
        Report of the last stage, compared with the layers before that stage.

    Raises
    ------
    ValueError
        If a parameter is infinite or NaN after training, or `resume_folder` is given.
    """
    if options.get("resume_folder") is not None:
        raise ValueError(
            "resume_folder must be None here, since the training between stages is not stored: "
            "call compress for each stage, with a folder for each."
        )
    for stage, stage_density in enumerate(cubic_densities(density, n_stages, initial_density)):
        in_place = inplace or (stage > 0 and not is_linear(model))
        model, report = compress(model, method, density=stage_density, inplace=in_place, **options)
        train(model, stage)
        check_finite(model, f"after stage {stage}")
    return Compressed(model, report)
