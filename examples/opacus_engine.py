"""An Opacus script with one line changed, on digits: `python examples/opacus_engine.py`.

Needs `pip install 'aadp-fl[opacus]'`. The changed line is the import of PrivacyEngine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aadp_kernels.integrations.opacus import PrivacyEngine  # was: from opacus import PrivacyEngine

EPOCHS, DELTA = 12, 1e-5


def train(engine: PrivacyEngine, noise_multiplier: float, learning_rate: float) -> float:
    """The script: a network, an optimizer, a loader, make_private, a loop. The test accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=150)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        clipping="per_layer",
    )
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return (model(x[1500:]).argmax(1) == y[1500:]).double().mean().item()


def main() -> float:
    """Gaussian noise with Opacus' accountant, then Laplace noise with ours."""
    engine = PrivacyEngine()
    accuracy = train(engine, noise_multiplier=1.5, learning_rate=3.0)
    print(f"gaussian, L2 clips, accountant {engine.accountant.mechanism()}: {accuracy:.3f}")
    print(f"epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA:g}")

    pure = PrivacyEngine(mechanism="laplace")
    weak = train(pure, noise_multiplier=3.0, learning_rate=0.3)
    print(f"laplace, L1 clips, accountant {pure.accountant.mechanism()}: {weak:.3f}")
    print(f"epsilon {pure.get_epsilon(DELTA):.2f} at delta {DELTA:g}")
    print(f"epsilon {pure.get_epsilon(0):.2f} at delta 0")
    print("unit record, adjacency add or remove one, Poisson sampling, real arithmetic;")
    print("assumed: the key of the noise and of the coins stays secret; Laplace noise is for")
    print("delta 0 and few parameters, and costs accuracy in a network")
    return accuracy


if __name__ == "__main__":
    main()
