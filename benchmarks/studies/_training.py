"""Training of image classifiers with any layers, for the studies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.data import Data, load


def subset(name: str, side: int, n_train: int, n_test: int) -> Data:
    """Return a fixed subset of the images of a data set, averaged to `side`×`side` pixels."""
    train_x, train_y, test_x, test_y = load(name)
    order = torch.Generator().manual_seed(0)
    train = torch.randperm(len(train_x), generator=order)[:n_train]
    test = torch.randperm(len(test_x), generator=order)[:n_test]
    train_x, test_x = (
        functional.adaptive_avg_pool2d(x, side) for x in (train_x[train], test_x[test])
    )
    return train_x, train_y[train], test_x, test_y[test]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of logits for a batch of images and labels."""
    return functional.cross_entropy(output, batch[1])


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    after_step: Callable[[], Any] = lambda: None,
) -> nn.Module:
    """Minimize the cross-entropy by Adam with a learning rate that falls linearly to zero."""
    model.train()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    n_steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, n_steps))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss(model(images[chosen]), (images[chosen], labels[chosen])).backward()
            optimizer.step()
            schedule.step()
            after_step()
    return model.eval()


def n_weights(model: nn.Module) -> int:
    """Return the number of nonzero weights or values of factors, without biases and norms."""
    return sum(
        int(parameter.count_nonzero())
        for module in model.modules()
        if not isinstance(module, nn.BatchNorm2d)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias"
    )
