"""Re-estimation of batch-normalization statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from matfact.torch.running._batches import checked, eval_mode, forward


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimate the statistics of all batch normalizations as averages over `batches`.

    All other layers run in eval mode and do not change.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place.
    batches : iterable
        Tensors, tuples (labels after the inputs are ignored) or mappings.

    Returns
    -------
    int
        Number of re-estimated layers. If a batch fails, the old statistics are restored.
    """
    norms: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    with eval_mode(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        try:
            for batch in checked(batches):
                forward(model, batch)
        except BaseException:
            for norm, buffers in zip(norms, before, strict=True):
                for buffer, old in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(old)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return len(norms)
