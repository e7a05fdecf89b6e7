"""The sum of a cohort's clipped updates, and its noise: from one hand or in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aadp_kernels import (
    Correlation,
    Layout,
    NoiseKey,
    clip_sum_noise,
    layer_norms,
    sample_noise,
)
from fl_lightning.keys import binding, digests
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import noised_votes
from fl_lightning.privacy.noise_parts import noise_part
from fl_lightning.privacy.sum_layout import nobody, with_votes
from fl_lightning.processes.together import Processes
from fl_lightning.values.release import ALL_CLIENTS
from fl_lightning.values.round import Params, PrivateUpdate

_ROW = torch.zeros(1, dtype=torch.int64)
_CLIENTS_AT_ONCE = 64


@dataclass(frozen=True)
class SharedNoise:
    """The noise of a round that takes a part of earlier rounds' noise back; secret.

    Layers and votes are one vector, in units of their noise, and share coefficients and keys. So
    the votes' part of the budget is what it is without correlation, and the tracked norms, which
    add votes up, gain as the model does.

    Args:
        coefficients: of the earlier noises, in the order of `earlier`.
        earlier: keys of the noise of earlier rounds.
        own: (what the noise hides) → key of this round's own noise, kept for later rounds; it
            takes the place of the sum's `key`.
    """

    coefficients: tuple[float, ...]
    earlier: tuple[NoiseKey, ...]
    own: Callable[[Sequence[Tensor | float | str]], NoiseKey]

    @property
    def correlation(self) -> Correlation:
        """For the kernels: every round draws at step 0 of a key of its own."""
        return Correlation((1.0, *self.coefficients), tuple((key, 0) for key in self.earlier))

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise, in units of that of independent noise."""
        return math.hypot(1.0, *self.coefficients)


