"""Small networks trained on scikit-learn's digits."""

import copy

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


class Digits:
    """Images of 8×8 in batches, and the accuracy of a network on held-out ones."""

    def __init__(self):
        X, y = load_digits(return_X_y=True)
        X = (X / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
        split = train_test_split(X, y, test_size=0.25, random_state=0, stratify=y)
        train_x, self.test_x, train_y, self.test_y = map(torch.tensor, split)
        self.batches = list(zip(train_x.split(128), train_y.split(128), strict=True))

    def accuracy(self, model):
        with torch.no_grad():
            predicted = model.eval()(self.test_x).argmax(1)
        return float((predicted == self.test_y).float().mean())


def cross_entropy(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def _trained(make, digits, epochs):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in digits.batches:
            optimizer.zero_grad()
            cross_entropy(model(batch[0]), batch).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def digits():
    return Digits()


@pytest.fixture(scope="session")
def _mlp(digits):
    def make():
        layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    return _trained(make, digits, epochs=15)


@pytest.fixture(scope="session")
def _cnn(digits):
    def make():
        first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        second = (nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(288, 10))

    return _trained(make, digits, epochs=3)


@pytest.fixture
def mlp(_mlp):
    return copy.deepcopy(_mlp)


@pytest.fixture
def cnn(_cnn):
    return copy.deepcopy(_cnn)
