"""Clip norms and shares are functions of releases alone: votes, histories and their checkpoints."""

import math

import numpy as np
import pytest
import torch

from fl_lightning import PrivacyConfig
from fl_lightning.models import MLP
from fl_lightning.privacy.thresholds import quantile_step
from tests.fl_lightning.policy_values import MECHANISMS, history, tensor

# Votes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_votes_lead_to_the_quantile(quantile):
    rng = np.random.default_rng(0)
    scale, batch = np.array([3.0, 0.02]), 200
    first = tensor([[0.1, 0.1]])
    tracked, late = first.clone(), []
    for step in range(400):
        norms = rng.lognormal(size=(batch, 2)) * scale
        votes = (norms <= tracked.numpy()).sum(0) - batch / 2 + rng.normal(size=2) * 5
        tracked = quantile_step(
            tracked, torch.from_numpy(votes)[None], tensor([float(batch)]),
            quantile=quantile, lr=0.2, initial=first,
        )  # fmt: skip
        if step >= 200:
            late.append(tracked.log())
    got = torch.stack(late).mean(0)[0].exp().numpy()
    want = scale * np.exp({0.5: 0.0, 0.8: 0.8416}[quantile])
    np.testing.assert_allclose(got, want, rtol=0.05)


def test_one_vote_moves_by_the_formula_and_noise_cannot_move_it_further():
    first = tensor([[1.0, 2.0]])

    def step(votes, batch=10.0, tracked=first):
        return quantile_step(
            tracked, tensor([votes]), tensor([batch]), quantile=0.5, lr=0.2, initial=first
        )

    torch.testing.assert_close(step([2.0, -3.0]), first * tensor([-0.04, 0.06]).exp())
    torch.testing.assert_close(step([1e9, -1e9]), first * tensor([-0.1, 0.1]).exp())
    far = first * tensor([1e-6, 1e6])
    torch.testing.assert_close(step([5.0, -5.0], tracked=far), far)


def moved_history(**kwargs):
    past = history(**kwargs)
    ids = torch.tensor([2, 0])
    for i in range(3):
        past.observe_release(ids, tensor([[1.0 + i, 2.0], [0.5, 3.0]]), tensor([[0.1] * 2] * 2))
        past.observe_clip_norms(ids, tensor([[0.6, 0.7], [0.5, 0.6]]))
    return past


def policy_values(past, ids):
    return [
        v for v in vars(past.policy(ids, torch.ones(len(ids)).double())).values() if v is not None
    ]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_state_dict_restores_the_policy_exactly(mechanism):
    past = moved_history(mechanism=mechanism, setting="client+local")
    state = past.state_dict()
    again = history(mechanism=mechanism, setting="client+local")
    again.load_state_dict(state)
    everyone = torch.arange(4)
    before = policy_values(past, everyone)
    for a, b in zip(before, policy_values(again, everyone), strict=True):
        assert torch.equal(a, b)
    past.observe_norms(everyone, torch.ones(4, 2).double())
    for a, b in zip(before, policy_values(again, everyone), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="number of clients or layers changed"):
        history(clients=5).load_state_dict(state)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_a_checkpoint_holds_the_clients_with_a_history_alone(mechanism, setting):
    past = history(mechanism=mechanism, setting=setting, clients=1000)
    assert past.checkpoint()["l1_norm"].shape[0] == 0
    ids = torch.tensor([3, 700])
    past.observe_votes(ids[:1], torch.ones(1, 2).double(), torch.ones(1))
    past.observe_norms(ids[1:], torch.full((1, 2), 7.0).double())
    past.observe_clip_norms(torch.tensor([5]), torch.full((1, 2), 0.3).double())
    kept = past.checkpoint()
    assert kept["clients"].tolist() == [3, 5, 700]
    assert sum(value.numel() for value in kept.values()) < 100
    again = history(mechanism=mechanism, setting=setting, clients=1000)
    again.observe_norms(torch.tensor([8]), torch.ones(1, 2).double())
    again.load_checkpoint(kept)
    for name, value in past.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match="number of clients or layers changed"):
        history(mechanism=mechanism, setting=setting, clients=999).load_checkpoint(kept)


def test_restore_takes_back_a_release_of_some_clients():
    past = moved_history()
    ids = torch.tensor([2, 3])
    rows, whole = past.rows(ids), past.state_dict()
    past.observe_votes(torch.arange(4), torch.ones(4, 2).double(), torch.ones(4))
    past.observe_norms(ids, torch.ones(2, 2).double())
    past.observe_clip_norms(ids, torch.ones(2, 2).double())
    past.restore(ids, rows)
    now = past.state_dict()
    for name, value in whole.items():
        assert torch.equal(now[name][ids], value[ids]), name
    assert not torch.equal(now["l1_norm"][0], whole["l1_norm"][0])