class NoisedSum:
    """Weighted sum of clipped client updates; private until `release`.

    Args:
        history: released history of the cohort, one row; moved forward by the release.
        layout: layers of the network.
        multiplier: noise multiplier for a client of weight 1, votes included.
        survivors: None: one noise for the sum. A number: every client adds a part, and so many
            parts make the whole noise.
        key: noise key of this round.
        dtypes: of the released tensors; None: those of the updates that are added.
        processes: those that clients are added in; None: this one.
        shared: noise of earlier rounds in this one; None: its noise is its own.
    """

    def __init__(
        self,
        history: ReleasedHistory,
        layout: Layout,
        *,
        multiplier: float,
        survivors: int | None,
        key: NoiseKey,
        dtypes: Sequence[torch.dtype] | None = None,
        processes: Processes | None = None,
        shared: SharedNoise | None = None,
    ) -> None:
        self.history = history
        self.layout = layout
        self.survivors = survivors
        self.key = key
        self.shared = shared
        self.processes = processes or Processes()
        self.parts: list[str] = []
        self.policy = history.policy(_ROW, torch.tensor([multiplier], dtype=torch.float64))
        self.clients: list[Tensor] = []
        grid = history.config.noise_form == "grid"
        self.gridded = grid and bool((self.policy.noise_scale > 0).all())
        kind = torch.int64 if self.gridded else torch.float64
        self._whole = torch.zeros(layout.elements, dtype=kind)
        parts = zip(self._whole.split(layout.sizes), layout.shapes, strict=True)
        self.total = [part.view(shape) for part, shape in parts]  # in the memory of the whole
        self.dtypes = list(dtypes or [torch.float32] * len(layout.shapes))
        self.votes = torch.zeros(layout.num_layers, dtype=torch.float64)
        self.clipped = torch.zeros(layout.num_layers, dtype=torch.float64)
        self.nonfinite = torch.zeros(layout.num_layers, dtype=torch.float64)

    def add(self, update: Params, clients: Tensor, weights: Tensor) -> None:
        """Clip the updates [k, ...] layer by layer and add them up.

        Args:
            update: local minus global parameters, private.
            clients: ids [k].
            weights: public weights in (0, 1], [k].
        """
        tensors = [update[name] for name in self.layout.names]
        self.dtypes = [value.dtype for value in tensors]
        stats = self._add_quanta(tensors, weights) if self.gridded else None
        if stats is None:
            stats = self._add(tensors, weights)
        for kept, seen in zip((self.votes, self.clipped, self.nonfinite), stats, strict=True):
            kept += seen.cpu()
        self.clients.append(clients)

    def _add(self, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Clip, weight and add in float64; votes, clipped and non-finite counts [L]."""
        here = tensors[0].is_cpu
        sums, stats = clip_sum_noise(
            tensors,
            layout=self.layout,
            clip=self.policy.clip_norm[0],
            scale=None,
            p=self.history.config.p,
            weights=weights,
            votes_at=None if self.policy.votes_at is None else self.policy.votes_at[0],
            accumulate=self.total if here else None,
            last=False,
        )
        if not here:
            for total, value in zip(self.total, sums, strict=True):
                total += value.cpu()
        return [stats.votes, stats.clipped, stats.nonfinite]

    def _add_quanta(self, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Clip, cut every client to whole quanta of the noise and add those; counts [L].

        A weighted update clipped to w·C is w times the update clipped to C.
        """
        policy, config, counts = self.policy, self.history.config, []
        for weight in weights.unique().tolist():
            rows = weights == weight
            # w·C is what the ledger charges: its rounding must not pass it.
            shrunk = weight if weight == 1 else weight * (1 - 2.0**-50)
            _, stats = clip_sum_noise(
                [value.cpu()[rows] * weight for value in tensors],
                layout=self.layout,
                clip=policy.clip_norm[0] * shrunk,
                scale=policy.noise_scale[0],
                p=config.p,
                mechanism=config.mechanism,
                votes_at=None if policy.votes_at is None else policy.votes_at[0] * weight,
                accumulate=self.total,
                last=False,
                form="grid",
            )
            counts.append(torch.stack([stats.votes, stats.clipped, stats.nonfinite]))
        return list(torch.stack(counts).sum(0))

    def gather(self, work: Callable[[], None]) -> None:
        """Let every process add its clients; what they added up to binds the noise of all.

        Args:
            work: calls `add` for the clients of this process.
        """

        def digest() -> str:
            work()
            if self.key.simulated or self.processes.size == 1:
                return ""  # a public seed binds no values, and one process has them all
            return digests.digest([self._whole, self.votes])

        self.parts = self.processes.together(digest)

    def release(self, *, divisor: float, expected_votes: float) -> PrivateUpdate:
        """Add the noise, sum over the processes and divide by a public number.

        Args:
            divisor: expected sum of weights, > 0.
            expected_votes: expected number of clients, > 0.

        Returns:
            One row [1, ...]: the mean update.
        """
        policy = self.policy
        values = [self._whole, self.votes] if self.processes.size == 1 else self.parts
        hidden = [*values, policy.noise_scale, divisor]
        if self.shared is None:
            key = binding.step_key(self.key, 0, hidden)
        else:
            key = self.key = self.shared.own(hidden)
        sums, votes, count = self._with_noise(key)
        update = self.released(sums, votes, divisor=divisor, expected_votes=expected_votes)
        return replace(
            update,
            sim_only={
                "clipped_fraction": (self.clipped / max(1, count))[None],
                "nonfinite": self.nonfinite.amax()[None],
            },
        )

    def blocks(self) -> list[tuple[int, float, float]]:
        """The numbers in the sum, public: (count, bound before noise, scale of the whole noise).

        One block for each parameter, and one for the votes where there are any.
        """
        policy, layout = self.policy, self.layout
        bounds = [v[0].tolist() for v in (policy.clip_norm, policy.noise_scale)]
        found = [
            (math.prod(shape), bounds[0][layer], bounds[1][layer])
            for shape, layer in zip(layout.shapes, layout.layer_of, strict=True)
        ]
        if policy.vote_noise_scale is not None:
            # A vote is 1/2 or -1/2.
            found.append((layout.num_layers, 0.5, float(policy.vote_noise_scale[0])))
        return found

    def with_noise_parts(self) -> tuple[list[Tensor], Tensor]:
        """The clients that were added with their parts of the noise; private, to be masked.

        Returns:
            Sums by parameter and votes [L], float64: what goes into a secure sum.
        """
        assert self.survivors is not None
        key = binding.step_key(self.key, 0, [self._whole, self.votes, self.policy.noise_scale])
        self.total = self._noised(key)
        self._noise_votes(key)
        return self.total, self.votes

    def released(
        self, sums: Sequence[Tensor], votes: Tensor, *, divisor: float, expected_votes: float
    ) -> PrivateUpdate:
        """The mean update of a noised sum. The history moves forward by it. Both are public.

        Args:
            sums: by parameter, float64.
            votes: [1, L], not read where there are none.
            divisor, expected_votes: as in `release`.
        """
        policy, history = self.policy, self.history
        mean = torch.cat([value.view(-1) for value in sums]) / divisor
        if len(set(self.dtypes)) == 1:
            mean = mean.to(self.dtypes[0])  # once for all
        released = {
            name: value.to(dtype).view(1, *shape)
            for name, value, dtype, shape in zip(
                self.layout.names,
                mean.split(self.layout.sizes),
                self.dtypes,
                self.layout.shapes,
                strict=True,
            )
        }
        if policy.votes_at is not None:
            history.observe_votes(_ROW, votes, torch.tensor([expected_votes]))
        else:
            tensors = [released[name] for name in self.layout.names]
            norms = layer_norms(tensors, layout=self.layout, p=1, cohort=True)
            scale = policy.noise_scale * (1.0 if self.shared is None else self.shared.deviation)
            history.observe_release(_ROW, norms / history.dims, scale / divisor)
        history.observe_clip_norms(_ROW, policy.clip_norm)
        return PrivateUpdate(
            clients=torch.tensor([ALL_CLIENTS]),
            update=released,
            events=[],
            steps=1,
            policy=policy,
        )

    def _with_noise(self, key: NoiseKey) -> tuple[list[Tensor], Tensor, int]:
        """Noised sums and votes [1, L] of all processes, and how many clients are in them.

        A process adds the parts of its own clients before the sums meet; the noise of one hand
        is the same in every process and added after that.
        """
        if self.survivors is not None:
            self.total = self._noised(key)
            self._noise_votes(key)
            count = self._meet()
            return self.total, self.votes[None].float(), count
        count = self._meet()
        config, voting = self.history.config, self.policy.votes_at is not None
        if voting and config.noise_form != "grid":
            *sums, votes = self._noised_once(key, votes=True)
            return sums, votes[None].float(), count
        # Where a layer has no noise the grid form has no quanta to count.
        once = self.gridded or config.noise_form != "grid"
        sums = self._noised_once(key) if once else self._noised(key)
        votes = self.votes[None]
        if voting:
            votes = noised_votes(votes, self.policy, config, key, 0, _ROW)
        return sums, votes, count

    def _correlation(self) -> Correlation | None:
        return None if self.shared is None else self.shared.correlation

    def _meet(self) -> int:
        """Sum everything over the processes; the number of clients in it."""
        count = torch.tensor(sum(map(len, self.clients)))
        parts = [*self.total, self.votes, self.clipped, self.nonfinite, count]
        *self.total, self.votes, self.clipped, self.nonfinite, count = self.processes.sum(parts)
        return int(count)

    def _noised(self, key: NoiseKey) -> list[Tensor]:
        """The sums with noise, tensor by tensor; float64, as `_noised_once` has it."""
        layout, scale = self.layout, self.policy.noise_scale[0]
        places = zip(self.total, layout.shapes, layout.layer_of, layout.offsets, strict=True)
        return [
            total + self._noise(shape, float(scale[layer]), key, layer, offset)
            for total, shape, layer, offset in places
        ]

    def _noised_once(self, key: NoiseKey, *, votes: bool = False) -> list[Tensor]:
        """The sums with one noise, float64: rounded noise on a rounded sum would show the sum.

        Whole-number sums get whole-number noise and become multiples of the quanta. The noise of
        all layers is drawn in one call: that of a small layer alone costs as much as that of many.
        With `votes` these are the last layer, whose address and noise are those of `noised_votes`.
        """
        config, layout, total = self.history.config, self.layout, self.total
        scale = self.policy.noise_scale[0]
        if votes:
            assert self.policy.vote_noise_scale is not None
            layout, total = with_votes(layout), [*total, self.votes]
            scale = torch.cat([scale, self.policy.vote_noise_scale])
        noised, _ = clip_sum_noise(
            nobody(layout),
            layout=layout,
            clip=torch.ones_like(scale),
            scale=scale,
            p=config.p,
            mechanism=config.mechanism,
            key=key,
            step=0,
            accumulate=total,
            form=config.noise_form,
            correlation=self._correlation(),
        )
        return noised

    def _noise_votes(self, key: NoiseKey) -> None:
        """Add the parts of noise on votes, where there are votes."""
        if self.policy.vote_noise_scale is not None:
            layers, scale = self.layout.num_layers, float(self.policy.vote_noise_scale[0])
            self.votes = self.votes + self._noise((layers,), scale, key, layers, 0)

    def _noise(
        self, shape: tuple[int, ...], scale: float, key: NoiseKey, layer: int, offset: int
    ) -> Tensor:
        mechanism, form = self.history.config.mechanism, self.history.config.noise_form
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
                form=form,
            )
        total = torch.zeros(shape, dtype=torch.float64)
        clients = torch.cat(self.clients) if self.clients else torch.empty(0, dtype=torch.int64)
        for group in clients.split(_CLIENTS_AT_ONCE) if len(clients) else ():
            total += noise_part(
                shape,
                mechanism=mechanism,
                scale=scale,
                survivors=self.survivors,
                key=key,
                clients=group,
                layer=layer,
                offset=offset,
                form=form,
            ).sum(0)
        return total
