"""Reproducible training of image classifiers, cached in files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.data import load
from benchmarks.networks.models import build
from matfact.torch import fine_tune

Batches = list[tuple[Tensor, Tensor]]


def trained(name: str, dataset: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a trained network in eval mode, possibly from the cache.

    Parameters
    ----------
    name : {"lenet", "mlp", "vgg", "resnet20", "mobile"}
        Architecture.
    dataset : {"digits", "mnist", "fashion-mnist"}
        Training data.
    seed : int, default=0
        Seed of the initial values and the order of batches.
    **changes
        Changes of the default recipe: ``width`` of the network, ``n_images`` (train on the first
        ones), and parameters of `train`.
    """
    images, labels, _, _ = load(dataset)
    image_size = images.shape[-1]
    recipe = {"model": name, "data": dataset, "seed": seed, **_recipe(len(images)), **changes}
    width = recipe.pop("width", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, image_size=image_size, width=width)
    model.to(memory_format=torch.channels_last)
    parts = (name, width, dataset, changes.get("n_images"), seed)
    label = "-".join(str(part) for part in parts if part is not None)

    def fit(network: nn.Module) -> None:
        options = {k: v for k, v in recipe.items() if k not in ("model", "data", "n_images")}
        n_images = recipe.get("n_images")
        train(network, images[:n_images], labels[:n_images], **options)

    return kept(model, label, recipe, fit)


def kept(
    model: nn.Module, label: str, recipe: dict[str, Any], fit: Callable[[nn.Module], Any]
) -> nn.Module:
    """Return `model` in eval mode, trained by `fit` or loaded from the cache entry `label`.

    Files are cached in the folder given by the environment variable ``MATFACT_CACHE``
    (build/checkpoints), and replaced if the recipe differs.
    """
    path = Path(os.environ.get("MATFACT_CACHE", "build/checkpoints")) / f"{label}.safetensors"
    key = json.dumps(recipe, sort_keys=True)
    if _kept_recipe(path) != key:
        fit(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, partial, metadata={"recipe": key})
        partial.replace(path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _recipe(n_images: int) -> dict[str, Any]:
    """Return the parameters of `train` for a number of images: more epochs for small sets."""
    return {"epochs": 3 if n_images > 10_000 else 12 if n_images > 2_000 else 30}


def _kept_recipe(path: Path) -> str | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("recipe")


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    epochs: int = 6,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    last: float = 0.0,
) -> nn.Module:
    """Minimize the cross-entropy by SGD.

    The learning rate falls linearly to `last` times its initial value.
    """
    shuffled = Shuffled(images, labels, batch_size, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, epochs * len(shuffled))
    fine_tune(model, shuffled, cross_entropy, optimizer=optimizer, schedule=schedule, epochs=epochs)
    return model.eval()


class Shuffled:
    """Batches in a new order in each iteration, determined by the seed."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int) -> None:
        # Convolutions on the CPU are several times as fast where channels come last.
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels, self.size = labels, size
        self.order = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.images), generator=self.order).split(self.size):
            yield self.images[chosen], self.labels[chosen]


def cross_entropy(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(output, batch[1])


def batches(images: Tensor, labels: Tensor, size: int = 256) -> Batches:
    """Return pairs of images and labels, in order."""
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of `model`, put in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(images, labels))
    return right / len(images)
