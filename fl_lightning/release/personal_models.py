"""Each client's own model: the global one with its personal layers, for records like its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from aadp_kernels import Layout
from fl_lightning.data import FederatedDataModule
from fl_lightning.local.gradient import Loss
from fl_lightning.networks.functional import apply_with
from fl_lightning.release.clients import Clients
from fl_lightning.rules import Rules
from fl_lightning.values.round import Params


class Trained(Protocol):
    """What clients train, by which rules, on which records."""

    @property
    def rules(self) -> Rules: ...
    @property
    def network(self) -> nn.Module: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def data(self) -> FederatedDataModule: ...


class PersonalModels:
    """The models of all clients as they are now, fitted when they are first asked. Private.

    Args:
        run: with personal layers; its network holds the global model.
        vectorize: whether clients are fitted under one vmap, or one after another.
    """

    def __init__(self, run: Trained, *, vectorize: bool) -> None:
        size, largest = run.data.eval_batch_size, int(run.data.client_sizes.max())
        self.clients = Clients(
            run.data,
            run.network,
            run.loss,
            run.layout,
            privacy=run.rules.privacy,
            training=run.rules.training,
            vectorize=vectorize,
            max_examples=size,
            at_once=max(1, size // largest),
        )
        self._fitted: dict[int, Params] = {}

    def outputs(self, x: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, object]]:
        """What each record's own client makes of it.

        Args:
            x: records [B, ...], on the network's device.
            owners: int64 [B], whose they are.

        Returns:
            For each client among them, positions of its records, int64 [b], and the outputs.
        """
        who = owners.unique().tolist()
        self._fit([client for client in who if client not in self._fitted])
        for client in who:
            rows = (owners == client).nonzero()[:, 0]
            mine = x[rows.to(x.device)]
            yield rows, apply_with(self.clients.network, self._fitted[client], mine)

    def _fit(self, missing: list[int]) -> None:
        network = self.clients.network
        parameters = dict(network.named_parameters())
        body = {name: parameters[name].detach() for name in self.clients.layout.names}
        for some in torch.tensor(missing, dtype=torch.int64).split(self.clients.at_once):
            if not len(some):
                continue
            with torch.inference_mode(False):
                fitted = self.clients.fit_personal(some, body)
            for i, client in enumerate(some.tolist()):
                self._fitted[client] = {name: value[i] for name, value in fitted.items()}


class ModelsElsewhere:
    """The models of clients whose records are not here: nobody here can judge them."""

    def outputs(self, x: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, object]]:
        """Nothing."""
        return iter(())


def personal_models(
    run: Trained, *, vectorize: bool = False, elsewhere: bool = False
) -> PersonalModels | ModelsElsewhere | None:
    """The clients' own models; None where the run has no personal layers.

    Args:
        run: with its network on its device.
        vectorize: as in `PersonalModels`.
        elsewhere: whether clients' records are at nodes.
    """
    if not run.rules.personal:
        return None
    return ModelsElsewhere() if elsewhere else PersonalModels(run, vectorize=vectorize)


def outputs_of(
    network: nn.Module,
    models: PersonalModels | ModelsElsewhere | None,
    x: Tensor,
    owners: Tensor | None,
) -> Iterator[tuple[Tensor | slice, object]]:
    """Outputs for records [B, ...], in parts: positions, and what the model for them gives.

    Args:
        network: the global model.
        models: clients' own, in its place; None: there are none.
        x: records, on the network's device.
        owners: whose they are, int64 [B]; used where there are models.
    """
    if models is None:
        yield slice(None), network(x)
    else:
        assert owners is not None
        yield from models.outputs(x, owners)
