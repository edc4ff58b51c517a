"""
Accuracy against FLOPs
======================

A small network is trained on scikit-learn's digits. Its hidden layers are then compressed with
calibration images, without further training.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from matfact.torch import compress

X, y = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(X / 16, y, random_state=0)
X, X_test = (torch.tensor(part, dtype=torch.float32) for part in (X, X_test))
y, y_test = torch.tensor(y), torch.tensor(y_test)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), y).backward()
    optimizer.step()


def accuracy(network):
    """Return the share of test images that are classified correctly."""
    with torch.no_grad():
        return (network(X_test).argmax(1) == y_test).float().mean().item()


figure, axes = plt.subplots(layout="constrained")
for method, label in {"dsf": "double sparse", "magnitude": "magnitude pruning"}.items():
    shares, scores = [], []
    for density in [0.05, 0.1, 0.2, 0.3, 0.5]:
        small, report = compress(
            model, method, density=density, layers=["0", "2"], calibration=[X[:500]]
        )
        shares.append(sum(r.flops for r in report) / sum(r.dense_flops for r in report))
        scores.append(accuracy(small))
    axes.plot(shares, scores)
    axes.annotate(label, (shares[0], scores[0]), (8, -3), textcoords="offset points")
axes.axhline(accuracy(model), color="gray", linestyle="--")
axes.annotate("dense", (0.15, accuracy(model)), (0, -13), textcoords="offset points")
axes.set(xlabel="FLOPs ÷ dense, hidden layers", ylabel="test accuracy, not fine-tuned")
plt.show()
