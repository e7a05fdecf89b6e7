"""The sum of a cohort's clipped updates, and its noise: from one hand or in shares."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import Layout, NoiseKey, layer_norms, privatize_, sample_noise
from fl_lightning import binding
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.shares import noise_share
from fl_lightning.release import ALL_CLIENTS
from fl_lightning.types import Params, PrivateUpdate

_ROW = torch.zeros(1, dtype=torch.int64)
_CLIENTS_AT_ONCE = 64


class PooledSum:
    """Weighted sum of clipped client updates; private until `release`.

    Args:
        history: released history of the cohort, one row; moved forward by the release.
        layout: layers of the network.
        multiplier: noise multiplier for a client of weight 1, votes included.
        survivors: None: one noise for the sum. A number: every client adds a share, and so many
            shares make the whole noise.
        key: noise key of this round.
    """

    def __init__(
        self,
        history: ReleasedHistory,
        layout: Layout,
        *,
        multiplier: float,
        survivors: int | None,
        key: NoiseKey,
    ) -> None:
        self.history = history
        self.layout = layout
        self.survivors = survivors
        self.key = key
        self.policy = history.policy(_ROW, torch.tensor([multiplier], dtype=torch.float64))
        self.clients: list[Tensor] = []
        self.total = [torch.zeros(s, dtype=torch.float64) for s in layout.shapes]
        self.dtypes: list[torch.dtype] = [torch.float32] * len(layout.shapes)
        self.votes = torch.zeros(layout.num_layers, dtype=torch.float64)
        self.clipped = torch.zeros(layout.num_layers)
        self.nonfinite = torch.zeros(layout.num_layers)

    def add(self, update: Params, clients: Tensor, weights: Tensor) -> None:
        """Clip the updates [k, ...] layer by layer (they are overwritten) and add them up.

        Args:
            update: local minus global parameters, private.
            clients: ids [k].
            weights: public weights in (0, 1], [k].
        """
        tensors = [update[name] for name in self.layout.names]
        stats = privatize_(
            tensors,
            layout=self.layout,
            clip=self.policy.clip_norm[0],
            scale=torch.zeros(self.layout.num_layers),
            p=self.history.config.p,
            key=None,
            step=0,
            clients=clients,
            votes_at=None if self.policy.votes_at is None else self.policy.votes_at[0],
        )
        for i, value in enumerate(tensors):
            self.dtypes[i] = value.dtype
            weighted = value.double().cpu() * weights.double().view(-1, *[1] * (value.ndim - 1))
            self.total[i] += weighted.sum(0)
        self.votes += stats.votes.sum(0).cpu()
        self.clipped += stats.clipped.sum(0).cpu()
        self.nonfinite += stats.nonfinite.sum(0).cpu()
        self.clients.append(clients)

    def release(self, *, divisor: float, expected_votes: float) -> PrivateUpdate:
        """Add the noise and divide by a public number.

        Args:
            divisor: expected sum of weights, > 0.
            expected_votes: expected number of clients, > 0.

        Returns:
            One row [1, ...]: the mean update.
        """
        policy, history = self.policy, self.history
        values = [*self.total, self.votes, policy.noise_scale, divisor]
        key, scale = binding.step_key(self.key, 0, values), policy.noise_scale[0]
        released = {}
        for i, name in enumerate(self.layout.names):
            layer, offset = self.layout.layer_of[i], self.layout.offsets[i]
            noise = self._noise(self.layout.shapes[i], float(scale[layer]), key, layer, offset)
            # Added in float64 and rounded once: rounded noise on a rounded sum shows the sum.
            released[name] = ((self.total[i] + noise) / divisor)[None].to(self.dtypes[i])
        if policy.votes_at is not None:
            assert policy.vote_noise_scale is not None
            layers = self.layout.num_layers
            noise = self._noise((layers,), float(policy.vote_noise_scale[0]), key, layers, 0)
            votes = (self.votes + noise)[None].float()
            history.observe_votes(_ROW, votes, torch.tensor([expected_votes]))
        else:
            tensors = [released[name] for name in self.layout.names]
            norms = layer_norms(tensors, layout=self.layout, p=1, cohort=True)
            history.observe_release(_ROW, norms / history.dims, policy.noise_scale / divisor)
        history.observe_clip_norms(_ROW, policy.clip_norm)
        count = max(1, sum(map(len, self.clients)))
        return PrivateUpdate(
            clients=torch.tensor([ALL_CLIENTS]),
            update=released,
            events=[],
            steps=1,
            policy=policy,
            sim_only={
                "clipped_fraction": (self.clipped / count)[None],
                "nonfinite": self.nonfinite.amax()[None],
            },
        )

    def _noise(
        self, shape: tuple[int, ...], scale: float, key: NoiseKey, layer: int, offset: int
    ) -> Tensor:
        mechanism = self.history.config.mechanism
        if self.survivors is None:
            return sample_noise(
                shape,
                mechanism=mechanism,
                scale=scale,
                key=key,
                step=0,
                layer=layer,
                offset=offset,
                dtype=torch.float64,
            )
        total = torch.zeros(shape, dtype=torch.float64)
        clients = torch.cat(self.clients) if self.clients else torch.empty(0, dtype=torch.int64)
        for group in clients.split(_CLIENTS_AT_ONCE) if len(clients) else ():
            total += noise_share(
                shape,
                mechanism=mechanism,
                scale=scale,
                survivors=self.survivors,
                key=key,
                clients=group,
                layer=layer,
                offset=offset,
            ).sum(0)
        return total
