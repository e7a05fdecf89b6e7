"""What stands in the place of Opacus' accountant, wrapped model and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from opacus.accountants import IAccountant, register_accountant
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aadp_kernels.clip_in_backward.modules import with_clipping
from aadp_kernels.clip_sum import clip_sum_noise
from aadp_kernels.integrations._clip_norms import set_clip_norms
from aadp_kernels.integrations._gradients import ClippedSums
from aadp_kernels.integrations._opacus_cyclic import CyclicRun
from aadp_kernels.integrations._watch import Watch
from aadp_kernels.integrations.optim import add_noise_
from aadp_kernels.integrations.release import amplified, compose_pure, equal_scales
from aadp_kernels.layout import Layout
from aadp_kernels.noise_key import NoiseKey


class LaplaceAccountant(IAccountant):
    """Accountant of Laplace noise under Poisson sampling; registered with Opacus as "laplace".

    A step with noise multiplier lambda (sum_l C_l / b_l = 1 / lambda) is ln(1 + q (e^(1/lambda) -
    1))-DP with delta 0 for records under add or remove; steps are composed by `compose_pure`, which
    uses no more than that and so is an upper bound.
    """

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step."""
        last = self.history.pop() if self.history else (noise_multiplier, sample_rate, 0)
        if last[:2] != (noise_multiplier, sample_rate):
            self.history.append(last)
            last = (noise_multiplier, sample_rate, 0)
        self.history.append((*last[:2], last[2] + 1))

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Epsilon at delta; delta 0 is allowed."""
        pairs = [
            (amplified(1 / z, min(q, 1.0)) if z > 0 else float("inf"), steps)
            for z, q, steps in self.history
        ]
        return compose_pure(pairs, delta)

    def __len__(self) -> int:
        return sum(steps for _, _, steps in self.history)

    @classmethod
    def mechanism(cls) -> str:
        """The accountant's name."""
        return "laplace"


register_accountant("laplace", LaplaceAccountant, force=True)


