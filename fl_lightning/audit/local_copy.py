"""Canary clients in a copy of a run whose clients add the noise themselves.

Every client of the copy is a canary with noise of its own, so each is an independent trial of the
whole run: as many releases as the audited client made, by the run's own code, thresholds, charges
and ledger included. What the clients' other records would add is known to the adversary and left
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.audit.canary import HUGE, Canary, choose_canary, shifts, unit_rows
from fl_lightning.audit.finished import Finished
from fl_lightning.audit.last_model import Floats, LastModels
from fl_lightning.audit.readings import Readings, joined, read_pieces
from fl_lightning.data import Arrays, FederatedDataModule
from fl_lightning.data.differences import different_records
from fl_lightning.ledger.accounts import accounts
from fl_lightning.local.batches import Batch
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.privacy.mechanism import PrivateRecordGradient
from fl_lightning.processes.together import Processes
from fl_lightning.run import Run, begin_run
from fl_lightning.run_spec import RunSpec
from fl_lightning.server.faults import Faults
from fl_lightning.values.round import LayerPolicy, Params

# Numbers of releases that are held at once.
_AT_ONCE = 2**25
# Local steps after the first start from noise; so small a rate leaves the canary's gradient known.
_STANDING_STILL = 1e-12


@dataclass(frozen=True)
class Seen:
    """What the attacker of a copy has, and what the copy was charged.

    Args:
        coins: whether each canary is there (else its opposite, or zero), bool [n].
        readings: of each canary.
        rate: probability that a unit takes part in a step.
        charged: ε by the ledger of the copy, of its worst canary.
        seconds: wall-clock time of the copy.
        last: of each canary, how much less its loss is in its last model [n]; None: not known.
    """

    coins: np.ndarray
    readings: Readings
    rate: float
    charged: float
    seconds: float
    last: Floats | None = None


def local_trials(
    finished: Finished, client: int, coins: np.ndarray, *, seed: int | None, folder: Path
) -> Seen:
    """Run the copy of `record+local` and `client+local`.

    Args:
        finished: the run.
        client: whose noise, δ and number of releases the canaries have.
        coins: of the canaries, bool [n].
        seed: of the copy's noise; None: a secret of its own.
        folder: empty; secret and ledger of the copy.

    Raises:
        ValueError: there is no canary for this network.
    """
    started = time.perf_counter()
    canary = _canary(finished, client)
    run = _begin(finished, client, canary, len(coins), seed=seed, folder=folder)
    records = run.spec.rules.privacy.unit == "record"
    watch = _watch_records if records else _watch_updates
    last = LastModels(finished.module.network, canary, len(coins), _as_it_moves(finished, client))
    taken: list[tuple[int, Tensor, Tensor]] = []
    known = watch(run, canary, torch.from_numpy(coins), taken, last)
    clients = run.releases.clients
    clients.at_once = max(1, min(clients.at_once, _AT_ONCE // sum(run.spec.layout.dims)))
    for round in range(run.planned_rounds):
        cohort = run.cohort(round)
        context = run.context(cohort)
        for group in run.releases.groups(cohort):
            known(run.releases.release(group, canary.params, round, context))
    assert run.ledger is not None
    found = accounts(run.ledger.header, run.ledger.releases)
    charged = max(account.epsilon() for account in found.values())
    run.ledger.close()
    return Seen(
        coins, _in_order(taken, len(coins)), run.budget.sampling_rate, charged,
        time.perf_counter() - started, last.scores(),
    )  # fmt: skip


def _as_it_moves(finished: Finished, client: int) -> float:
    """What a released gradient, or update, of a copy moves the model by in the run.

    A canary is its client's only record.
    """
    if finished.rules.privacy.unit != "record":
        return 1.0
    return -finished.rules.client_lr / int(finished.data.client_sizes[client])


def _canary(finished: Finished, client: int) -> Canary:
    """The record that tells most in the first step, by the noise that it would have."""
    data, network, rules = finished.data, finished.module.network, finished.rules
    network.eval()
    rows = torch.tensor(different_records(data.x, data.y))[:6]
    device = next(network.parameters()).device
    records = data.x[rows].to(device, input_dtype(network, data.x))
    records = records.nan_to_num(0.0, 0.0, 0.0) if records.is_floating_point() else records
    layout = finished.module.layout
    policy = first_policy(finished, client)

    def told(gradient: Params) -> float:
        moved = torch.cat(shifts(unit_rows(gradient, layout), policy, rules.privacy), 1)
        if rules.privacy.mechanism == "gaussian":
            return float(moved.square().sum())
        return float((moved.abs() + (-moved.abs()).expm1()).sum())

    return choose_canary(network, layout, records, told)


def first_policy(finished: Finished, client: int) -> LayerPolicy:
    """Clip norms and noise of a client's first release, one row."""
    from fl_lightning.privacy.history import ReleasedHistory

    history = ReleasedHistory(finished.rules.privacy, 1, finished.module.layout.dims)
    multiplier = torch.tensor([finished.multipliers()[client]], dtype=torch.float64)
    return history.policy(torch.zeros(1, dtype=torch.int64), multiplier)


