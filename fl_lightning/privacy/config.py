"""What a run promises and by which rules: the frozen, public privacy configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fl_lightning.privacy.combinations import check_correlation, check_evaluation, check_joint
from fl_lightning.privacy.comparators import Comparator, check_choices, check_comparator
from fl_lightning.privacy.settings import (
    ADJACENCY_OF,
    SUMMED,
    UNIT_OF,
    Allocation,
    Setting,
    Thresholds,
)


@dataclass(frozen=True)
class PrivacyConfig:
    """Privacy setting of a run. Every value is public and must be chosen without the data.

    Args:
        setting: Who is protected from whom. ``record+local``: one record of one client, from
            everyone but that client. ``client+local``: a whole client, from everyone else.
            ``client+aggregator``: a whole client, from everyone but a trusted server that adds
            the noise once. ``client+secure_sum``: a whole client, from a server that sees only
            the sum of updates, each with a share of the noise.
            ``abstract``: the published rule on raw history, no guarantee. ``none``: no noise.
        mechanism: Noise shape, ``gaussian`` (L2 clip) or ``laplace`` (L1 clip).
        adjacency: ``default`` takes the one of the setting: replace_one for client+local,
            zero_out for the others.
        epsilon: Target ε of the whole run; one number, or one a client (a shorter list is
            repeated over the clients). The noise multiplier is calibrated to it. Null: no
            target, give noise_multiplier.
        delta: Target δ, one number or one a client; below 1/n of every client for records and
            below 1/(number of clients) for clients. 0 is possible for Laplace.
        noise_multiplier: Noise scale over sensitivity, votes included (z for Gaussian, λ for
            Laplace); null: calibrated from epsilon. 0 means no noise, hence ε = ∞. With both
            given, a client leaves when its next release would pass epsilon.
        clip_order: Norm that is clipped, 1 or 2; null: 2 for Gaussian, 1 for Laplace.
        clip_norm: Public total clip norm, split evenly over the layers; or a list with one
            number a layer. The first rounds' value for quantile and released, every round's
            for fixed. Infinite: no clipping, only without noise.
        thresholds: Where clip norms come from. ``quantile``: private votes on each layer's L1
            norm; ``released``: L1 norms of released updates; ``fixed``: clip_norm; ``raw``:
            unprotected norms, ``abstract`` only. ``default``: by setting and mechanism.
        quantile: Fraction of units that the quantile rule leaves unclipped, in (0, 1).
        quantile_lr: Step size η of the quantile rule, in log norm a vote.
        vote_share: Share ρ of the privacy budget that the votes cost, in (0, 1).
        clip_factor: Factor κ between the tracked L1 norm and the L2 clip norm.
        clipping: What is scaled down together: each ``layer``, to its own clip norm; the whole
            gradient (``flat``), which then counts as one layer for clip norms, votes and shares; or
            (``joint``, under record+local) the whole gradient by the norm in which each layer is
            measured by its own noise. Joint clipping has the noise of ``layer``, keeps the
            direction of each gradient, and shortens fewer (fl_lightning/privacy/one_factor.py).
        history: Number of released updates that ``released`` looks back on.
        allocation: How the budget is divided over the layers: ``uniform``, ``abstract``,
            ``mse``, ``contribution`` or ``snr`` (equal signal-to-noise, from released history).
            ``default``: contribution, or abstract under abstract.
        share_floor: Part α of the budget that is divided evenly, in (0, 1].
        cohort_sampling: Who takes part in a round. ``fixed``: a public, balanced schedule.
            ``poisson``: every client by itself with probability clients_per_round over the number
            of clients, by secret coins that only a trusted aggregator knows. ``default``: poisson
            under client+aggregator, else fixed.
        correlation: Under client+aggregator with cohort_sampling fixed, whether a round's noise
            takes a part of earlier rounds' noise back (``banded``), so that less of it adds up in
            the model. Every client is charged for all planned rounds at once: a run cannot be made
            longer. ``none``: the noise of each round is its own.
        bands: Noise of how many rounds is in a release when correlation is banded, 2 to 64; 2 takes
            nearly all that there is to gain.
        min_survivors: Under client+secure_sum, fewest clients of a cohort that stay and are honest;
            their shares alone are the whole noise, and a round with fewer is given up before
            anything is revealed. Null: the whole cohort.
        evaluate_every: Rounds between private evaluations, the last round besides; 0: none. In one,
            every client's number of right answers on its held-out records (data.val_fraction) is
            released with noise, in the unit of the setting (docs/tuning.md).
        evaluation_share: Part of ε that evaluations may cost where a client is the unit, in
            (0, 0.5]. Where a record is, held-out records have the whole ε and training ones too:
            no record is both.
        seed: Null: noise keys and coins come from the operating system. A number makes the run
            reproducible and therefore *simulated*: it protects nobody.
        noise_form: How noise is computed. ``wide``: float64 from 64 bits an element; ``fast``:
            float32 from 32 bits; both are proven in real arithmetic. ``grid``: whole numbers,
            proven in floating point as computed, which δ = 0 asks for; under record+local it needs
            every record's gradient by itself, which is slower.
        rng: Generator of noise and coins. ``chacha20`` is what a privacy claim wants; ``chacha8``
            is the same stream cipher with fewer rounds. ``philox10`` is faster, passes statistical
            tests, and has a key of 64 bits and no analysis as a cipher: a claim with it assumes
            more.
        comparator: Rules of published methods, to compare with; the defaults are none of them.

    Raises:
        ValueError: if a value is out of range or values contradict each other.
    """

    setting: Setting = "record+local"
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    adjacency: Literal["default", "zero_out", "replace_one"] = "default"
    epsilon: float | list[float] | None = 8.0
    delta: float | list[float] = 1e-5
    noise_multiplier: float | list[float] | None = None
    clip_order: Literal[1, 2] | None = None
    clip_norm: float | list[float] = 1.0
    thresholds: Thresholds = "default"
    quantile: float = 0.5
    quantile_lr: float = 0.2
    vote_share: float = 0.05
    clip_factor: float = 1.0
    clipping: Literal["layer", "flat", "joint"] = "layer"
    history: int = 10
    allocation: Allocation = "default"
    share_floor: float = 0.1
    cohort_sampling: Literal["default", "fixed", "poisson"] = "default"
    correlation: Literal["none", "banded"] = "none"
    bands: int = 2
    min_survivors: int | None = None
    evaluate_every: int = 0
    evaluation_share: float = 0.1
    seed: int | None = None
    noise_form: Literal["wide", "fast", "grid"] = "wide"
    rng: Literal["chacha20", "chacha8", "philox10"] = "chacha20"
    comparator: Comparator = field(default_factory=Comparator)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_setting(self)
        _check_numbers(self)
        _check_thresholds(self)
        check_joint(self)
        check_correlation(self)
        check_evaluation(self)
        check_comparator(
            self.comparator, setting=self.setting, clipping=self.clipping,
            noise_form=self.noise_form, thresholds=self.resolved_thresholds,
        )  # fmt: skip

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise at all."""
        return self.setting != "none"

    @property
    def guarantee(self) -> bool:
        """Whether ε is proven (never under ``abstract``)."""
        return self.setting in ("record+local", "client+local", *SUMMED)

    @property
    def summed(self) -> bool:
        """Whether one noised sum is released instead of noised updates."""
        return self.setting in SUMMED

    @property
    def trust(self) -> str:
        """Who sees what is not noised yet: local (the client alone), aggregator, secure_sum."""
        return self.setting.partition("+")[2] or "none"

    @property
    def poisson_cohort(self) -> bool:
        """Whether secret coins decide who takes part in a round."""
        if self.cohort_sampling == "default":
            return self.setting == "client+aggregator"
        return self.cohort_sampling == "poisson"

    @property
    def correlated(self) -> bool:
        """Whether rounds share noise, and the whole run is charged at once."""
        return self.private and self.correlation != "none"

    @property
    def votes(self) -> float:
        """Part of the budget that votes on norms cost."""
        return self.vote_share if self.private and self.resolved_thresholds == "quantile" else 0.0

    @property
    def unit(self) -> str:
        return UNIT_OF[self.setting]

    @property
    def resolved_adjacency(self) -> str:
        return ADJACENCY_OF[self.setting] if self.adjacency == "default" else self.adjacency

    @property
    def p(self) -> int:
        """Order of the clipped norm."""
        return self.clip_order or (1 if self.mechanism == "laplace" else 2)

    @property
    def resolved_thresholds(self) -> str:
        if self.thresholds != "default":
            return self.thresholds
        if self.setting == "abstract":
            return "raw"
        if self.setting != "client+local" and self.mechanism == "gaussian":
            return "quantile"
        return "released"

    @property
    def resolved_allocation(self) -> str:
        if self.allocation != "default":
            return self.allocation
        return "abstract" if self.setting == "abstract" else "contribution"


