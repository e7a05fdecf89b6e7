"""What the project does with a network, by its own code and without noise."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from aadp_kernels import Layout, grid
from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import CohortGradient
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.preflight.checks import check_run
from fl_lightning.privacy import clipping as rules
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.values.round import LayerPolicy
from tests.networks.oracle import Gradients, Rule

Loss = Callable[[Any, Tensor], Tensor]
NOISE_SCALE = 1.0  # in clip norms


@dataclass(frozen=True)
class Setting:
    """What is clipped together, for which noise."""

    clipping: str = "layer"
    mechanism: str = "gaussian"
    noise_form: str = "wide"
    setting: str = "record+local"

    @property
    def p(self) -> int:
        """Norm of a layer."""
        return 1 if self.mechanism == "laplace" else 2

    def config(self) -> PrivacyConfig:
        """As a user gives it."""
        return PrivacyConfig(
            setting=self.setting,  # pyright: ignore[reportArgumentType]
            clipping=self.clipping,  # pyright: ignore[reportArgumentType]
            mechanism=self.mechanism,  # pyright: ignore[reportArgumentType]
            noise_form=self.noise_form,  # pyright: ignore[reportArgumentType]
            epsilon=None,
            noise_multiplier=1.0,
            seed=1,
        )

    def __str__(self) -> str:
        return f"{self.clipping}, {self.mechanism}, {self.noise_form}"


RECORD_SETTINGS = tuple(
    Setting(clipping, mechanism, noise_form)
    for clipping in ("layer", "flat", "joint")
    for mechanism in ("gaussian", "laplace")
    for noise_form in ("wide", "grid")
    if (clipping, noise_form) != ("joint", "grid")
)


class Refused(Exception):
    """The project refuses the network, in one line, before anything is released."""


@functools.cache
def _trainer() -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip


def dataset(x: Tensor, y: Tensor, classes: int) -> FederatedDataModule:
    """The records, dealt to two clients."""
    arrays = from_arrays(x, y, num_classes=classes, codes=not x.is_floating_point())
    data = FederatedDataModule(arrays, num_clients=2, val_fraction=0)
    data.setup()
    return data


def accepted(
    network: nn.Module,
    loss: nn.Module | None,
    data: FederatedDataModule,
    setting: Setting,
    execution: str = "auto",
) -> tuple[FederatedModule, bool]:
    """The module as far as a run comes without its ledger, and whether clients can be vmapped.

    Raises:
        Refused: with the project's own words.
    """
    try:
        module = FederatedModule(
            network, setting.config(), loss=loss, sampling_rate=0.5, clients_per_round=2,
            execution=execution,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        trainer = _trainer()
        module.trainer = trainer
        trainer.datamodule = data  # pyright: ignore[reportAttributeAccessIssue]
        vmaps = check_run(module.proposed(data, trainer))
    except ValueError as error:
        raise Refused(str(error)) from error
    return module, vmaps


@dataclass
class Ways:
    """What a network's sums were made by."""

    vectorize: bool
    backward: int = 0
    records: int = 0

    def __str__(self) -> str:
        by_records = "vmap" if self.vectorize else "loop"
        if self.records and self.backward:
            return f"backward, {by_records}"
        return by_records if self.records else "backward"


@dataclass(frozen=True)
class Product:
    """Clipped sums of a network as a run computes them.

    Args:
        module: what the checks of a run accepted.
        setting: its rule.
        rule: clip norms and shares.
        ways: how the sums are made, counted call by call.
    """

    module: FederatedModule
    setting: Setting
    rule: Rule
    layout: Layout
    ways: Ways
    max_examples: int = 2**40

    @functools.cached_property
    def _run(self) -> Callable[..., tuple[Gradients, Tensor]]:
        module, setting = self.module, self.setting
        data: Any = module.data
        example = data.x[:1].to(dtype=input_dtype(module.network, data.x))
        with self._counted():
            return clipped_sums(
                module.network, module.loss, self.layout, p=setting.p,
                vectorize=self.ways.vectorize, max_examples=self.max_examples, example=example,
                grid=setting.mechanism if setting.noise_form == "grid" else None,
                clipping=setting.clipping, mechanism=setting.mechanism,
            )  # fmt: skip

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the calls of per-sample gradients within."""
        made = rules.per_sample_gradients

        def counting(*args: Any, **kwargs: Any) -> Callable[..., Gradients]:
            gradients = made(*args, **kwargs)

            def counted(*given: Any) -> Gradients:
                self.ways.records += 1
                return gradients(*given)

            return counted

        with mock.patch.object(rules, "per_sample_gradients", counting):
            yield

    def sums(self, params: Sequence[Gradients], batch: Batch) -> list[Gradients]:
        """Clipped sums of each client, float64.

        Args:
            params: each client's parameters.
            batch: records of the clients.
        """
        shared = len(params) == 1
        given = (
            params[0]
            if shared
            else {n: torch.stack([p[n] for p in params]) for n in self.layout.names}
        )
        before = self.ways.records
        with torch.no_grad():
            sums, _ = self._run(given, shared, batch, self._policy(len(batch.x)))
        self.ways.backward += self.ways.records == before
        unit = dict.fromkeys(self.layout.names, 1.0)
        if self.setting.noise_form == "grid":
            for name in self.layout.names:
                scale = NOISE_SCALE * self.rule.clips[self.rule.layer(name)]
                unit[name] = float(grid.quantum(scale, self.setting.mechanism))
        wide = {
            n: v.to(torch.complex128 if v.is_complex() else torch.float64) * unit[n]
            for n, v in sums.items()
        }
        return [{n: v[i] for n, v in wide.items()} for i in range(len(batch.x))]

    def _policy(self, clients: int) -> LayerPolicy:
        def rows(of: dict[str, float]) -> Tensor:
            row = [of[name] for name in self.layout.layer_names]
            return torch.tensor(row, dtype=torch.float64).expand(clients, -1)

        shares = rows(self.rule.shares)
        return LayerPolicy(
            rows(self.rule.clips), shares, shares, NOISE_SCALE * rows(self.rule.clips)
        )


def layout_of(network: nn.Module, setting: Setting) -> Layout:
    """The trained parameters in the layers of a setting."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    flat = dict.fromkeys(trained, "all") if setting.clipping == "flat" else None
    return Layout.build(trained, flat)


def parameters(network: nn.Module, layout: Layout) -> Gradients:
    """The trained parameters of a network by name."""
    held = dict(network.named_parameters())
    return {n: held[n].detach().clone() for n in layout.names}


def batch_of(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Batch:
    """A batch of k clients from x [k, B, ...] and y [k, B]; padding is zeros, as `gather` gives."""
    ones = torch.ones(len(x))
    mask = torch.ones(x.shape[:2]) if mask is None else mask
    hidden = mask.view(*mask.shape, *[1] * (x.ndim - 2)) == 0
    return Batch(x.masked_fill(hidden, 0), y, mask, ones, ones.bool())


def plain_sums(module: FederatedModule, batch: Batch, vectorize: bool) -> Gradients:
    """Unclipped sums of gradients as the client settings train by, of one client."""
    layout = module.layout
    gradient = CohortGradient(module.network, module.loss, vectorize=vectorize)
    with torch.no_grad():
        sums, _ = gradient(parameters(module.network, layout), batch, shared=True)
    return {n: v[0] for n, v in sums.items()}
