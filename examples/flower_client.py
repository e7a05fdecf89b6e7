"""Client-level privacy for a federated server, on digits: `python examples/flower_client.py`.

The deltas are lists of numpy arrays, as a Flower server or one's own holds them; Flower need not be
installed. `flower_strategy` is the same as a Flower strategy (tried with flwr 1.41.0). Where the
server is not trusted, `privatize_delta` goes into the client before it answers.
"""

from __future__ import annotations

import dp_accounting as dp
import numpy as np
from dp_accounting import rdp
from sklearn.datasets import load_digits

from aadp_kernels import NoiseKey
from aadp_kernels.integrations.clients import mean_of_deltas, privatize_delta

CLIENTS, ROUNDS, DELTA = 100, 20, 1e-3
RNG = np.random.default_rng(0)


def local_delta(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """A client's training: softmax regression, five steps; new weights minus the old."""
    w, b = weights[0].copy(), weights[1].copy()
    for _ in range(5):
        logits = x @ w + b
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        error = (share - np.eye(10, dtype=np.float32)[y]) / len(x)
        w -= 0.5 * x.T @ error
        b -= 0.5 * error.sum(0)
    return [w - weights[0], b - weights[1]]


def flower_strategy(**privacy):
    """FedAvg with `mean_of_deltas`: `flower_strategy(clip_norm=..., ...).start(grid, arrays)`.

    FedAvg's weights by number of examples and the clients' metrics are private: neither is used.
    """
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    class PrivateFedAvg(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            self.names, self.sent = list(arrays), arrays.to_numpy_ndarrays()
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            valid, _ = self._check_and_log_replies(replies, is_train=True)
            answers = [r.content[self.arrayrecord_key].to_numpy_ndarrays() for r in valid]
            deltas = [[a - s for a, s in zip(x, self.sent, strict=True)] for x in answers]
            mean, release = mean_of_deltas(deltas, like=self.sent, round=server_round, **privacy)
            print(f"round {server_round}: {release}")
            new = [Array(s + m) for s, m in zip(self.sent, mean, strict=True)]
            return ArrayRecord(dict(zip(self.names, new, strict=True))), None

    return PrivateFedAvg()


def main() -> float:
    """Twenty rounds with a trusted server, one delta for an untrusted one; the test accuracy."""
    digits = load_digits()
    order = RNG.permutation(len(digits.data))
    x, y = digits.data[order].astype(np.float32) / 16, digits.target[order]
    shards = np.array_split(np.arange(1500), CLIENTS)
    weights = [np.zeros((64, 10), np.float32), np.zeros(10, np.float32)]

    privacy = {
        "clip_norm": 1.0, "noise_multiplier": 5.0, "expected_clients": CLIENTS,
        "adjacency": "zero_out", "key": NoiseKey.random(), "layers": [0, 0],
    }  # fmt: skip
    for server_round in range(ROUNDS):
        deltas = [local_delta(weights, x[rows], y[rows]) for rows in shards]
        mean, release = mean_of_deltas(deltas, round=server_round, **privacy)  # (1)
        weights = [w + 2.0 * d for w, d in zip(weights, mean, strict=True)]

    guess = (x[1500:] @ weights[0] + weights[1]).argmax(1)
    accuracy = float((guess == y[1500:]).mean())
    accountant = rdp.RdpAccountant(range(2, 64))
    accountant.compose(dp.GaussianDpEvent(release.noise_multiplier), ROUNDS)
    print(f"trusted server: test accuracy {accuracy:.3f} after {ROUNDS} rounds, {CLIENTS} clients")
    print(f"epsilon {accountant.get_epsilon(DELTA):.2f} at delta {DELTA:g} for a whole client")
    print(f"each round: {release}")

    noisy, local = privatize_delta(  # (2)
        deltas[0], clip_norm=1.0, noise_multiplier=4.0, adjacency="replace_one",
        key=NoiseKey.random(), round=0, mechanism="laplace", layers=[0, 0],
    )  # fmt: skip
    print(f"untrusted server: one delta of {sum(a.size for a in noisy)} numbers, {local}")
    print(f"epsilon {local.pure_epsilon:.2f} at delta 0 for this client's answer of one round")
    print("assumed: keys stay secret; all clients take part in every round (no amplification)")
    return accuracy


if __name__ == "__main__":
    main()
