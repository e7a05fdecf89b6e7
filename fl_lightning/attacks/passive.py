"""The attacker who sees all releases: a server that only watches.

Each round it computes every candidate's gradient at the model of the round and asks how much the
release of the candidate's client looks as if that gradient were in it: the log likelihood ratio of
two Gaussians around the background, whose mean and variance are taken from the other clients'
releases. What the server knows it uses: clip norms, sampling rate, learning rate, numbers of
records. Ratios of all rounds are added.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_lightning.attacks.candidates import Candidates
from fl_lightning.local.rows import flat_rows
from fl_lightning.module import FederatedModule
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.privacy.clipping import per_sample_gradients
from fl_lightning.values.release import ALL_CLIENTS
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

_MOST_NUMBERS = 2**22  # of gradients held at once: few enough for a processor's cache


class PassiveServer:
    """An observer of releases that adds up evidence on each candidate.

    Args:
        module: of the run; rules, network and loss are public.
        candidates: records asked about.
        sizes: records of each client [K], public.

    Attributes:
        scores: log likelihood ratios [n], higher for members.
    """

    def __init__(
        self, module: FederatedModule, candidates: Candidates, sizes: npt.NDArray[np.int64]
    ) -> None:
        self.module = module
        self.candidates = candidates
        self.sizes = torch.from_numpy(sizes)
        self.scores = np.zeros(len(candidates))
        self._gradients = per_sample_gradients(module.network, module.loss, True)

    def __call__(self, round: int, params: Params, update: PrivateUpdate) -> None:
        if not len(update.clients):
            return
        released = self._sums(update)
        mean = released.mean(0, keepdim=True)
        others = max(1, len(released) - 1)
        # A release beside the mean of the other ones.
        centred = (released - mean) * (len(released) / others if len(released) > 1 else 1.0)
        if len(released) == 1:
            centred = released
        variance = self._by_layer(centred.square().mean(0))
        row_of = {int(c): i for i, c in enumerate(update.clients)}
        asked = self.candidates.client
        rows = np.array([row_of.get(int(c), row_of.get(ALL_CLIENTS, -1)) for c in asked])
        for part in np.array_split(np.flatnonzero(rows >= 0), self._parts(len(asked))):
            if len(part):
                self._add(part, rows[part], params, centred, variance, update.policy)

    def _parts(self, count: int) -> int:
        return max(1, math.ceil(count * sum(self.module.layout.dims) / _MOST_NUMBERS))

    @property
    def _expected_uses(self) -> float:
        """How often a record is in a batch of one release, on average."""
        training, largest = self.module.rules.training, int(self.sizes.max())
        if training.sampling_rate is not None:
            return training.noised_steps * training.sampling_rate
        if training.local_steps is None:
            return float(training.local_epochs)
        assert training.batch_size is not None
        return training.local_steps * training.batch_size / largest

    def _sums(self, update: PrivateUpdate) -> Tensor:
        """Releases as sums of gradients, as far as one step explains them, [k, d]."""
        layout, training = self.module.layout, self.module.rules.training
        flat = torch.cat([flat_rows(update.update[n]) for n in layout.names], 1)
        if int(update.clients[0]) == ALL_CLIENTS:
            divisor = self.sizes.sum()[None].double()
        else:
            divisor = self.sizes[update.clients].double()
        if training.batch_size is not None:
            divisor = divisor.clamp(max=training.batch_size)
        elif training.sampling_rate is not None:
            divisor = divisor * training.sampling_rate
        return -flat * (divisor / training.lr).float()[:, None]

    def _by_layer(self, values: Tensor) -> Tensor:
        """Each number replaced by the mean over its layer, [d]; never 0."""
        layers = self._layer_of_number()
        count = torch.bincount(layers).clamp(min=1)
        total = torch.zeros(len(count)).index_add(0, layers, values)
        return (total / count).clamp(min=1e-20)[layers]

    def _layer_of_number(self) -> Tensor:
        layout = self.module.layout
        params = dict(self.module.network.named_parameters())
        return torch.cat(
            [
                torch.full((params[n].numel(),), layer)
                for n, layer in zip(layout.names, layout.layer_of, strict=True)
            ]
        )

    def _add(
        self,
        part: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        params: Params,
        centred: Tensor,
        variance: Tensor,
        policy: LayerPolicy | None,
    ) -> None:
        x, index = self.candidates.x[part], torch.from_numpy(rows)
        with torch.no_grad():
            grads = self._gradients(
                params, x.to(input_dtype(self.module.network, x)), self.candidates.y[part]
            )
        expected = torch.cat([flat_rows(grads[n]) for n in self.module.layout.names], 1)
        if policy is not None and self.module.privacy.unit == "record":
            expected = self._clipped(expected, policy.clip_norm[index])
        uses = self._expected_uses
        expected = expected * max(1.0, uses)
        weighted = expected / variance
        ratio = (weighted * centred[index]).sum(1) - 0.5 * (weighted * expected).sum(1)
        chance = min(1.0, uses)
        ratio = ratio.double()
        if chance < 1:
            # The coins of a batch are secret: log(1 - q + q·exp(ratio)).
            ratio = torch.logaddexp(
                torch.full_like(ratio, math.log1p(-chance)), ratio + math.log(chance)
            )
        self.scores[part] += ratio.numpy()

    def _clipped(self, gradients: Tensor, clip_norm: Tensor) -> Tensor:
        """Gradients [b, d] with each layer scaled down to its clip norm [b, L]."""
        layers, order = self._layer_of_number(), self.module.privacy.p
        total = torch.zeros(len(gradients), clip_norm.shape[1])
        total.index_add_(1, layers, gradients.abs() ** order)
        factor = (clip_norm.float() / total.pow(1 / order).clamp(min=1e-20)).clamp(max=1.0)
        return gradients * factor[:, layers]
