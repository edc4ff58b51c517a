"""Image classifiers, scaled by their width: ``build("lenet")``, ``build("resnet20", width=8)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def build(name: str, *, image_size: int = 28, width: int | None = None) -> nn.Module:
    """Return an untrained network for square grey images and ten classes.

    Parameters
    ----------
    name : {"lenet", "mlp", "vgg", "resnet20", "mobile"}
        Architecture.
    image_size : int, default=28
        Pixels along a side.
    width : int, optional
        Channels of the first convolution, or units of the hidden layers. By default 6, 256, 16,
        16 and 16.
    """
    if name not in _ARCHITECTURES:
        raise ValueError(f"name must be one of {', '.join(_ARCHITECTURES)}, got {name!r}.")
    make, default = _ARCHITECTURES[name]
    return make(image_size, default if width is None else width)


def of_torch(model: Any, form: str) -> Any:
    """Return a copy of a network as torch itself makes it smaller.

    Parameters
    ----------
    model : torch.nn.Module
        A network in float32.
    form : {"bfloat16", "int8", "int8, channels"}
        The dtype of all values, or that of the weights of linear layers with one scale for each of
        them or for each of their outputs, whose inputs are rounded when they come.
    """
    small = copy.deepcopy(model)
    if form == "bfloat16":
        return small.to(torch.bfloat16)
    by_channel = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    how = by_channel if form.endswith("channels") else {nn.Linear}
    return torch.ao.quantization.quantize_dynamic(small, how)


def lenet(image_size: int, width: int) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998), with max pooling and ReLU; small images are padded more."""
    padding = 0 if image_size >= 16 else 2
    side = (image_size // 2 - 4 + 2 * padding) // 2
    wide = width * 16 // 6
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, wide, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(wide * side * side, 20 * width), nn.ReLU(),
        nn.Linear(20 * width, 14 * width), nn.ReLU(), nn.Linear(14 * width, 10),
    )  # fmt: skip


def mlp(image_size: int, width: int) -> nn.Sequential:
    """Six linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for columns in (image_size**2, *[width] * 4):
        layers += [nn.Linear(columns, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def vgg(image_size: int, width: int) -> nn.Sequential:
    """Three pairs of convolutions with batch normalization, and a dense head."""
    layers: list[nn.Module] = []
    columns = 1
    for rows in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [_convolution(columns, rows), nn.BatchNorm2d(rows), nn.ReLU()]
            columns = rows
        layers.append(nn.MaxPool2d(2))
    entries = columns * (image_size // 8) ** 2
    head = (nn.Linear(entries, 16 * width), nn.ReLU(), nn.Linear(16 * width, 10))
    return nn.Sequential(*layers, nn.Flatten(), *head)


class ResidualBlock(nn.Module):
    """Two convolutions whose input is added to their output, padded with zero channels."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.stride = 1 if columns == rows else 2
        self.conv1, self.norm1 = _convolution(columns, rows, self.stride), nn.BatchNorm2d(rows)
        self.conv2, self.norm2 = _convolution(rows, rows), nn.BatchNorm2d(rows)
        self.padding = rows - columns

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = functional.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(out + functional.pad(shortcut, (0, 0, 0, 0, 0, self.padding)))


def resnet20(image_size: int, width: int) -> nn.Sequential:
    """ResNet-20 (He et al. 2016); large images are halved by the first convolution."""
    stem = _convolution(1, width, 2 if image_size >= 16 else 1)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    columns = width
    for rows in (width, 2 * width, 4 * width):
        for _ in range(3):
            layers.append(ResidualBlock(columns, rows))
            columns = rows
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(columns, 10))


class InvertedResidual(nn.Module):
    """A depthwise convolution between two pointwise ones, the first of which widens."""

    def __init__(self, columns: int, rows: int, stride: int = 1, widening: int = 4) -> None:
        super().__init__()
        wide = widening * columns
        self.expand = _normalized(columns, wide, 1)
        self.depthwise = _normalized(wide, wide, 3, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, rows, 1, bias=False), nn.BatchNorm2d(rows))
        self.adds = stride == 1 and columns == rows

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.adds else out


def mobile(image_size: int, width: int) -> nn.Sequential:
    """Return a small MobileNetV2 (Sandler et al. 2018) with a wide head."""
    strides = (2, 2) if image_size >= 16 else (1, 1)
    layers: list[nn.Module] = [_normalized(1, width, 3, strides[0])]
    columns = width
    for rows, stride in ((3, 1), (3, 1), (5, strides[1]), (5, 1), (8, 1), (8, 1)):
        layers.append(InvertedResidual(columns, rows * width // 2, stride))
        columns = rows * width // 2
    head = (_normalized(columns, 20 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *head, nn.Linear(20 * width, 10))


def _normalized(
    columns: int, rows: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(columns, rows, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(rows), nn.ReLU6())


def _convolution(columns: int, rows: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(columns, rows, 3, stride, padding=1, bias=False)


#: Each architecture with its default width.
_ARCHITECTURES: dict[str, tuple[Callable[[int, int], nn.Sequential], int]] = {
    "lenet": (lenet, 6), "mlp": (mlp, 256), "vgg": (vgg, 16), "resnet20": (resnet20, 16),
    "mobile": (mobile, 16),
}  # fmt: skip