def test_releases_move_only_their_own_clients_and_the_window_forgets():
    past = history(setting="client+local", history=2)
    ids = torch.tensor([1])
    for norm in (5.0, 7.0, 9.0):
        past.observe_norms(ids, tensor([[norm, 1.0]]))
    assert past.l1_norm[1].tolist() == [8.0, 1.0]
    assert torch.equal(past.l1_norm[[0, 2, 3]], past.initial_l1_norm.repeat(3, 1))
    policy = past.policy(torch.arange(4), torch.ones(4).double())
    first = past.initial_clip_norm.repeat(3, 1)
    torch.testing.assert_close(policy.clip_norm[[0, 2, 3]], first)
    assert policy.clip_norm[1, 0] > policy.clip_norm[1, 1]


def test_raw_thresholds_are_the_mean_of_the_last_five_norms():
    past = history(setting="abstract", mechanism="laplace")
    ids = torch.tensor([0])
    torch.testing.assert_close(past.policy(ids, torch.ones(1)).clip_norm[0], tensor([0.5, 0.5]))
    for norm in range(1, 8):
        past.observe_norms(ids, tensor([[float(norm), 2.0]]))
    policy = past.policy(ids, torch.ones(1).double())
    assert policy.clip_norm[0].tolist() == [5.0, 2.0]
    torch.testing.assert_close(policy.shares[0], 0.9 * tensor([5 / 7, 2 / 7]) + 0.05)


# Policies see releases alone ----------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["record+local", "client+local", "abstract"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_private_records_of_this_round_do_not_move_its_policy(
    federation, population, global_params, setting, mechanism
):
    """Two populations with the same released history and other records use one policy.

    The second round follows from releases: it is the same once the histories are made equal.
    """
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, noise_multiplier=0.5, seed=0
    )
    datasets = [
        federation(),
        federation(change=lambda x, y: x.mul_(30)),
        federation(change=lambda x, y: x[:7].fill_(float("nan"))),
    ]
    torch.manual_seed(0)
    network, everyone = MLP(in_features=8, hidden=(5,), num_classes=3), torch.arange(3)
    parts = [population(data, network, config, lr=0.5) for data in datasets]
    params = global_params(network)
    for round in range(3):
        released = [part.release(everyone, params, round, "same") for part in parts]
        for other in released[1:]:
            for name in ("clip_norm", "shares", "contribution", "noise_scale"):
                want = getattr(released[0].policy, name)
                assert torch.equal(getattr(other.policy, name), want), name
            if released[0].policy.votes_at is not None:
                assert torch.equal(other.policy.votes_at, released[0].policy.votes_at)
            assert not torch.equal(other.update["fc1.weight"], released[0].update["fc1.weight"])
        histories = [part.books.history.l1_norm for part in parts]
        if config.resolved_thresholds != "fixed":
            assert not torch.equal(histories[0], histories[1])
        for part in parts[1:]:
            part.books.history.load_state_dict(parts[0].books.history.state_dict())


def test_policy_of_a_step_follows_from_votes_of_the_steps_before(
    federation, population, global_params
):
    """M of the last of three steps, replayed from the released votes alone."""
    config = PrivacyConfig(epsilon=None, noise_multiplier=0.2, seed=0)
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, local_steps=3)
    seen = []
    observe = part.books.history.observe_votes
    part.books.history.observe_votes = lambda ids, votes, batch: (
        seen.append((votes.clone(), batch.clone())), observe(ids, votes, batch)
    )  # fmt: skip
    update = part.release(torch.arange(3), global_params(network), 0, "x")
    assert len(seen) == 3
    tracked = part.books.history.initial_l1_norm.repeat(3, 1)
    for votes, batch in seen[:-1]:
        fraction = (votes / batch[:, None].double() + 0.5).clamp(0, 1)
        tracked = tracked * (-0.2 * (fraction - 0.5)).exp()
    torch.testing.assert_close(update.policy.votes_at, tracked)
    want = math.sqrt(math.pi / 2) * tracked / part.books.history.dims.sqrt()
    torch.testing.assert_close(update.policy.clip_norm, want)


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_history_is_computed_from_the_released_bytes_alone(
    federation, population, global_params, setting, mechanism
):
    """The tracked norms, recomputed by anyone who sees the uploads and the public policy."""
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, noise_multiplier=0.003, seed=0,
        thresholds="released",
    )  # fmt: skip
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, lr=1.0)
    params, estimates = global_params(network), []
    for round in range(2):
        update = part.release(torch.arange(3), params, round, "x")
        divisor = 20 if setting == "record+local" else 1
        rows = []
        for i, name in enumerate(("fc1", "fc2")):
            sent = [update.update[f"{name}.{kind}"] for kind in ("weight", "bias")]
            sent = torch.cat([v.double().flatten(1) for v in sent], 1) * divisor
            mean, scale, d = sent.abs().mean(1), update.policy.noise_scale[:, i], sent.shape[1]
            if mechanism == "gaussian":
                rows.append(d * (mean**2 - 2 * scale**2 / math.pi).clamp(min=0).sqrt())
            else:
                v = (mean - scale).clamp(min=0)
                rows.append(d * (v + (v * (mean + 3 * scale)).sqrt()) / 2)
        estimates.append(torch.stack(rows, 1))
        want = torch.stack(estimates).mean(0)
        assert bool((want > 0).all())
        torch.testing.assert_close(part.books.history.l1_norm, want, rtol=1e-3, atol=1e-5)