def _begin(
    finished: Finished, client: int, canary: Canary, count: int, *, seed: int | None, folder: Path
) -> Run:
    """The copy: the run's rules and code, a population of canaries, a ledger of its own."""
    rules = finished.rules
    privacy = replace(
        rules.privacy,
        epsilon=None,
        evaluate_every=0,  # canaries are in updates: an attack without evaluations shows less
        noise_multiplier=finished.multipliers()[client],
        delta=float(np.asarray(finished.header["delta"]).reshape(-1)[client]),
        seed=seed,
    )
    rounds = finished.participations(client)
    rules = replace(
        rules, privacy=privacy, clients_per_round=None, client_lr=_STANDING_STILL,
        planned_rounds=rounds, execution="vmap" if finished.vmaps else "loop", faults=Faults(),
    )  # fmt: skip
    spec = RunSpec(
        rules, finished.module.network, canary.loss, finished.module.layout,
        _population(finished.data, canary.record, count), folder, Processes(),
        vmaps=finished.vmaps, last_model=_no_model, resumed=None,
    )  # fmt: skip
    return begin_run(spec, rounds)


def _no_model(rounds: int) -> np.ndarray:
    raise AssertionError("rounds of local noise share none")


def _population(data: FederatedDataModule, record: Tensor, count: int) -> FederatedDataModule:
    """One canary record a client."""
    x = record.to("cpu", data.x.dtype)[None].expand(count, *record.shape).clone()
    y = torch.zeros(count, *data.y.shape[1:], dtype=data.y.dtype)
    arrays = Arrays(x, y, x[:0], y[:0], data.num_classes, "canaries", fields=data.fields)
    return FederatedDataModule(arrays, num_clients=count, val_fraction=0.0, min_client_size=1)


def stated_rows(released: Params, policy: LayerPolicy, layout: Any) -> list[Tensor]:
    """Releases layer by layer in units of their stated noise: [k, d_l] each, float64."""
    rows: list[list[Tensor]] = [[] for _ in range(layout.num_layers)]
    for name, layer in zip(layout.names, layout.layer_of, strict=True):
        value = released[name].double().cpu()
        rows[layer].append(value.reshape(len(value), -1) / policy.noise_scale[:, layer, None])
    return [torch.cat(row, 1) for row in rows]


def watch_votes(history: Any, votes: list[Tensor]) -> None:
    """Let `votes` have what is released of votes, [k, L] each."""
    observe = history.observe_votes

    def seen(clients: Tensor, released: Tensor, expected: Tensor) -> None:
        votes.append(released.double().cpu())
        observe(clients, released, expected)

    history.observe_votes = seen


def vote_rows(votes: Tensor, policy: LayerPolicy, replaced: bool) -> tuple[Tensor, Tensor]:
    """Released votes in units of their stated noise, and how far the canary moves them.

    A canary is longer than any threshold: it votes -1/2 in each layer. So does its opposite.
    """
    assert policy.vote_noise_scale is not None
    scale = policy.vote_noise_scale[:, None]
    moved = torch.full_like(votes, 0.0 if replaced else -0.5)
    return (votes + 0.5 if replaced else votes) / scale, moved / scale


