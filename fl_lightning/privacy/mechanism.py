"""Where private quantities become releases: the only file that clips or draws noise.

Two mechanisms, one a privacy unit. `PrivateRecordGradient` is the gradient hook of local training
under ``record+local``; `release_updates` treats whole client updates. Both return the release
together with what it must be charged for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import (
    Layout,
    NoiseKey,
    UnsupportedLayerError,
    check_single_use,
    clip_sum_noise,
    layer_norms,
    privatize_,
    sample_noise,
    with_clipping,
)
from fl_lightning import secrets
from fl_lightning.client import Batch, CohortGradient, Loss, columns, per_row
from fl_lightning.privacy.accounting import NoiseEvent
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.types import LayerPolicy, Params, PrivateUpdate

# (params, shared, batch, policy) -> clipped sums [k, ...] and, a layer, votes, clipped and
# non-finite counts [k, L, 3]: all private.
ClippedSums = Callable[[Params, bool, Batch, LayerPolicy], tuple[Params, Tensor]]


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
    ) -> None:
        self.clipped_sums = clipped_sums
        self.history = history
        self.layout = layout
        self.key = key
        self.clients = clients
        self.multiplier = multiplier
        self.steps = 0
        self.policy: LayerPolicy | None = None
        self.clipped = torch.zeros(len(clients), layout.num_layers)
        self.records = torch.zeros(len(clients))
        self.nonfinite = torch.zeros(len(clients), layout.num_layers)

    def __call__(self, step: int, params: Params, shared: bool, batch: Batch) -> Params:
        config = self.history.config
        self.policy = policy = self.history.policy(self.clients, self.multiplier)
        sums, counts = self.clipped_sums(params, shared, batch, policy)
        # Other values can never meet the same noise, whatever else was forgotten in the key.
        values = secrets.digest([*sums.values(), counts, policy.noise_scale])
        key = self.key.derive("values", step, values)
        released = self._noised(sums, policy.noise_scale, step, params, key)
        if policy.votes_at is not None:
            assert policy.vote_noise_scale is not None
            noise = sample_noise(
                (len(self.clients), self.layout.num_layers),
                mechanism=config.mechanism,
                scale=policy.vote_noise_scale[:, None],
                key=key,
                step=step,
                client=self.clients,
                layer=self.layout.num_layers,
                dtype=torch.float64,
            )
            votes = (counts[..., 0].double().cpu() + noise).float()
            self.history.observe_votes(self.clients, votes, batch.divisor.cpu())
        else:
            _observe(self.history, self.layout, self.clients, released, policy)
        self.history.observe_clip_norms(self.clients, policy.clip_norm)
        self.steps += 1
        self.clipped += counts[..., 1].cpu()
        self.nonfinite += counts[..., 2].cpu()
        self.records += batch.mask.sum(1).cpu()
        return {name: per_row(g, batch.divisor.reciprocal()) for name, g in released.items()}

    def _noised(
        self, sums: Params, scale: Tensor, step: int, like: Params, key: NoiseKey
    ) -> Params:
        released = {}
        for name, layer, offset in zip(
            self.layout.names, self.layout.layer_of, self.layout.offsets, strict=True
        ):
            value = sums[name]
            noise = sample_noise(
                value.shape,
                mechanism=self.history.config.mechanism,
                scale=columns(scale[:, layer].to(value.device), value),
                key=key,
                step=step,
                client=self.clients,
                layer=layer,
                offset=offset,
                dtype=torch.float64,
                device=value.device,
            )
            # Added in float64 and rounded once: rounded noise on a rounded sum shows the sum.
            released[name] = (value.double() + noise).to(like[name].dtype)
        return released

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


def release_updates(
    update: Params,
    policy: LayerPolicy,
    history: ReleasedHistory,
    layout: Layout,
    *,
    key: NoiseKey,
    clients: Tensor,
    multiplier: Tensor,
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
    """
    config = history.config
    values = secrets.digest([*update.values(), policy.clip_norm, policy.noise_scale])
    stats = privatize_(
        [update[name] for name in layout.names],
        layout=layout,
        clip=policy.clip_norm,
        scale=policy.noise_scale,
        p=config.p,
        mechanism=config.mechanism,
        key=key.derive("values", values),
        step=0,
        clients=clients,
    )
    if config.resolved_thresholds == "raw":
        # A client that is not finite sends nothing and counts as a norm of zero.
        assert stats.l1_norm is not None
        raw = stats.l1_norm.masked_fill(stats.nonfinite > 0, 0.0)
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
    history.observe_release(clients, mean_abs, policy.noise_scale)


