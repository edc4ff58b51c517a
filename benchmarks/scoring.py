"""Scores of singular triples: all at once compared with a forward pass each (Liu et al.).

A small convolutional network trained on scikit-learn's digits shows how well the fast scores rank
the triples; an untrained network of the size of VGG16 shows how much faster they are. Exact scores
of the latter are timed on a few triples and extrapolated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from benchmarks import machine
from matfact.allocation import relative_error_scores
from matfact.torch import exact_triple_scores, triple_scores

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
STATISTICS = ("perturbation", "variance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--samples", type=int, default=256, help="inputs of the network for digits")
    add("--images", type=int, default=16, help="inputs of the VGG16-sized network")
    add("--timed", type=int, default=10, help="number of exact scores to time")
    add("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    with machine.threads(options.threads):
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        result = {
            "conditions": machine.describe(options.threads),
            "agreement": agreement(options.samples),
            "seconds": speed(options.images, options.timed),
        }
    for title in ("agreement", "seconds"):
        print(title)
        for key, value in result[title].items():
            print(f"  {key}: {value:.4g}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scoring.json").write_text(json.dumps(result, indent=1, default=str))
    return 0


def agreement(n_samples: int) -> dict[str, float]:
    """Return Spearman's correlation of each score with the exact one, on a trained network."""
    data = load_digits()
    X = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    model = digits_network()
    accuracy = train(model, X, torch.tensor(data.target))
    spectra = [np.linalg.svdvals(matrix(layer)) for layer in model.modules() if has_matrix(layer)]
    relative = [relative_error_scores([s], s[0])[0] for s in spectra]
    result = {"accuracy": accuracy, "triples": sum(map(len, spectra))}
    for statistic in STATISTICS:
        exact = flat(exact_triple_scores(model, [X[:n_samples]], statistic=statistic))
        fast = flat(triple_scores(model, [X[:n_samples]], statistic=statistic))
        result[f"fast, {statistic}"] = spearmanr(fast, exact)[0]
        result[f"relative error, {statistic}"] = spearmanr(np.concatenate(relative), exact)[0]
        result[f"magnitude, {statistic}"] = spearmanr(np.concatenate(spectra), exact)[0]
    return result


def speed(n_images: int, n_timed: int) -> dict[str, float]:
    """Return the seconds that both scores take on a network of VGG16's size."""
    model = vgg16().eval()
    X = torch.randn(n_images, 3, 32, 32)
    with torch.no_grad():
        model(X)
        start = time.perf_counter()
        for _ in range(n_timed):
            model(X)
        forward = (time.perf_counter() - start) / n_timed
    start = time.perf_counter()
    scores = triple_scores(model, [X])
    fast = time.perf_counter() - start
    exact = forward * len(flat(scores))
    return {
        "triples": len(flat(scores)),
        "a forward pass": forward,
        "a forward pass for each triple": exact,
        "fast, with the decompositions": fast,
        "ratio": fast / exact,
    }


def digits_network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs > 1 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def vgg16() -> nn.Sequential:
    """Return VGG16 for images of 32×32, with batch normalization."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in VGG16:
        if outputs == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def train(model: nn.Module, X: torch.Tensor, y: torch.Tensor, n_train: int = 1500) -> float:
    """Train on the first images; return the accuracy on the rest."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(30):
        for rows in torch.randperm(n_train).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(X[n_train:]).argmax(1) == y[n_train:]).float().mean())


def has_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv2d))


def matrix(layer: Any) -> np.ndarray:
    return layer.weight.detach().flatten(1).numpy()


def flat(scores: dict[str, list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([block for blocks in scores.values() for block in blocks])
