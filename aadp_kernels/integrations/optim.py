"""DP-SGD in a plain training loop: a torch.optim optimizer with noise, and Poisson batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aadp_kernels import _validate
from aadp_kernels.integrations._watch import Watch, clipped_layers
from aadp_kernels.integrations.release import Release, equal_scales, layer_clips
from aadp_kernels.layout import Layout
from aadp_kernels.noise import MECHANISMS, NoiseKey, poisson_mask
from aadp_kernels.privatize import privatize_


class PrivateOptimizer:
    """Makes any torch.optim optimizer private: adds noise to the clipped sums that backward made.

    `step()` is `grad = (grad + noise) / expected_batch_size; optimizer.step()`.

        model = with_clipping(Net(), p=2)
        optimizer = PrivateOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ...)
        for rows in PoissonBatches(len(x), rate=0.01, steps=1000, key=key):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
            optimizer.step()

    Args:
        optimizer: Over parameters of `model`; a learning-rate schedule is attached to it.
        model: Result of `with_clipping`; its clip norms are set here.
        clip_norm: C of all layers together (each gets C / sqrt(L), or C / L with p = 1), or one for
            each layer in the order of the model. Public.
        noise_multiplier: z (gaussian) or lambda (laplace) of all layers together; 0: no noise.
        expected_batch_size: The divisor, public: rate * number of records, never the size that was
            drawn.
        key: Secret key; also good for the Poisson coins.
        mechanism: "gaussian" or "laplace"; laplace needs `with_clipping(p=1)`.
        reduce: Called with the clipped sums before the noise, for instance to add up those of
            several processes in place; every process then adds the same noise under the same key.
        first_step: Address of the first release; a continued run goes on where the last one ended.
        impl: As for `privatize_`.

    Raises:
        ValueError: A model without clipping, a parameter of the optimizer outside the model's
            clipped layers, laplace with p = 2, a range.

    Guarantees:
        Each record moves the sum of a layer by at most C_l, so one `step` is the mechanism that
        `release` names, for records under zero_out, in real arithmetic (the sum is a matrix
        product). That asks of the loop: the loss is a *sum* over the records of a Poisson batch;
        a record goes through the model once between two steps; `zero_grad` is called after every
        `step`. Micro-batches of one Poisson batch may be run one after the other before `step`. A
        layer that is used twice in a forward, or sees something else than the model's records in
        its first dimension, raises UnsupportedLayerError in the forward.

    Edge cases:
        | between two steps | `step` |
        |---|---|
        | no backward (an empty Poisson batch) | releases noise only; must be taken too |
        | gradients not zeroed since the last step | RuntimeError |
        | NaN or Inf in a layer's sum | zeros plus noise |

    Reference:
        Abadi et al. 2016, arXiv:1607.00133; per layer: McMahan et al. 2018, arXiv:1812.06210.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        clip_norm: float | Sequence[float] | Tensor,
        noise_multiplier: float,
        expected_batch_size: float,
        key: NoiseKey,
        mechanism: str = "gaussian",
        reduce: Callable[[list[Tensor]], None] | None = None,
        first_step: int = 0,
        impl: str = "auto",
    ) -> None:
        _validate.one_of("mechanism", mechanism, MECHANISMS)
        if not expected_batch_size > 0:
            raise ValueError(f"expected_batch_size must be positive, got {expected_batch_size}")
        self.optimizer = optimizer
        self.parameters = _trained(optimizer, model)
        self.layout = Layout.build(self.parameters)
        self.p = clipping_norm(model)
        if mechanism == "laplace" and self.p == 2:
            raise ValueError("laplace noise needs a model made by with_clipping(p=1), got p=2")
        self.clips = layer_clips(clip_norm, self.layout, self.p)
        self.scales = equal_scales(
            self.clips, mechanism=mechanism, noise_multiplier=noise_multiplier, adjacency="zero_out"
        )
        self.expected_batch_size = expected_batch_size
        self.next_step = _validate.integer_below("first_step", first_step, 1 << 32)
        self.steps_taken = 0
        self._noise_multiplier, self._mechanism = noise_multiplier, mechanism
        self._key, self._reduce, self._impl = key, reduce, impl
        self._used: list[Tensor | None] = []
        set_clip_norms(model, self.layout, self.clips)
        Watch(model)

    def zero_grad(self) -> None:
        """Forget the gradients; to be called after every step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._used = []

    @torch.no_grad()
    def step(self) -> None:
        """Release the noisy mean gradient and let the optimizer use it.

        Raises:
            RuntimeError: `zero_grad` was not called since the last step.
        """
        if self._used:
            raise RuntimeError("zero_grad() must be called between two steps")
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sums = [parameter.grad for parameter in self.parameters.values()]
        sums = [grad for grad in sums if grad is not None]
        if self._reduce is not None:
            self._reduce(sums)
        add_noise_(
            sums, self.layout, scale=self.scales, mechanism=self._mechanism, key=self._key,
            step=self.next_step, impl=self._impl,
        )  # fmt: skip
        for grad in sums:
            grad.div_(self.expected_batch_size)
        self.next_step += 1
        self.steps_taken += 1
        self._used = list(sums)
        self.optimizer.step()

    def release(self, *, poisson_rate: float = 1.0) -> Release:
        """What each of the `steps_taken` steps must be charged for.

        Args:
            poisson_rate: Rate of the secret coins that chose the records; 1 if batches were
                shuffled or fixed, which gives no amplification.
        """
        return Release(
            self._mechanism, self._noise_multiplier, unit="record", adjacency="zero_out",
            poisson_rate=poisson_rate,
        )  # fmt: skip


class PoissonBatches:
    """Batches of record indices in which every record is with probability `rate`, independently.

    This is the sampling that amplification is proven for; a shuffled epoch of fixed batches is not.

    Args:
        n: Number of records, public.
        rate: Sampling rate in (0, 1], public.
        steps: Batches of one pass over this object.
        key: Secret key; may be the one of the noise.
        first_step: Address of the first batch.
        device: Device of the indices.

    Guarantees:
        The batch of a step is a function of (key, step). A second pass goes on with new steps.

    Edge cases:
        A batch can be empty, and its size is private.
    """

    def __init__(
        self,
        n: int,
        *,
        rate: float,
        steps: int,
        key: NoiseKey,
        first_step: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.n, self.rate, self.steps = n, rate, steps
        self.next_step = first_step
        self._key, self._device = key, device

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            step, self.next_step = self.next_step, self.next_step + 1
            mask = poisson_mask(self.n, self.rate, key=self._key, step=step, device=self._device)
            yield mask.nonzero().flatten()


def add_noise_(
    sums: Sequence[Tensor],
    layout: Layout,
    *,
    scale: Tensor,
    mechanism: str,
    key: NoiseKey,
    step: int,
    impl: str = "auto",
) -> None:
    """Add noise to sums that are clipped already, in place: `privatize_` without a clip."""
    privatize_(
        sums, layout=layout, clip=torch.full_like(scale, torch.inf), scale=scale,
        p=1 if mechanism == "laplace" else 2, mechanism=mechanism, key=key, step=step, impl=impl,
    )  # fmt: skip


def clipping_norm(model: nn.Module) -> int:
    """The norm p of a model that clips in backward.

    Raises:
        ValueError: The model was not made by `with_clipping`.
    """
    norms = {int(getattr(module, "norm_p", 0)) for _, module in clipped_layers(model)}
    if len(norms) != 1:
        raise ValueError("model must be the result of with_clipping, got one without clipping")
    return norms.pop()


def set_clip_norms(model: nn.Module, layout: Layout, clips: Tensor) -> None:
    """Write the clip norms [L] into the layers of a model that clips in backward.

    Raises:
        ValueError: A layer of the layout does not clip.
    """
    buffers: dict[str, Any] = dict(model.named_buffers())
    for name, clip in zip(layout.layer_names, clips.tolist(), strict=True):
        buffer = buffers.get(f"{name}.clip_norm")
        if buffer is None:
            raise ValueError(
                f"layer {name!r} does not clip; use the result of with_clipping (a model that is "
                "one layer must stand in an nn.Sequential)"
            )
        buffer.fill_(clip)


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the model, in the model's order."""
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if len(found) != len(wanted):
        raise ValueError(
            f"the optimizer has {len(wanted) - len(found)} parameters that the model has not; "
            "make the optimizer from the result of with_clipping"
        )
    return found
