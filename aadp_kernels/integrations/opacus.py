"""Opacus' PrivacyEngine with the clipping and the noise of this package.

One line of an existing script changes:

    from aadp_kernels.integrations.opacus import PrivacyEngine  # was: from opacus import ...

What is different: noise and Poisson coins come from a secret `NoiseKey` (Opacus' own secure mode
needs a package that is no longer built); a model of layers that can clip in backward never holds
per-sample gradients; L1 clips and Laplace noise, with an accountant of their own; batches in a
fixed cyclic order with correlated noise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import opacus
import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aadp_kernels import _validate
from aadp_kernels.integrations._clip_norms import set_clip_norms
from aadp_kernels.integrations._opacus import ClippedModule, LaplaceAccountant, PrivateOptimizer
from aadp_kernels.integrations._opacus_cyclic import CyclicLoader, CyclicRun
from aadp_kernels.integrations._per_sample import check_layers, inner, use_right_samplers
from aadp_kernels.integrations._rows import ExpandedWatch, RowWatch
from aadp_kernels.integrations._wrapped import check_precision
from aadp_kernels.integrations.cyclic import CyclicSteps
from aadp_kernels.integrations.release import layer_clips
from aadp_kernels.layout import Layout
from aadp_kernels.noise import poisson_mask
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.sampler_limits import MECHANISMS

__all__ = [
    "ClippedModule",
    "CyclicSteps",
    "LaplaceAccountant",
    "PrivacyEngine",
    "PrivateOptimizer",
]

_LOG = logging.getLogger("aadp_kernels")
_MODES = ("hooks", "functorch", "ew")


class SecretSampler(UniformWithReplacementSampler):
    """Opacus' Poisson batches with coins from a secret key."""

    _draw: Callable[[], Tensor]

    def __iter__(self) -> Iterator[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for _ in range(self.steps):
            yield self._draw().nonzero().flatten().tolist()


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` with certified clips, secret noise, L1 clips and Laplace noise.

    Args:
        accountant: As in Opacus for gaussian ("prv" by default); for laplace "laplace", the
            default there.
        secure_mode: Ignored: noise and coins always come from `key`.
        mechanism: "gaussian" or "laplace".
        p: Norm of the clipping; None: 2 for gaussian, 1 for laplace.
        key: Secret key; None: a new one from the operating system. An own key must not be given to
            a second engine, nor again after a restart, because steps count from zero.

    Raises:
        ValueError: laplace with p = 2 or with an accountant of Gaussian noise.

    Guarantees:
        Record level, one record added or removed, in real arithmetic; epsilon is the accountant's,
        for `noise_multiplier` z (sum_l (C_l / stddev_l)^2 = 1 / z^2) or lambda (sum_l C_l / b_l = 1
        / lambda). All layers get noise of the same scale, as in Opacus.

    Edge cases:
        | `make_private(...)` | what happens |
        |---|---|
        | clipping="flat" | one norm for all parameters, from per-sample gradients |
        | clipping="per_layer", a number | each of L modules gets C / sqrt(L), or C / L with p = 1 |
        | ..., one number for each module | clip in backward if the model allows it |
        | ..., one number for each parameter | as in Opacus, from per-sample gradients |
        | clipping="adaptive", ghost modes, distributed models | ValueError |
        | poisson_sampling=False | ValueError: the accountants' epsilon would not hold |
        | ..., cyclic=CyclicSteps(...) | batches in a fixed cyclic order, correlated noise |
        | noise_generator | ValueError: pass `key` |
    """

    def __init__(
        self,
        *,
        accountant: str | None = None,
        secure_mode: bool = False,
        mechanism: str = "gaussian",
        p: int | None = None,
        key: NoiseKey | None = None,
    ) -> None:
        _validate.one_of("mechanism", mechanism, MECHANISMS)
        self.p = p if p is not None else 1 if mechanism == "laplace" else 2
        _validate.one_of("p", self.p, (1, 2))
        laplace = mechanism == "laplace"
        if laplace and self.p == 2:
            raise ValueError("p must be 1 with laplace noise, got 2: an L2 bound does not bound L1")
        accountant = accountant or ("laplace" if laplace else "prv")
        if laplace != (accountant == "laplace"):
            raise ValueError(f"accountant {accountant!r} does not know {mechanism} noise")
        with warnings.catch_warnings():
            # Opacus warns of its own generator, which is not used.
            warnings.simplefilter("ignore")
            super().__init__(accountant=accountant)
        self.accountant = create_accountant(accountant)
        self.mechanism = mechanism
        self._key = NoiseKey.random() if key is None else key
        self._releases, self._draws = 0, 0

    def make_private(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        criterion: Any = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: Any = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        cyclic: CyclicSteps | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader]:
        """As `opacus.PrivacyEngine.make_private`; the table above says what differs.

        Args:
            cyclic: With poisson_sampling=False: the order of the batches, how many steps there will
                be, and the coefficients of the noise. The first step is charged for the whole run.
                Each batch is followed by one step; a further plan is a further charge.

        Returns:
            (model, optimizer, data loader). The model shares its parameters with `module`.

        Raises:
            ValueError: See the table; clip norms that do not fit.
        """
        _validate.one_of("clipping", clipping, ("flat", "per_layer"))
        _validate.one_of("grad_sample_mode", grad_sample_mode, _MODES)
        _validate.one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        if noise_generator is not None:
            raise ValueError("noise_generator must be None: pass key to PrivacyEngine")
        self._check_order(poisson_sampling, cyclic)
        if torch.distributed.is_available() and isinstance(
            module, nn.parallel.DistributedDataParallel
        ):
            raise ValueError("module must not be distributed: see aadp_kernels.integrations.ddp")
        _validate.finite_nonnegative("noise_multiplier", noise_multiplier)
        trained = _trained(module, optimizer)
        layout = _layout(trained, clipping, max_grad_norm)
        clips = layer_clips(max_grad_norm, layout, self.p)
        model: Any = None
        if clipping == "per_layer" and wrap_model and batch_first:
            model = self._clipped(module, layout, trained, loss_reduction)
        if model is None:
            model = self._sampled(module, batch_first, loss_reduction, grad_sample_mode, wrap_model)
        model.forbid_grad_accumulation()
        run = None if cyclic is None else CyclicRun(cyclic, noise_multiplier)
        if run is None:
            sample_rate = 1 / len(data_loader)
            loader: DataLoader = self._prepare_data_loader(
                data_loader, distributed=False, poisson_sampling=True, batch_first=batch_first,
                rand_on_empty=rand_on_empty,
            )  # fmt: skip
            expected: float = int(len(data_loader.dataset) * sample_rate)  # pyright: ignore
            hook = self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate)
        else:
            loader = CyclicLoader(data_loader, run)
            expected = len(loader.dataset) / run.plan.period  # pyright: ignore
            hook = run.charge(self.accountant)
        private = PrivateOptimizer(
            optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
            model=model, layout=layout, clips=clips, p=self.p, mechanism=self.mechanism,
            noise_multiplier=noise_multiplier, loss_reduction=loss_reduction,
            expected_batch_size=expected, key=self._key, next_step=self._next_step, cyclic=run,
        )  # fmt: skip
        private.attach_step_hook(hook)
        return model, private, loader

    def make_private_with_epsilon(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, target_epsilon: float, target_delta: float, **options: Any
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader]:
        """As in Opacus; with `cyclic`, the noise multiplier with which the whole plan costs that.

        Args:
            target_epsilon: Of the run, by this engine's accountant.
            target_delta: Of the run.
            options: Those of `make_private` without noise_multiplier, and `epochs` without a plan.
        """
        cyclic = options.pop("cyclic", None)
        target = {"target_epsilon": target_epsilon, "target_delta": target_delta}
        if cyclic is None:
            return super().make_private_with_epsilon(**target, **options)  # pyright: ignore
        options.pop("epochs", None)
        with np.errstate(divide="ignore"):
            one = get_noise_multiplier(
                **target, sample_rate=1.0, steps=1, accountant=self.accountant.mechanism()
            )
        multiplier = one * cyclic.sensitivity
        return self.make_private(noise_multiplier=multiplier, cyclic=cyclic, **options)

    def get_epsilon(self, delta: float) -> float:
        """As in Opacus."""
        # The prv accountant takes the logarithm of 1 - q, which is 0 for a cyclic plan.
        with np.errstate(divide="ignore"):
            return super().get_epsilon(delta)

    def _check_order(self, poisson_sampling: bool, cyclic: CyclicSteps | None) -> None:
        """Whether the accountant knows the batches."""
        if cyclic is None and not poisson_sampling:
            raise ValueError(
                "poisson_sampling must be True: no accountant is valid without it; or give the "
                "order of the batches as cyclic"
            )
        if cyclic is not None and poisson_sampling:
            raise ValueError("poisson_sampling must be False with cyclic: its order is fixed")
        if cyclic is not None and self.mechanism != "gaussian":
            raise ValueError(f"cyclic must be None with {self.mechanism} noise: it has no proof")

    def _sampled(
        self,
        module: nn.Module,
        batch_first: bool,
        loss_reduction: str,
        grad_sample_mode: str,
        wrap_model: bool,
    ) -> Any:
        """Opacus' model of per-sample gradients, watched."""
        check_layers(inner(module), grad_sample_mode)
        model: Any = self._prepare_model(
            module, batch_first=batch_first, loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode, wrap_model=wrap_model,
        )  # fmt: skip
        if grad_sample_mode == "ew":
            ExpandedWatch(model)
        else:
            use_right_samplers(model, batch_first=batch_first)
            RowWatch(model, batch_first=batch_first)
        return model

    def _clipped(
        self, module: nn.Module, layout: Layout, trained: Iterable[str], loss_reduction: str
    ) -> ClippedModule | None:
        """The model that clips in backward, or None if it cannot or the layers are others."""
        if isinstance(module, AbstractGradSampleModule):
            return None
        names = list(trained)
        try:
            check_precision({n: p for n, p in module.named_parameters() if n in names})
            model = ClippedModule(module, p=self.p, loss_reduction=loss_reduction)
            set_clip_norms(model._module, layout, torch.ones(layout.num_layers))
        except ValueError as error:  # per-sample gradients serve any model
            _LOG.warning(
                "Opacus' per-sample gradients are clipped, which is slower than clipping in "
                "backward, because %s", error,
            )  # fmt: skip
            return None
        self.validate(module=module, optimizer=None, data_loader=None)  # pyright: ignore
        model.watch(names)
        return model

    def _next_step(self) -> int:
        """Address of the next release; no two releases of this engine share one."""
        self._releases += 1
        return self._releases - 1

    def _prepare_data_loader(self, data_loader: DataLoader, **options: Any) -> DataLoader:
        """Opacus' loader, with coins from the key instead of torch's global generator."""
        loader = super()._prepare_data_loader(data_loader, **options)
        sampler: Any = loader.batch_sampler

        def draw() -> Tensor:
            self._draws += 1
            return poisson_mask(
                sampler.num_samples, sampler.sample_rate, key=self._key, step=self._draws - 1
            )

        # The loader accepts no other sampler once it is made, and Opacus asks for this class.
        sampler.__class__ = SecretSampler
        sampler._draw = draw
        return loader


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters that are not frozen, by their names, in its order."""
    names = {id(p): name.removeprefix("_module.") for name, p in module.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(id(p) not in names for p in trained):
        raise ValueError("the optimizer has parameters that the module has not")
    return {names[id(p)]: p for p in trained}


def _layout(
    trained: dict[str, nn.Parameter], clipping: str, max_grad_norm: float | Sequence[float]
) -> Layout:
    """The trained parameters: one layer (flat), one a module or one a parameter."""
    if clipping == "flat":
        return Layout.build(trained, dict.fromkeys(trained, "all"))
    layout = Layout.build(trained)
    several = isinstance(max_grad_norm, Sequence | Tensor) and torch.as_tensor(max_grad_norm).dim()
    if several and len(max_grad_norm) == len(trained) != layout.num_layers:  # pyright: ignore
        return Layout.build(trained, {name: name for name in trained})
    return layout