def _watch_records(
    run: Run,
    canary: Canary,
    coins: Tensor,
    taken: list[tuple[int, Tensor, Tensor]],
    last: LastModels,
) -> Callable[[Any], None]:
    """Toss the canaries into the batches of local steps; read what each noised step shows."""
    privacy, layout, clients = run.spec.rules.privacy, run.spec.layout, run.releases.clients
    replaced = privacy.resolved_adjacency == "replace_one"
    rows, train = unit_rows(canary.gradient, layout), clients.train
    votes: list[Tensor] = []
    watch_votes(run.history, votes)
    steps = clients.steps

    def watched(ids: Tensor, params: Params, key: NoiseKey, round: int, hook: Any) -> Params:
        assert isinstance(hook, PrivateRecordGradient)

        def step(number: int, params: Params, shared: bool, batch: Batch) -> Params:
            batch = _tossed(batch, coins[ids], replaced)
            mean = hook(number, params, shared, batch)
            last.add(ids, mean)
            policy = hook.policy
            assert policy is not None
            sums = {
                n: g * batch.divisor.view(-1, *[1] * (g.ndim - 1)).double() for n, g in mean.items()
            }
            pieces = stated_rows(sums, policy, layout)
            moved = shifts(rows, policy, privacy)
            if policy.votes_at is not None:
                said, meant = vote_rows(votes.pop(), policy, replaced)
                pieces, moved = [*pieces, said], [*moved, meant]
            reading = read_pieces(pieces, moved, privacy.mechanism)
            taken.append((round * steps + number, ids, reading))
            return mean

        return train(ids, params, key, round, step)

    clients.train = watched  # pyright: ignore[reportAttributeAccessIssue]
    return lambda _: None


def _tossed(batch: Batch, there: Tensor, replaced: bool) -> Batch:
    """The batch with each client's canary there, or its opposite, or nobody."""
    there = there.to(batch.mask.device)
    if not replaced:
        return replace(batch, mask=batch.mask * there[:, None])
    away = (~there).to(batch.y.dtype).view(-1, *[1] * (batch.y.ndim - 1))
    return replace(batch, y=torch.zeros_like(batch.y) + away)


def _watch_updates(
    run: Run,
    canary: Canary,
    coins: Tensor,
    taken: list[tuple[int, Tensor, Tensor]],
    last: LastModels,
) -> Callable[[Any], None]:
    """Put crafted updates in the place of trained ones; read what each release shows."""
    privacy, layout, clients = run.spec.rules.privacy, run.spec.layout, run.releases.clients
    replaced = privacy.resolved_adjacency == "replace_one"
    direction = crafted_update(layout, privacy.p)
    if privacy.p == 2:
        direction = _towards(canary, direction, layout)
    rows = unit_rows(direction, layout)
    round_of: list[int] = []

    def crafted(ids: Tensor, params: Params, key: NoiseKey, round: int, hook: Any = None) -> Params:
        round_of.append(round)
        sign = torch.where(coins[ids], 1.0, -1.0 if replaced else 0.0)
        return {
            n: HUGE * sign.view(-1, *[1] * v.ndim).to(params[n]) * v.to(params[n])
            for n, v in direction.items()
        }

    def read(update: Any) -> None:
        pieces = stated_rows(update.update, update.policy, layout)
        moved = shifts([HUGE * row for row in rows], update.policy, privacy)
        reading = read_pieces(pieces, moved, privacy.mechanism)
        taken.append((round_of[-1], update.clients, reading))
        last.add(update.clients, update.update)

    clients.train = crafted  # pyright: ignore[reportAttributeAccessIssue]
    return read


def _towards(canary: Canary, direction: Params, layout: Any) -> Params:
    """The descent of the canary's loss, which its last model shows; as given in layers at rest.

    To Gaussian noise all directions are alike.
    """
    moves = [bool(row.norm() > 0) for row in unit_rows(canary.gradient, layout)]
    named = zip(layout.names, layout.layer_of, strict=True)
    return {
        n: -canary.gradient[n].cpu().float() / HUGE if moves[layer] else direction[n]
        for n, layer in named
    }


def crafted_update(layout: Any, p: int) -> Params:
    """A direction: all coordinates of a layer with signs in turn, or its first one for L1 norms.

    Laplace noise tells two points apart best that differ in one coordinate.
    """
    found: Params = {}
    begun: set[int] = set()
    for name, shape, layer in zip(layout.names, layout.shapes, layout.layer_of, strict=True):
        value = torch.zeros(shape) if p == 1 else torch.ones(shape)
        flat = value.view(-1)
        if p == 1 and layer not in begun:
            flat[0] = 1.0
        elif p == 2:
            flat[1::2] = -1.0
        begun.add(layer)
        found[name] = value
    return found


def _in_order(taken: list[tuple[int, Tensor, Tensor]], count: int) -> Readings:
    """Readings of all canaries and steps, from those of groups of clients."""
    steps = 1 + max(step for step, _, _ in taken)
    whole = torch.full((steps, count, *taken[0][2].shape[1:]), torch.nan, dtype=torch.float64)
    for step, ids, reading in taken:
        whole[step, ids] = reading
    if not bool(whole[..., :2].isfinite().all()):
        raise ValueError("a canary did not take part in all rounds of the copy")
    return joined(list(whole))