def per_client(value: float | list[float], num_clients: int) -> list[float]:
    """One number a client: a single number for all, or a list repeated over the clients."""
    values = value if isinstance(value, list) else [value]
    return [float(values[k % len(values)]) for k in range(num_clients)]


def _as_list(value: float | list[float] | None) -> list[float]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _check_choices(config: PrivacyConfig) -> None:
    check_choices(config)
    if config.clip_order not in (None, 1, 2):
        raise ValueError(f"clip_order={config.clip_order} must be 1 or 2")
    if config.seed is not None and config.seed < 0:
        raise ValueError(f"seed={config.seed} must be at least 0")


def _check_setting(config: PrivacyConfig) -> None:
    if config.setting == "client+secure_sum" and config.noise_form == "grid":
        raise ValueError(
            "noise_form='grid' with setting='client+secure_sum': sums of whole-number shares have "
            "no proven law and tails here; use 'wide' or 'fast'"
        )
    if config.summed and config.adjacency == "replace_one":
        raise ValueError(
            f"adjacency='replace_one' with setting='{config.setting}' is not available: a sum "
            "protects a client by zero_out; use 'default'"
        )
    if config.cohort_sampling == "poisson" and config.setting != "client+aggregator":
        raise ValueError(
            f"cohort_sampling='poisson' with setting='{config.setting}': who takes part is seen "
            "there, so secret coins would protect nobody; only 'client+aggregator' can use them"
        )
    if config.min_survivors is not None and config.setting != "client+secure_sum":
        raise ValueError(
            f"min_survivors={config.min_survivors} with setting='{config.setting}': only "
            "'client+secure_sum' has parts of noise"
        )
    if config.min_survivors is not None and config.min_survivors < 1:
        raise ValueError(f"min_survivors={config.min_survivors} must be at least 1")
    if (
        config.setting == "record+local"
        and config.adjacency == "replace_one"
        and (config.mechanism == "laplace")
    ):
        raise ValueError(
            "adjacency='replace_one' with mechanism='laplace' and setting='record+local': sampled "
            "Laplace noise has no proven analysis under replace_one here; use 'zero_out'"
        )
    if config.setting == "client+local" and config.adjacency == "zero_out":
        raise ValueError(
            "adjacency='zero_out' with setting='client+local' would not be local differential "
            "privacy (the upload shows who sent it): use 'replace_one'"
        )
    if config.mechanism == "laplace" and config.p == 2:
        raise ValueError(
            "clip_order=2 with mechanism='laplace': Laplace noise needs a bound on the L1 norm, "
            "use clip_order=1"
        )


