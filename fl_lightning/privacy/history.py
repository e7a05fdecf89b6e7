"""Released history of every client, kept as small arrays by client id, and the policy it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels import noise_scales, vote_noise
from fl_lightning.local.rows import flat_rows
from fl_lightning.privacy.allocation import layer_shares
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.contribution import contribution
from fl_lightning.privacy.thresholds import (
    clip_norm_from_l1,
    estimate_l1_norm,
    initial_clip_norms,
    l1_from_clip_norm,
    quantile_step,
    released_clip_norms,
)
from fl_lightning.values.round import LayerPolicy

RAW_HISTORY = 5


class ReleasedHistory:
    """Per-client, per-layer statistics of past releases; a few numbers a client, not the updates.

    Under ``abstract`` alone the array `window` holds raw L1 norms: that is what makes that
    setting's ε nominal.

    Args:
        config: the privacy configuration.
        num_clients: clients of the population, K.
        dims: number of parameters of each layer, L numbers.
    """

    def __init__(self, config: PrivacyConfig, num_clients: int, dims: tuple[int, ...]) -> None:
        self.config = config
        self.dims = torch.tensor(dims, dtype=torch.float64)
        self.initial_clip_norm = initial_clip_norms(config.clip_norm, len(dims), config.p)
        self.initial_l1_norm = l1_from_clip_norm(
            self.initial_clip_norm, self.dims, p=config.p, factor=config.clip_factor
        )
        if self.initial_clip_norm.isinf().any():
            self.initial_l1_norm = self.dims.sqrt()
        window = RAW_HISTORY if config.resolved_thresholds == "raw" else config.history
        self.l1_norm = self.initial_l1_norm.repeat(num_clients, 1)
        self.clip_norm = self.initial_clip_norm.repeat(num_clients, 1)
        self.window = torch.zeros(num_clients, window, len(dims), dtype=torch.float64)
        self.releases = torch.zeros(num_clients, dtype=torch.int64)
        # Only the cosine rule looks at directions, so only it keeps whole updates.
        width = int(self.dims.sum()) if config.comparator.history_cosine else 0
        self.last_update = torch.zeros(num_clients, width)
        self.cosine = torch.ones(num_clients, len(dims), dtype=torch.float64)

    @property
    def _names(self) -> list[str]:
        names = ["l1_norm", "clip_norm", "window", "releases"]
        return names + (["last_update", "cosine"] if self.config.comparator.history_cosine else [])

    def state_dict(self) -> dict[str, Tensor]:
        """All arrays (copies)."""
        return {name: getattr(self, name).clone() for name in self._names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; the shapes must fit the run."""
        for name, value in state.items():
            if value.shape != getattr(self, name).shape:
                raise ValueError(
                    f"checkpoint: {name} has shape {tuple(value.shape)}, the run needs "
                    f"{tuple(getattr(self, name).shape)}; the number of clients or layers changed"
                )
            setattr(self, name, value.clone())

    def checkpoint(self) -> dict[str, Tensor]:
        """The rows of clients with a history: a checkpoint does not grow with the population."""
        begun = self.releases > 0
        begun |= (self.l1_norm != self.initial_l1_norm).any(1)
        begun |= (self.clip_norm != self.initial_clip_norm).any(1)
        clients = begun.nonzero()[:, 0]
        return {"clients": clients, "of": torch.tensor(len(begun)), **self.rows(clients)}

    def load_checkpoint(self, state: dict[str, Tensor]) -> None:
        """Restore `checkpoint`; the shapes must fit the run."""
        clients, rows = state["clients"], {name: state[name] for name in self._names}
        dims = tuple(self.dims.long().tolist())
        whole = ReleasedHistory(self.config, len(self.releases), dims).state_dict()
        for name, value in rows.items():
            have, want = (int(state["of"]), *value.shape[1:]), tuple(whole[name].shape)
            if have != want:
                raise ValueError(
                    f"checkpoint: {name} has shape {have}, the run needs {want}; the number of "
                    "clients or layers changed"
                )
            whole[name][clients] = value
        self.load_state_dict(whole)

    def rows(self, clients: Tensor) -> dict[str, Tensor]:
        """The part of the state that the given clients' policies depend on (copies)."""
        return {name: getattr(self, name)[clients] for name in self._names}

    def restore(self, clients: Tensor, rows: dict[str, Tensor]) -> None:
        """Put back what `rows` gave, for releases that were not made."""
        for name, value in rows.items():
            getattr(self, name)[clients] = value

    def observe_votes(self, clients: Tensor, votes: Tensor, expected_batch: Tensor) -> None:
        """Move the tracked L1 norms by one released vote [k, L]."""
        self.l1_norm[clients] = quantile_step(
            self.l1_norm[clients],
            votes.double(),
            expected_batch.double(),
            quantile=self.config.quantile,
            lr=self.config.quantile_lr,
            initial=self.initial_l1_norm,
        )

    def observe_norms(self, clients: Tensor, l1_norm: Tensor) -> None:
        """Append L1 norms [k, L]: estimates from a release, or raw ones under ``abstract``."""
        slot = self.releases[clients] % self.window.shape[1]
        self.window[clients, slot] = l1_norm.double()
        self.releases[clients] += 1
        if self.config.resolved_thresholds != "quantile":
            self.l1_norm[clients] = self._of_history(clients) * (1 + self.cosine[clients]) / 2

    def observe_release(self, clients: Tensor, mean_abs: Tensor, noise_scale: Tensor) -> None:
        """Append the norms estimated from released magnitudes ‖ũ_l‖₁/d_l and their noise [k, L]."""
        estimate = estimate_l1_norm(
            mean_abs.double(), noise_scale.double(), self.dims, self.config.mechanism
        )
        self.observe_norms(clients, estimate)

    def observe_updates(self, clients: Tensor, updates: Sequence[Tensor]) -> None:
        """Compare the directions of released updates, a layer's tensors [k, ...], with the last.

        Before two updates are known, or where one is zero, the cosine is 1.
        """
        if not self.config.comparator.history_cosine:
            return
        now = torch.cat([flat_rows(u.detach()).cpu().float() for u in updates], 1)
        parts = [
            t.double().split(self.dims.int().tolist(), 1) for t in (now, self.last_update[clients])
        ]
        cosine = [torch.cosine_similarity(a, b) for a, b in zip(*parts, strict=True)]
        known = [a.any(1) & b.any(1) for a, b in zip(*parts, strict=True)]
        self.cosine[clients] = torch.stack(cosine, 1).where(torch.stack(known, 1), 1.0)
        self.last_update[clients] = now

    def observe_clip_norms(self, clients: Tensor, clip_norm: Tensor) -> None:
        """Remember the clip norms of a release, from which the next may move by a factor 2."""
        self.clip_norm[clients] = clip_norm

    def policy(self, clients: Tensor, multiplier: Tensor) -> LayerPolicy:
        """Clip norms, shares and noise of the given clients' next release.

        Args:
            clients: ids [k].
            multiplier: total noise multipliers of these clients, votes included, [k].
        """
        config = self.config
        clip_norm = self._clip_norms(clients)
        # Before the first release nothing is known of the layers: their public first norms decide.
        s = contribution(self.l1_norm[clients])
        shares = layer_shares(
            config.resolved_allocation,
            contribution=s,
            clip_norm=clip_norm,
            dims=self.dims,
            mechanism=config.mechanism,
            floor=config.share_floor,
        )
        votes_at, vote_scale, sums = None, None, multiplier
        if config.resolved_thresholds == "quantile":
            votes_at = self.l1_norm[clients]
            # Both noises are proportional to the total multiplier.
            for_sums, for_votes = vote_noise(
                1.0,
                num_layers=len(self.dims),
                vote_share=config.vote_share,
                mechanism=config.mechanism,
                adjacency=config.resolved_adjacency,
            )
            sums, vote_scale = multiplier * for_sums, multiplier * for_votes
        scale = noise_scales(
            clip_norm,
            shares,
            mechanism=config.mechanism,
            noise_multiplier=sums,
            adjacency=config.resolved_adjacency,
        )
        return LayerPolicy(clip_norm, shares, s, scale, votes_at, vote_scale)

    def _clip_norms(self, clients: Tensor) -> Tensor:
        config, rule = self.config, self.config.resolved_thresholds
        first = self.initial_clip_norm.expand(len(clients), -1)
        if rule == "fixed":
            return first.clone()
        if rule == "quantile":
            return clip_norm_from_l1(
                self.l1_norm[clients], self.dims, p=config.p, factor=config.clip_factor
            )
        seen = (self.releases[clients] > 0)[:, None]
        if rule == "raw":
            raw = clip_norm_from_l1(
                self.l1_norm[clients], self.dims, p=config.p, factor=config.clip_factor
            )
            return torch.where(seen & (raw > 0), raw, first)
        total = self.initial_clip_norm.sum() if config.p == 1 else self.initial_clip_norm.norm()
        adapted = released_clip_norms(
            self.l1_norm[clients],
            self.dims,
            p=config.p,
            total=total,
            previous=self.clip_norm[clients],
        )
        return torch.where(seen, adapted, first)

    def _of_history(self, clients: Tensor) -> Tensor:
        """Mean, median or moving average of the window's norms, [k, L]."""
        window = self.window[clients]
        age = (self.releases[clients, None] - 1 - torch.arange(window.shape[1])) % window.shape[1]
        filled = age < self.releases[clients, None]
        rule = self.config.comparator.history_rule
        if rule == "median":
            return window.masked_fill(~filled[..., None], math.nan).nanmedian(1).values
        decay = 1 - 2 / (window.shape[1] + 1) if rule == "ema" else 1.0
        weights = filled * decay**age
        return (window * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
