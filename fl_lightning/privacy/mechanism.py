"""Where private quantities become releases: the only file that clips or draws noise.

Two mechanisms, one a privacy unit. `PrivateRecordGradient` is the gradient hook of local training
under ``record+local``; `release_updates` treats whole client updates. Both return the release
together with what it must be charged for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import (
    Correlation,
    Layout,
    NoiseKey,
    clip_sum_noise,
    grid,
    layer_norms,
    privatize_,
    sample_noise,
)
from fl_lightning.keys import binding
from fl_lightning.local.batches import Batch
from fl_lightning.local.rows import columns, per_row
from fl_lightning.privacy.clipping import ClippedSums
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

# Where aadp_kernels.grid clamps sums before and after the noise, in quanta: 4096 octaves.
VOTE_LIMIT = 4096 << 30


def noise_event(config: PrivacyConfig, multiplier: float, sampling_rate: float) -> NoiseEvent:
    """The one joint event of a release: all layers and votes share one batch and one coin."""
    return NoiseEvent(
        mechanism=config.mechanism,
        noise_multiplier=multiplier,
        sampling_rate=sampling_rate,
        adjacency=config.resolved_adjacency,
    )


class PrivateRecordGradient:
    """Gradient hook of ``record+local``: clip each record, sum, add noise once, divide by q·n.

    Policies of a step depend on the releases before it alone; the votes of a step move the clip
    norms of the next.

    Args:
        clipped_sums: private sums of clipped gradients, see `clip_in_backward_sums`.
        history: released history of all clients; the rows of `clients` are moved forward.
        layout: layers of the network.
        key: noise key of this round, bound to everything that the sums depend on.
        clients: ids of the k clients.
        multiplier: total noise multipliers of these clients [k].
        numbers: what their noise is drawn under [k]; None: their ids.
    """

    def __init__(
        self,
        clipped_sums: ClippedSums,
        history: ReleasedHistory,
        layout: Layout,
        *,
        key: NoiseKey,
        clients: Tensor,
        multiplier: Tensor,
        numbers: Tensor | None = None,
    ) -> None:
        self.clipped_sums = clipped_sums
        self.history = history
        self.layout = layout
        self.key = key
        self.clients = clients
        self.multiplier = multiplier
        self.numbers = clients if numbers is None else numbers
        self.steps = 0
        self.policy: LayerPolicy | None = None
        self.clipped = torch.zeros(len(clients), layout.num_layers)
        self.records = torch.zeros(len(clients))
        self.nonfinite = torch.zeros(len(clients), layout.num_layers)

    def __call__(self, step: int, params: Params, shared: bool, batch: Batch) -> Params:
        self.policy = policy = self.history.policy(self.clients, self.multiplier)
        sums, counts = self.clipped_sums(params, shared, batch, policy)
        key = binding.step_key(self.key, step, [*sums.values(), counts, policy.noise_scale])
        released = self._noised(sums, policy, step, params, key)
        if policy.votes_at is not None:
            votes = self._votes(counts.double().cpu(), batch)
            votes = noised_votes(votes, policy, self.history.config, key, step, self.numbers)
            self.history.observe_votes(self.clients, votes, batch.divisor.cpu())
        else:
            _observe(self.history, self.layout, self.clients, released, policy)
        self.history.observe_clip_norms(self.clients, policy.clip_norm)
        self.steps += 1
        self.clipped += counts[..., 1].cpu()
        self.nonfinite += counts[..., 2].cpu()
        self.records += batch.mask.sum(1).cpu()
        return {name: per_row(g, batch.divisor.reciprocal()) for name, g in released.items()}

    def _votes(self, counts: Tensor, batch: Batch) -> Tensor:
        """Sum of 1[norm <= threshold] - 1/2 over finite records, [k, L]."""
        if self.history.config.comparator.votes_on == "l1":
            return counts[..., 0]
        finite = batch.mask.sum(1).double().cpu()[:, None] - counts[..., 2]
        return finite / 2 - counts[..., 1]

    def _noised(
        self, sums: Params, policy: LayerPolicy, step: int, like: Params, key: NoiseKey
    ) -> Params:
        config, layout = self.history.config, self.layout
        if any(value.dtype == torch.int64 for value in sums.values()):
            return self._noised_quanta(sums, policy, step, like, key)
        released = {}
        for name, layer, offset in zip(layout.names, layout.layer_of, layout.offsets, strict=True):
            value = sums[name]
            noise = sample_noise(
                value.shape,
                mechanism=config.mechanism,
                scale=columns(policy.noise_scale[:, layer].to(value.device), value),
                key=key,
                step=step,
                client=self.numbers,
                layer=layer,
                offset=offset,
                dtype=torch.float64,
                device=value.device,
                form=config.noise_form,
            )
            # Added in float64 and rounded once: rounded noise on a rounded sum shows the sum.
            released[name] = (value.double() + noise).to(like[name].dtype)
        return released

    def _noised_quanta(
        self, sums: Params, policy: LayerPolicy, step: int, like: Params, key: NoiseKey
    ) -> Params:
        """The grid form: sums are whole numbers, one client's at a time."""
        config, layout = self.history.config, self.layout
        rows = []
        for i, client in enumerate(self.numbers.tolist()):
            noised, _ = clip_sum_noise(
                [
                    sums[n].new_empty((0, *sums[n].shape[1:]), dtype=like[n].dtype)
                    for n in layout.names
                ],
                layout=layout,
                clip=policy.clip_norm[i],
                scale=policy.noise_scale[i],
                p=config.p,
                mechanism=config.mechanism,
                key=key,
                step=step,
                client=client,
                accumulate=[sums[n][i] for n in layout.names],
                form="grid",
            )
            rows.append(noised)
        return {n: torch.stack([r[j] for r in rows]) for j, n in enumerate(layout.names)}

    def private_update(self, update: Params, sampling_rate: float) -> PrivateUpdate:
        """The release of all local steps: `update` is computed from released gradients only."""
        assert self.policy is not None
        config = self.history.config
        return PrivateUpdate(
            clients=self.clients,
            update=update,
            events=[noise_event(config, float(z), sampling_rate) for z in self.multiplier],
            steps=self.steps,
            policy=self.policy,
            sim_only={
                "clipped_fraction": self.clipped / self.records.clamp(min=1)[:, None],
                "nonfinite": self.nonfinite.amax(1),
            },
        )