def _check_numbers(config: PrivacyConfig) -> None:
    for name in ("epsilon", "delta", "noise_multiplier", "clip_norm"):
        value = getattr(config, name)
        if isinstance(value, list) and not value:
            raise ValueError(f"{name}=[] is empty: give a number or one number a client")
    for epsilon in _as_list(config.epsilon):
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"epsilon={epsilon} must be positive and finite")
    for delta in _as_list(config.delta):
        if not 0 <= delta < 1:
            raise ValueError(f"delta={delta} must be in [0, 1)")
        if delta == 0 and config.mechanism == "gaussian" and config.private:
            raise ValueError("delta=0 is only possible with mechanism='laplace'")
        if delta == 0 and config.noise_form != "grid" and config.private:
            raise ValueError(
                f"delta=0 with noise_form='{config.noise_form}': its largest draw and its rounding "
                "cost a delta above 0; use noise_form='grid'"
            )
    for multiplier in _as_list(config.noise_multiplier):
        if not (multiplier >= 0 and math.isfinite(multiplier)):
            raise ValueError(f"noise_multiplier={multiplier} must be finite and at least 0")
    multipliers = _as_list(config.noise_multiplier)
    if config.noise_form == "grid" and 0 in multipliers and any(multipliers):
        raise ValueError(
            f"noise_multiplier={config.noise_multiplier} with noise_form='grid': all clients need "
            "noise, or none"
        )
    if config.private and config.epsilon is not None and 0 in _as_list(config.noise_multiplier):
        raise ValueError(
            f"noise_multiplier={config.noise_multiplier} adds no noise, so epsilon="
            f"{config.epsilon} cannot be kept: set epsilon to null"
        )
    if config.private and config.epsilon is None and config.noise_multiplier is None:
        raise ValueError("epsilon=null and noise_multiplier=null: give one of the two")
    for clip_norm in _as_list(config.clip_norm):
        if not clip_norm > 0:
            raise ValueError(f"clip_norm={clip_norm} must be positive")
    for name in ("quantile", "vote_share"):
        if not 0 < getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be between 0 and 1")
    for name in ("quantile_lr", "clip_factor"):
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be positive and finite")
    if not 0 < config.share_floor <= 1:
        raise ValueError(f"share_floor={config.share_floor} must be in (0, 1]")
    if config.history < 1:
        raise ValueError(f"history={config.history} must be at least 1")


def _check_thresholds(config: PrivacyConfig) -> None:
    rule = config.resolved_thresholds
    if rule == "raw" and config.setting != "abstract":
        raise ValueError(
            "thresholds='raw' reads unprotected norms and is only for setting='abstract', "
            f"not for setting='{config.setting}'"
        )
    if config.setting == "client+local" and rule == "quantile":
        raise ValueError(
            "thresholds='quantile' with setting='client+local': each client has one vote a "
            "release, whose noise would hide it; use 'released' or 'fixed'"
        )
    infinite = any(math.isinf(c) for c in _as_list(config.clip_norm))
    if config.private and infinite:
        if _as_list(config.noise_multiplier) == [] or any(_as_list(config.noise_multiplier)):
            raise ValueError("clip_norm=inf needs noise_multiplier=0: the noise would be infinite")
        if rule != "fixed":
            raise ValueError(f"clip_norm=inf needs thresholds='fixed', not '{rule}'")
        if config.resolved_allocation in ("mse", "snr"):
            raise ValueError(
                f"clip_norm=inf cannot be used with allocation={config.resolved_allocation!r}"
            )
