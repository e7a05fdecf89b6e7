"""DP-SGD in a plain training loop: a torch.optim optimizer with noise, and Poisson batches."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from aadp_kernels import _validate
from aadp_kernels.correlation import Correlation
from aadp_kernels.integrations._clip_norms import ClipNormsKept, clipping_norm, set_clip_norms
from aadp_kernels.integrations._gradients import ClippedSums
from aadp_kernels.integrations._public_state import ENTRY, check_state, layers_of
from aadp_kernels.integrations._watch import Watch, records
from aadp_kernels.integrations._wrapped import check_kind, trained_parameters
from aadp_kernels.integrations.cyclic import CyclicBatches, CyclicSteps
from aadp_kernels.integrations.poisson import PoissonBatches
from aadp_kernels.integrations.release import Release, equal_scales, layer_clips
from aadp_kernels.layout import Layout
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.privatize import privatize_
from aadp_kernels.sampler_limits import MECHANISMS

__all__ = [
    "CyclicBatches",
    "CyclicSteps",
    "PoissonBatches",
    "PrivateOptimizer",
    "add_noise_",
    "clipping_norm",
    "records",
    "set_clip_norms",
]


class PrivateOptimizer(torch.optim.Optimizer):
    """Makes any torch.optim optimizer private: adds noise to the clipped sums that backward made.

    `step()` is `grad = (grad + noise) / expected_batch_size; optimizer.step()`.

        model = with_clipping(Net(), p=2)
        optimizer = PrivateOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ...)
        for rows in PoissonBatches(len(x), rate=0.01, steps=1000, key=key):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
            optimizer.step()

    It is a torch.optim.Optimizer with the parameter groups and the state of the one it wraps:
    schedules, step hooks, closures and Lightning take it as such.

    Args:
        optimizer: Over parameters of `model`. Those that are frozen (`requires_grad` False) are
            left out: they have no part in clip norms and noise, and do not move.
        model: Result of `with_clipping`; its clip norms are set here, its forwards and backward
            passes are watched from now on. Gradients that it holds are forgotten. An earlier
            PrivateOptimizer of the model retires.
        clip_norm: C of all layers together (each gets C / sqrt(L), or C / L with p = 1), or one for
            each layer in the order of the model. Public.
        noise_multiplier: z (gaussian) or lambda (laplace) of all layers together; 0: no noise.
        expected_batch_size: The divisor, public: rate * number of records, never the size that was
            drawn.
        key: Secret key; also good for the Poisson coins.
        mechanism: "gaussian" or "laplace"; laplace needs `with_clipping(p=1)`.
        micro_batches: True promises that all forwards between two steps have *different* records,
            those of one Poisson batch; False allows one forward.
        reduce: Called with the clipped sums before the noise, for instance to add up those of
            several processes in place; every process then adds the same noise under the same key.
        cyclic: For batches in a fixed cyclic order: noise of neighbouring steps is correlated, and
            `release` names one mechanism for the whole run. Gaussian noise only. None: independent
            noise.
        first_step: Address of the first release; a continued run goes on where the last one ended
            (with `cyclic` by `load_state_dict`, which knows where the run began).
        impl: As for `privatize_`.

    Attributes:
        optimizer: The wrapped one.
        steps_taken: Releases so far. One is counted before its noise is drawn, so a step that
            failed later is counted, too.
        next_step: Address of the next release; it never goes back.

    Raises:
        ValueError: A model without clipping, no trained parameter, a parameter outside the model's
            clipped layers, laplace with p = 2, a range, LBFGS (evaluates its closure repeatedly on
            private records), differentiable=True, DistributedDataParallel (see `reduce`).

    Guarantees:
        Each record moves the sum of a layer by at most C_l, so one `step` is the mechanism that
        `release` names, for records under zero_out, in real arithmetic (the sum is a matrix
        product). That asks of the loop: the loss is a *sum* over the records of a Poisson batch (a
        mean divides every record's gradient, which only makes it smaller); a record is in the
        batch once. What `Watch` says is seen in every forward and backward: layers used twice or on
        something else than records, parameters used outside of their layer.
        Nothing has moved when `step` raises RuntimeError. If the wrapped optimizer fails in the
        first step, parameters and state are put back. Noise is never drawn twice.

    Edge cases:
        | between two steps | what happens |
        |---|---|
        | no backward (an empty Poisson batch) | `step` releases noise only; must be taken too |
        | a second forward and backward | ValueError in backward, unless `micro_batches` |
        | a second backward through one forward | UnsupportedLayerError in backward |
        | gradients not zeroed since the last step, or changed by others | `step` raises |
        | a parameter added, removed, frozen or unfrozen; a clip norm raised | `step` raises |
        | NaN or Inf in a layer's sum | zeros plus noise |
        | `step(closure)` | the closure runs once, before the release |
        | GradScaler, CUDA graph capture | RuntimeError |

    Reference:
        Abadi et al. 2016, arXiv:1607.00133; per layer: McMahan et al. 2018, arXiv:1812.06210.
    """

    def __init__(  # pyright: ignore[reportMissingSuperCall]
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        clip_norm: float | Sequence[float] | Tensor,
        noise_multiplier: float,
        expected_batch_size: float,
        key: NoiseKey,
        mechanism: str = "gaussian",
        micro_batches: bool = False,
        reduce: Callable[[list[Tensor]], None] | None = None,
        cyclic: CyclicSteps | None = None,
        first_step: int = 0,
        impl: str = "auto",
    ) -> None:
        _validate.one_of("mechanism", mechanism, MECHANISMS)
        if not expected_batch_size > 0:
            raise ValueError(f"expected_batch_size must be positive, got {expected_batch_size}")
        if isinstance(optimizer, PrivateOptimizer):
            raise ValueError("optimizer is private already: pass the one it wraps, its .optimizer")
        check_kind(optimizer, model)
        self.optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = trained_parameters(optimizer, model)
        self._trained = self._trained_now()
        groups = optimizer.param_groups
        self._frozen = [p for g in groups for p in g["params"] if not p.requires_grad]
        self.layout = Layout.build(self.parameters)
        self.p = clipping_norm(model)
        if mechanism == "laplace" and self.p == 2:
            raise ValueError("laplace noise needs a model made by with_clipping(p=1), got p=2")
        if cyclic is not None and mechanism != "gaussian":
            raise ValueError(f"cyclic must be None with mechanism={mechanism!r}: it has no proof")
        self.clips = layer_clips(clip_norm, self.layout, self.p)
        self.scales = equal_scales(
            self.clips, mechanism=mechanism, noise_multiplier=noise_multiplier, adjacency="zero_out"
        )
        self.expected_batch_size = expected_batch_size
        self.next_step = _validate.integer_below("first_step", first_step, 1 << 32)
        self.steps_taken = 0
        self.cyclic, self._began = cyclic, self.next_step
        self._noise_multiplier, self._mechanism = noise_multiplier, mechanism
        self._key, self._reduce, self._impl = key, reduce, impl
        self._run, self._tried = secrets.token_hex(8), False
        set_clip_norms(model, self.layout, self.clips)
        self._kept = ClipNormsKept(model, self.layout)
        self._sums = ClippedSums(self.parameters, micro_batches=micro_batches)
        # torch makes the dictionaries of hooks here, and wraps `step` to run them.
        super().__setstate__({})
        self._watch = Watch(model, self._sums, owner=self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks first: it would scale losses, and skip steps by private values."""
        raise RuntimeError(
            "GradScaler cannot be used with PrivateOptimizer: it skips steps where private "
            "gradients overflow; use bfloat16, which needs no scaling, or GradScaler(enabled=False)"
        )

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.optimizer!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("PrivateOptimizer holds a key, and cannot be copied: save its state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: clip norms and noise are those of the layers that were there.

        Raises:
            ValueError: Always.
        """
        raise ValueError("parameters cannot be added: make a new PrivateOptimizer for the model")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; to be called before or after every step."""
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._sums.zeroed()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Release the noisy mean gradient and let the optimizer use it.

        Args:
            closure: Runs once, with gradients enabled, before the release; usually zero_grad,
                forward and backward.

        Returns:
            What the closure returned (private), or None.

        Raises:
            RuntimeError: See the table of the class; the message names the parameter.
        """
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        with torch.no_grad():
            self._release(self._checked_sums())
            self._move()
        return found

    def _checked_sums(self) -> list[Tensor]:
        """The clipped sums, if everything is as it was when clip norms and noise were settled."""
        if self._watch.closed:
            raise RuntimeError(f"this PrivateOptimizer has retired: {self._watch.closed}")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a captured CUDA graph would repeat the noise of its step")
        if self.cyclic is not None and self.next_step - self._began >= self.cyclic.steps:
            raise RuntimeError(
                f"all {self.cyclic.steps} planned steps are taken: a further one would take back "
                "noise that its records count on"
            )
        self._check_parameters()
        self._kept.check()
        return self._sums.take()

    def _check_parameters(self) -> None:
        """Raise unless the optimizer trains exactly the parameters that are private."""
        if self._trained_now() == self._trained and all(p.grad is None for p in self._frozen):
            return
        private = {id(p): name for name, p in self.parameters.items()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and private.pop(id(parameter), None) is None:
                    self._refuse(parameter, "is trained now and was not")
                if not parameter.requires_grad and id(parameter) in private:
                    self._refuse(parameter, "is frozen now and was not")
                if not parameter.requires_grad and parameter.grad is not None:
                    self._refuse(parameter, "is frozen and has a gradient")
        for name in private.values():
            raise RuntimeError(f"the optimizer has lost {name!r}; make a new PrivateOptimizer")

    def _trained_now(self) -> list[tuple[int, bool]]:
        """Each parameter of the optimizer, and whether it is trained."""
        groups = self.optimizer.param_groups
        return [(id(p), p.requires_grad) for group in groups for p in group["params"]]

    def _refuse(self, parameter: Tensor, what: str) -> NoReturn:
        name = self._names.get(id(parameter), f"of shape {tuple(parameter.shape)}")
        raise RuntimeError(
            f"the optimizer's parameter {name!r} {what}, so neither its clip norm nor its noise is "
            "settled; make a new PrivateOptimizer for the model"
        )

    def _release(self, sums: list[Tensor]) -> None:
        """Turn the sums into the noisy mean. Counted first, so that no noise is drawn twice."""
        try:
            if self._reduce is not None:
                self._reduce(sums)
            step, self.next_step = self.next_step, self.next_step + 1
            self.steps_taken += 1
            among = None
            if self.cyclic is not None:
                among = self.cyclic.correlation(self._key, step, self._began)
            add_noise_(
                sums, self.layout, scale=self.scales, mechanism=self._mechanism, key=self._key,
                step=step, correlation=among, impl=self._impl,
            )  # fmt: skip
            for grad in sums:
                grad.div_(self.expected_batch_size)
        except BaseException:
            self._sums.forget("the last step has failed: zero_grad() must be called")
            raise
        self._sums.spend()

    def _move(self) -> None:
        """The wrapped optimizer's step. The first, where state is made, is undone if it fails."""
        if self._tried:
            self.optimizer.step()
            return
        before = [p.detach().clone() for p in self.parameters.values()]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            self.optimizer.step()
        except BaseException:
            for parameter, value in zip(self.parameters.values(), before, strict=True):
                parameter.copy_(value)
            self.optimizer.load_state_dict(state)
            raise
        self._tried = True

    def release(self, *, poisson_rate: float = 1.0) -> Release:
        """What each of the `steps_taken` steps must be charged for; with `cyclic`, the whole run.

        Args:
            poisson_rate: Rate of the secret coins that chose the records; 1 if batches were
                shuffled or fixed, which gives no amplification.

        Raises:
            ValueError: A rate below 1 with `cyclic`, whose batches have a fixed order.
        """
        if self.cyclic is not None:
            if poisson_rate != 1:
                raise ValueError(f"poisson_rate must be 1 with cyclic steps, got {poisson_rate}")
            return Release(
                self._mechanism, self.cyclic.multiplier(self._noise_multiplier), unit="record",
                adjacency="zero_out", planned_steps=self.cyclic.steps,
            )  # fmt: skip
        return Release(
            self._mechanism, self._noise_multiplier, unit="record", adjacency="zero_out",
            poisson_rate=poisson_rate,
        )  # fmt: skip

    def retire(self) -> None:
        """Give the model back to training that is not private; `step` raises from now on."""
        self._watch.close("retire() was called")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, as "privacy", public facts: no key, no sums.

        The facts are layers and their sizes, mechanism, noise multiplier, p, clip norms, divisor,
        `next_step`, `steps_taken` and a random name of the run.
        """
        return super().state_dict() | {ENTRY: self._facts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was saved; `next_step` and `steps_taken` never go back.

        Raises:
            ValueError: A state of a plain optimizer, of other layers, of another mechanism or noise
                multiplier; a state of another run after steps of one's own.
        """
        facts = check_state(state_dict, self._facts())
        super().load_state_dict({k: v for k, v in state_dict.items() if k != ENTRY})
        self.next_step = max(self.next_step, facts["next_step"])
        self.steps_taken = max(self.steps_taken, facts["steps_taken"])
        self._run, self._began = facts["run"], facts.get("began", 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` with the new state and groups."""
        self.optimizer.__setstate__(state)

    def _facts(self) -> dict[str, Any]:
        """The entry of `state_dict` that says what the steps so far were."""
        return {
            "layers": layers_of(self.layout), "mechanism": self._mechanism,
            "noise_multiplier": float(self._noise_multiplier), "p": self.p,
            "clip_norms": self.clips.tolist(), "expected_batch_size": self.expected_batch_size,
            "next_step": self.next_step, "steps_taken": self.steps_taken, "run": self._run,
            "cyclic": self.cyclic and self.cyclic.facts(), "began": self._began,
        }  # fmt: skip


def add_noise_(
    sums: Sequence[Tensor],
    layout: Layout,
    *,
    scale: Tensor,
    mechanism: str,
    key: NoiseKey,
    step: int,
    correlation: Correlation | None = None,
    impl: str = "auto",
) -> None:
    """Add noise to sums that are clipped already, in place: `privatize_` without a clip."""
    privatize_(
        sums, layout=layout, clip=torch.full_like(scale, torch.inf), scale=scale,
        p=1 if mechanism == "laplace" else 2, mechanism=mechanism, key=key, step=step,
        correlation=correlation, impl=impl,
    )  # fmt: skip