def noised_votes(
    votes: Tensor,
    policy: LayerPolicy,
    config: PrivacyConfig,
    key: NoiseKey,
    step: int,
    clients: Tensor,
    *,
    correlation: Correlation | None = None,
) -> Tensor:
    """Vote sums [k, L] (multiples of 1/2) with noise, float32.

    Grid form: a function of the whole numbers of `vote_quanta` plus whole-number noise.
    """
    assert policy.vote_noise_scale is not None
    scale = policy.vote_noise_scale
    gridded = config.noise_form == "grid" and bool((scale > 0).all())
    noise = sample_noise(
        votes.shape,
        mechanism=config.mechanism,
        scale=1.0 if gridded else scale[:, None],
        key=key,
        step=step,
        client=clients,
        layer=votes.shape[1],
        dtype=torch.int64 if gridded else torch.float64,
        form=config.noise_form,
        correlation=correlation,
    )
    if not gridded:
        return (votes + noise).float()
    total, step_size = vote_quanta(votes, scale, config.mechanism)
    noised = (total.clamp(-VOTE_LIMIT, VOTE_LIMIT) + noise).clamp(-VOTE_LIMIT, VOTE_LIMIT)
    middle = 0.5 if config.mechanism == "laplace" else 0.0
    return ((noised.double() + middle) * step_size).float()


def vote_quanta(votes: Tensor, scale: Tensor, mechanism: str) -> tuple[Tensor, Tensor]:
    """Vote sums [k, L] (multiples of 1/2) in quanta, int64, and the quanta [k, 1] of scales [k].

    With the quantum q of the votes' noise every single vote of ±1/2 becomes ±h quanta,
    h = floor(1/2 / q). So the sum of votes v is the whole number 2v·h, exactly, and a unit moves it
    by at most 1/2 / q in each layer: what the noise is scaled to, in quanta. (Cutting v / q itself
    would let a unit move it by up to 1/2 / q + 1.) A vote counts for h·q, more than 1/2 - q.
    """
    step_size = grid.quantum(scale, mechanism)[:, None]
    # The margin is wider than the rounding of the division: h·q <= 1/2 for certain.
    each = (0.5 / step_size * (1 - 2.0**-50)).floor().to(torch.int64)
    return (2 * votes).to(torch.int64) * each, step_size


def release_updates(
    update: Params,
    policy: LayerPolicy,
    history: ReleasedHistory,
    layout: Layout,
    *,
    key: NoiseKey,
    clients: Tensor,
    multiplier: Tensor,
    numbers: Tensor | None = None,
) -> PrivateUpdate:
    """Release whole client updates: clip each layer and add noise to it, in place.

    Args:
        update: local minus global parameters [k, ...], private; overwritten by the release.
        policy: clip norms, shares and noise, made before training from released history.
        history: moved forward by the release (by raw norms under ``abstract``).
        layout: layers of the network.
        key: noise key of this round.
        clients: ids [k].
        multiplier: noise multipliers [k].
        numbers: what their noise is drawn under [k]; None: their ids.
    """
    config = history.config
    values = [*update.values(), policy.clip_norm, policy.noise_scale]
    stats = privatize_(
        [update[name] for name in layout.names],
        layout=layout,
        clip=policy.clip_norm,
        scale=policy.noise_scale,
        p=config.p,
        mechanism=config.mechanism,
        key=binding.step_key(key, 0, values),
        step=0,
        clients=clients if numbers is None else numbers,
        form=config.noise_form,
    )
    if config.resolved_thresholds == "raw":
        # A client that is not finite sends nothing and counts as a norm of zero.
        assert stats.l1_norm is not None
        raw = stats.l1_norm.masked_fill(stats.nonfinite > 0, 0.0)
        history.observe_updates(clients, [update[name] for name in layout.names])
        history.observe_norms(clients, raw.cpu())
    else:
        _observe(history, layout, clients, update, policy)
    history.observe_clip_norms(clients, policy.clip_norm)
    return PrivateUpdate(
        clients=clients,
        update=update,
        events=[noise_event(config, float(z), 1.0) for z in multiplier],
        steps=1,
        policy=policy,
        sim_only={"clipped_fraction": stats.clipped.cpu(), "nonfinite": stats.nonfinite.cpu()},
    )


def _observe(
    history: ReleasedHistory,
    layout: Layout,
    clients: Tensor,
    released: Params,
    policy: LayerPolicy,
) -> None:
    tensors = [released[name] for name in layout.names]
    mean_abs = layer_norms(tensors, layout=layout, p=1, cohort=True).double().cpu() / history.dims
    history.observe_updates(clients, tensors)
    history.observe_release(clients, mean_abs, policy.noise_scale)