class ClippedModule(nn.Module):
    """A model that clips in backward, in the place of Opacus' GradSampleModule.

    It shares its parameters with the model it was made from, which is `_module` as in Opacus. Its
    forwards and backward passes are watched once `watch` is called.
    """

    sums: ClippedSums

    def __init__(self, module: nn.Module, *, p: int, loss_reduction: str) -> None:
        super().__init__()
        self._module = with_clipping(module, p=p)
        for copied, original in zip(self._module.modules(), module.modules(), strict=True):
            for name, parameter in original.named_parameters(recurse=False):
                copied._parameters[name] = parameter
        self.loss_reduction = loss_reduction

    def watch(self, names: Iterable[str]) -> None:
        """Gather the clipped sums of these parameters, from now on."""
        parameters = dict(self._module.named_parameters())
        self.sums = ClippedSums({name: parameters[name] for name in names}, micro_batches=True)
        self._watch = Watch(self._module, self.sums, owner=self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; backward undoes the mean over the batch."""
        output = self._module(*args, **kwargs)
        if self.loss_reduction == "mean" and self.training and torch.is_grad_enabled():
            batch = self._watch.last_records
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(_times, batch))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)

    def forbid_grad_accumulation(self) -> None:
        """More than one forward with a backward pass between two steps raises from now on."""
        self.sums.micro_batches = False

    def allow_grad_accumulation(self) -> None:
        """Any number of forwards between two steps, each of other records."""
        self.sums.micro_batches = True


def _times(batch: int | None, grad: Tensor) -> Tensor:
    """The gradient of a sum over the batch from that of a mean."""
    if batch is None:
        raise ValueError("the model must be called with a tensor [batch, ...]")
    return grad * batch


class PrivateOptimizer(DPOptimizer):
    """Opacus' DPOptimizer with per-layer clips and noise from a NoiseKey.

    `max_grad_norm` can be set by Opacus' schedulers: all clip norms are scaled alike. With a
    `cyclic` run the noise of neighbouring steps is correlated.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module,
        layout: Layout,
        clips: Tensor,
        p: int,
        mechanism: str,
        noise_multiplier: float,
        expected_batch_size: float,
        loss_reduction: str,
        key: NoiseKey,
        next_step: Callable[[], int],
        cyclic: CyclicRun | None = None,
    ) -> None:
        self._layout, self._unit_clips, self._model = layout, clips / clips.norm(p), model
        self._p, self._mechanism, self._key, self._next_step = p, mechanism, key, next_step
        self._sums: list[Tensor] | None = None
        self._stale, self._cyclic = False, cyclic
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=float(clips.norm(p)),
            expected_batch_size=expected_batch_size,  # pyright: ignore[reportArgumentType]
            loss_reduction=loss_reduction,
        )  # fmt: skip
        self._trained = [id(p) for p in self.params]

    @property
    def max_grad_norm(self) -> float:
        """Norm of all clip norms together."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = value
        if isinstance(self._model, ClippedModule):
            set_clip_norms(self._model._module, self._layout, self.clip_norms)

    @property
    def clip_norms(self) -> Tensor:
        """Clip norm of each layer, float64 [L]."""
        return self._unit_clips * self._max_grad_norm

    @property
    def noise_scales(self) -> Tensor:
        """Noise scale of each layer, float64 [L]."""
        return equal_scales(
            self.clip_norms, mechanism=self._mechanism, noise_multiplier=self.noise_multiplier,
            adjacency="zero_out",
        )  # fmt: skip

    @property
    def accumulated_iterations(self) -> int:
        """Backward passes since the last step that was taken."""
        if not isinstance(self._model, ClippedModule):
            return super().accumulated_iterations
        return max(1, self._model.sums.forwards)

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add the clipped sums of this physical batch to those of the logical batch."""
        self._check_parameters()
        if isinstance(self._model, ClippedModule):
            grads = self._model.sums.take()
            if self._sums is None:
                self._sums = [grad.clone() for grad in grads]
            else:
                for total, grad in zip(self._sums, grads, strict=True):
                    total.add_(grad)
        else:
            for p in self.params:
                _check_processed_flag(p.grad_sample)  # pyright: ignore
            self._sums, _ = clip_sum_noise(
                self.grad_samples, layout=self._layout, clip=self.clip_norms, scale=None,
                p=self._p, accumulate=self._sums, last=False,
            )  # fmt: skip
            for p in self.params:
                _mark_as_processed(p.grad_sample)  # pyright: ignore
        self._stale = True

    def _check_parameters(self) -> None:
        """Raise unless the gradients are new, and of the parameters that noise is made for."""
        if self._stale:
            raise ValueError("call optimizer.zero_grad() between two steps")
        if isinstance(self._model, ClippedModule) and self._model._watch.closed:
            raise ValueError(f"this optimizer has retired: {self._model._watch.closed}")
        frozen = [p for g in self.param_groups for p in g["params"] if not p.requires_grad]
        if any(p.grad is not None for p in frozen):
            raise ValueError("a frozen parameter of the optimizer has a gradient: set it to None")
        trained = [id(p) for p in self.params]
        if trained != self._trained:
            names = {id(p): n for n, p in self._model.named_parameters()}
            other = set(trained) ^ set(self._trained)
            raise ValueError(
                "the optimizer's trained parameters are not those of make_private any more: "
                f"{', '.join(sorted(names.get(i, '?') for i in other))}; call make_private again"
            )

    @torch.no_grad()
    def add_noise(self) -> None:
        """Write the noisy sums into the gradients."""
        assert self._sums is not None
        step, cyclic = self._next_step(), self._cyclic
        among = None if cyclic is None else cyclic.correlation(self._key, step)
        noise = {
            "mechanism": self._mechanism, "key": self._key, "step": step, "correlation": among,
        }  # fmt: skip
        if isinstance(self._model, ClippedModule):
            add_noise_(self._sums, self._layout, scale=self.noise_scales, **noise)
            noisy = self._sums
        else:
            nobody = [p.new_empty((0, *p.shape)) for p in self.params]
            noisy, _ = clip_sum_noise(
                nobody, layout=self._layout, clip=self.clip_norms, scale=self.noise_scales,
                p=self._p, accumulate=self._sums, **noise,
            )  # fmt: skip
        for p, grad in zip(self.params, noisy, strict=True):
            p.grad = grad
        self._sums = None

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the gradients; the sums of skipped steps are kept."""
        super().zero_grad(set_to_none)
        self._stale = False
        if isinstance(self._model, ClippedModule):
            self._model.sums.zeroed()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and sum; unless the step is to be skipped, also noise, scale and account."""
        if self._cyclic is not None:
            self._cyclic.check(self.noise_multiplier, any(self._step_skip_queue))
        self.clip_and_accumulate()
        self._is_last_step_skipped = bool(self._check_skip_next_step())
        if self._is_last_step_skipped:
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        return True