def clipped_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    vectorize: bool,
    max_examples: int,
    example: Tensor,
) -> ClippedSums:
    """Clip in backward where every layer can; per-sample gradients otherwise."""
    try:
        if any("." not in name for name in layout.names):
            raise UnsupportedLayerError("the network is one layer, which cannot carry buffers")
        clipped = with_clipping(network, p=p)
        check_single_use(clipped, example)
    except UnsupportedLayerError:
        return per_sample_sums(
            network, loss, layout, p=p, vectorize=vectorize, max_examples=max_examples
        )
    clipped.to(example.device)
    return clip_in_backward_sums(
        clipped, loss, layout, vectorize=vectorize, max_examples=max_examples
    )


def round_down(clip_norm: Tensor) -> Tensor:
    """Clip norms in float32, never above what the noise is scaled to."""
    rounded = clip_norm.float()
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double() > clip_norm, below, rounded)


def clip_in_backward_sums(
    clipped: nn.Module, loss: Loss, layout: Layout, *, vectorize: bool, max_examples: int
) -> ClippedSums:
    """Sums of clipped gradients from one backward pass; no per-sample gradient is kept.

    Args:
        clipped: result of `aadp_kernels.with_clipping`.
        loss: loss of each record.
        layout: layers, named like the modules.
        vectorize, max_examples: see `CohortGradient`.
    """
    layers = layout.layer_names
    gradient = CohortGradient(
        clipped,
        loss,
        vectorize=vectorize,
        max_examples=max_examples,
        mask_names=tuple(f"{name}.mask" for name in layers),
    )

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        k, device = len(batch.x), batch.x.device
        clip = round_down(policy.clip_norm).to(device)
        votes_at = torch.full_like(clip, torch.nan)  # no votes
        if policy.votes_at is not None:
            votes_at = policy.votes_at.to(device, torch.float32)
        constants = {f"{n}.clip_norm": clip[:, i] for i, n in enumerate(layers)}
        constants |= {f"{n}.votes_at": votes_at[:, i] for i, n in enumerate(layers)}
        probes = {f"{n}.probe": torch.zeros(k, 3, device=device) for n in layers}
        sums, seen = gradient(params, batch, shared=shared, probes=probes, constants=constants)
        return sums, torch.stack([seen[f"{n}.probe"] for n in layers], 1)

    return run


def per_sample_sums(
    network: nn.Module, loss: Loss, layout: Layout, *, p: int, vectorize: bool, max_examples: int
) -> ClippedSums:
    """Sums of clipped gradients for any network without batch statistics, by per-sample gradients.

    One vmap over the records of a client, or a loop over them if the network cannot be vmapped.
    Memory grows with records × parameters; `max_examples` bounds the records held at once.
    """

    def record_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(network, params, (x[None],)), y[None]).sum()

    per_sample = vmap(grad(record_loss), in_dims=(None, 0, 0), randomness="different")

    def looped(params: Params, x: Tensor, y: Tensor) -> Params:
        rows = []
        for one_x, one_y in zip(x, y, strict=True):
            leaves = {n: v.detach().requires_grad_() for n, v in params.items()}
            with torch.enable_grad():
                value = record_loss(leaves, one_x, one_y)
            rows.append(
                torch.autograd.grad(
                    value, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            )
        return {n: torch.stack(c) for n, c in zip(params, zip(*rows, strict=True), strict=True)}

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        sums, counts = [], []
        for i in range(len(batch.x)):
            own = params if shared else {n: v[i] for n, v in params.items()}
            total: list[Tensor] | None = None
            seen = torch.zeros(layout.num_layers, 3)
            for start in range(0, batch.x.shape[1], max_examples):
                part = slice(start, start + max_examples)
                grads = (per_sample if vectorize else looped)(
                    own, batch.x[i, part], batch.y[i, part]
                )
                total, stats = clip_sum_noise(
                    [grads[n] for n in layout.names],
                    layout=layout,
                    clip=policy.clip_norm[i],
                    scale=None,
                    p=p,
                    mask=batch.mask[i, part],
                    votes_at=None if policy.votes_at is None else policy.votes_at[i],
                    accumulate=total,
                    last=False,
                )
                seen += torch.stack([stats.votes, stats.clipped, stats.nonfinite], 1).cpu()
            assert total is not None
            sums.append(total)
            counts.append(seen)
        stacked = {n: torch.stack([s[j] for s in sums]) for j, n in enumerate(layout.names)}
        return stacked, torch.stack(counts)

    return run
