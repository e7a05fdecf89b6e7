"""DP-SGD in a plain PyTorch loop on scikit-learn's digits: `python examples/plain_loop.py`.

Three lines are private: `with_clipping`, `PrivateOptimizer` and `PoissonBatches`.
"""

from __future__ import annotations

import dp_accounting as dp
import torch
import torch.nn.functional as F
from dp_accounting import rdp
from sklearn.datasets import load_digits
from torch import nn

from aadp_kernels import NoiseKey, with_clipping
from aadp_kernels.integrations.optim import PoissonBatches, PrivateOptimizer

RATE, STEPS, DELTA = 0.1, 150, 1e-5


def main() -> float:
    """Train, print what is claimed, and return the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    x, y, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip

    key = NoiseKey.random()
    model = with_clipping(net, p=2)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.5),
        model,
        clip_norm=1.0,
        noise_multiplier=2.0,
        expected_batch_size=RATE * len(x),
        key=key,
    )
    for rows in PoissonBatches(len(x), rate=RATE, steps=STEPS, key=key):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        optimizer.step()

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).double().mean().item()
    release = optimizer.release(poisson_rate=RATE)
    event = dp.PoissonSampledDpEvent(RATE, dp.GaussianDpEvent(release.noise_multiplier))
    accountant = rdp.RdpAccountant(range(2, 64))
    accountant.compose(dp.SelfComposedDpEvent(event, optimizer.steps_taken))
    print(f"test accuracy {accuracy:.3f} after {optimizer.steps_taken} steps")
    print(f"epsilon {accountant.get_epsilon(DELTA):.2f} at delta {DELTA:g}")
    print(f"each step: {release}")
    print("assumed: the key stays secret; only the weights are published, at any step")
    return accuracy


if __name__ == "__main__":
    main()
