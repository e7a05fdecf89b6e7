"""What a sum costs each client, against the definition: how far it can move the sum and votes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from fl_lightning.accounting.exactness import inexact_noise, noise_streams
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.ledger import verify
from fl_lightning.ledger.accounts import Account, Charge, accounts, largest_epsilon
from fl_lightning.ledger.client_reports import undercharged
from fl_lightning.models import MLP
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.values.client_set import encode
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

WEIGHTS, NEEDED = (10.0, 40.0, 20.0, 40.0, 5.0), (2.0, 2.0, 3.0, 5.0, 2.0)
DELTA = 1e-3


def header_of(mechanism: str = "gaussian", votes: float = 0.0) -> dict[str, Any]:
    """As far as accounts need it."""
    everyone = len(WEIGHTS)
    return {
        "setting": "client+aggregator",
        "mechanism": mechanism,
        "delta": [DELTA] * everyone,
        "epsilon": [9.0] * everyone,
        "noise_multiplier": list(NEEDED),
        "vote_share": votes,
        "noise_form": "wide",
        "min_survivors": None,
        "weights": list(WEIGHTS),
        "client_sizes": list(WEIGHTS),
        "dims": [8, 4],
    }


def line(ids: tuple[int, ...], mechanism: str = "gaussian", votes: bool = False) -> Release:
    return Release(
        client=ALL_CLIENTS,
        round=0,
        steps=1,
        mechanism=mechanism,
        noise_multiplier=min(NEEDED[k] for k in ids),
        sampling_rate=1.0,
        adjacency="zero_out",
        vote_noise_scale=1.0 if votes else None,
        num_layers=2,
        clip_norm=(1.0, 1.0),
        shares=(0.5, 0.5),
        binding="",
        digest="",
        largest_weight=max(WEIGHTS[k] for k in ids),
        clients=encode(np.array(ids)),
        spent="",
    )


def by_definition(ids: tuple[int, ...], mechanism: str, votes: float) -> list[float]:
    """Noise over sensitivity: a client of weight w moves the sum by w, and its votes wholly."""
    z, largest, found = min(NEEDED[k] for k in ids), max(WEIGHTS[k] for k in ids), []
    for k in ids:
        asked = WEIGHTS[k] / largest
        if mechanism == "gaussian":
            own = z / math.sqrt(asked**2 * (1 - votes) + votes)
        else:
            own = z / (asked * (1 - votes) + votes)
        found.append(max(own, NEEDED[k]))
    return found


SETS = [(0, 1, 2, 3, 4), (0, 2), (1, 3), (0, 4), (2, 3, 4), (4,)]


@pytest.mark.parametrize(
    ("mechanism", "votes", "ids"), list(product(["gaussian", "laplace"], [0.0, 0.05], SETS))
)
def test_a_clients_multiplier_is_that_of_its_weight(
    mechanism: str, votes: float, ids: tuple[int, ...]
) -> None:
    header, release = header_of(mechanism, votes), line(ids, mechanism, votes > 0)
    wanted = by_definition(ids, mechanism, votes)
    assert client_multipliers(header, release).tolist() == pytest.approx(wanted, rel=1e-9)
    found = accounts(header, [release])
    charged = [event.noise_multiplier for k in ids for event in found[k].counts()]
    assert charged == pytest.approx(wanted, rel=1e-9)
    assert not any(found[k].charges for k in range(len(WEIGHTS)) if k not in ids)


def test_sums_of_unlike_cohorts_are_charged_apart() -> None:
    """The same noise is four times as much for a client of weight 10."""
    found = accounts(header_of(), [line((0, 1)), replace(line((0, 4)), round=1)])
    assert [e.noise_multiplier for e in found[0].counts()] == pytest.approx([8.0, 2.0])
    assert [e.noise_multiplier for e in found[4].counts()] == pytest.approx([4.0])


def exact_epsilon(multiplier: float, steps: int) -> float:
    """ε of a Gaussian sum that was seen several times, in closed form."""
    mu = math.sqrt(steps) / multiplier

    def delta(epsilon: float) -> float:
        over = math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(-epsilon / mu + mu / 2) - over)

    return float(brentq(lambda epsilon: delta(epsilon) - DELTA, 0.0, 100.0))  # pyright: ignore


def test_who_was_in_a_sum_pays_and_nobody_else() -> None:
    pattern = [(0, 1), (0, 1), (1, 3), (0, 1, 2), (0, 1)]
    found = accounts(header_of(), [replace(line(ids), round=r) for r, ids in enumerate(pattern)])
    assert [found[k].releases for k in range(5)] == [4, 5, 1, 1, 0]
    # Client 3 asks for more noise than client 1, which has weight 1 in all of its sums.
    for client, (multiplier, steps) in {1: (2.0, 5), 3: (5.0, 1)}.items():
        wanted = exact_epsilon(multiplier, steps)
        assert found[client].epsilon() == pytest.approx(wanted, rel=1e-3)
    assert found[4].epsilon() == 0.0
    assert largest_epsilon(found) == max(a.epsilon() for a in found.values())


def test_a_line_of_schema_0_costs_everybody_what_it_says() -> None:
    alone = replace(line((0, 1)), largest_weight=None, clients=None, spent=None)
    alone = replace(alone, epsilon_inflation=0.25, tail_delta=1e-4, steps=3)
    found = accounts(header_of(), [alone, replace(alone, round=1)])
    for account in found.values():
        assert account.counts() == {alone.event: 6}
        assert account.on_top() == (0.5, 2e-4)
        mu = math.sqrt(6) / 2.0
        left = account.epsilon() - 0.5
        over = math.exp(left) * norm.cdf(-left / mu - mu / 2)
        assert norm.cdf(-left / mu + mu / 2) - over == pytest.approx(DELTA - 2e-4, rel=1e-2)


def test_the_largest_epsilon_is_that_of_some_client() -> None:
    """Accounts that are left out have no larger ε: each of their measures is the milder one."""
    generator, whole = np.random.default_rng(0), {}
    for client in range(40):
        event = NoiseEvent("gaussian", float(generator.choice([2.0, 3.0, 4.0])))
        charge = Charge(event, int(generator.integers(1, 3)), *on_top(generator), True)
        times = int(generator.integers(1, 12))
        whole[client] = Account(float(generator.choice([1e-5, 1e-3])), {charge: times})
    for some in range(0, 40, 5):
        found = {k: a for k, a in whole.items() if some <= k < some + 5}
        assert largest_epsilon(found) == max(a.epsilon() for a in found.values())


@pytest.mark.parametrize(
    "harsher",
    [{"noise": 1.9}, {"steps": 3}, {"delta": 1e-6}, {"inflation": 0.1}, {"tails": 5e-6}],
    ids=str,
)
def test_no_measure_of_harm_is_overlooked(harsher: dict[str, float]) -> None:
    def account(
        noise: float = 2.0,
        steps: float = 2,
        inflation: float = 0,
        tails: float = 0,
        delta: float = 1e-5,
    ) -> Account:
        event = NoiseEvent("gaussian", noise)
        return Account(delta, {Charge(event, int(steps), inflation, tails, True): 1})

    mild, harsh = account(), account(**harsher)
    assert largest_epsilon({0: mild, 1: harsh}) == harsh.epsilon() > mild.epsilon()


def on_top(generator: np.random.Generator) -> tuple[float, float]:
    return float(generator.choice([0.0, 0.1])), float(generator.choice([0.0, 5e-7]))


@pytest.mark.parametrize("first", [0, 1])
def test_a_sum_states_what_its_costliest_client_pays_for_inexact_noise(first: int) -> None:
    header, ids = header_of(), (0, 1, 2, 3)
    header["delta"] = [(1e-3, 1e-5)[(k + first) % 2] for k in range(5)]
    release, streams = line(ids), noise_streams([8, 4], votes=False)
    costs = [
        inexact_noise(NoiseEvent("gaussian", z), "wide", streams=streams, delta=header["delta"][k])
        for k, z in enumerate(by_definition(ids, "gaussian", 0.0))
    ]
    largest = max(cost.delta for cost in costs)
    assert 0 < min(cost.delta for cost in costs) < 0.5 * largest
    assert undercharged(header, [replace(release, tail_delta=largest)]) == []
    assert undercharged(header, [replace(release, tail_delta=(1 - 1e-6) * largest)])


@pytest.mark.parametrize("form", ["wide", "grid"])
def test_cohorts_of_unequal_clients_are_charged_by_their_own_largest(
    federation: Any, fit: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, added = NoisedSum.add, []

    def seen(self: NoisedSum, update: Any, clients: torch.Tensor, weights: torch.Tensor) -> None:
        added.extend(zip(clients.tolist(), weights.tolist(), strict=True))
        add(self, update, clients, weights)

    monkeypatch.setattr(NoisedSum, "add", seen)
    data = federation(80, clients=6, partition="quantity", alpha=0.5, min_client_size=4)
    torch.manual_seed(0)
    module = fit(
        data, MLP(8, 3, hidden=(4,)), rounds=6, setting="client+aggregator", noise_multiplier=2.0,
        delta=0.01, cohort_sampling="fixed", noise_form=form, thresholds="fixed",
        module_kwargs={"clients_per_round": 2, "weighting": "records"},
    )  # fmt: skip
    ledger, sizes = module.ledger, data.client_sizes.numpy().astype(float)
    times, largest, charged = np.zeros(6, dtype=np.int64), [], []
    for release in ledger:
        ids = release.members(6)
        assert len(ids) == 2
        times[ids] += 1
        largest.append(sizes[ids].max())
        own = client_multipliers(ledger.header, release)
        charged += zip(ids.tolist(), (2.0 / own).tolist(), strict=True)
        assert own.tolist() == pytest.approx((2.0 * largest[-1] / sizes[ids]).tolist())
    assert [release.largest_weight for release in ledger] == largest
    assert len(set(largest)) > 1
    # The dry round before the first one charges nobody.
    weighed = added[-len(charged) :]
    assert np.array(sorted(weighed)) == pytest.approx(np.array(sorted(charged)))
    assert module.run.budget.spent.tolist() == times.tolist()
    found = accounts(ledger.header, ledger.releases)
    assert [found[k].releases for k in range(6)] == times.tolist()
    assert verify(module.run_path) == []
