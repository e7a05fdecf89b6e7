"""The first line of a run's ledger: public facts that its releases share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from aadp_kernels import tail_cutoff
from fl_lightning.ledger import SCHEMA
from fl_lightning.pooled import make_pool
from fl_lightning.privacy.budget import UNLIMITED
from fl_lightning.privacy.simulated import simulated_because

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule

_ARITHMETIC = {
    "wide": "float32 gradients, float64 noise",
    "fast": "float32 gradients and noise",
    "grid": "float32 gradients, whole-number sums and noise",
}


def ledger_header(module: FederatedModule, run_id: str) -> dict[str, Any]:
    """Facts of a run whose budget is calibrated.

    Args:
        module: the run.
        run_id: public name of the run's secret.
    """
    privacy, data, budget = module.privacy, module.data, module.budget
    pool = make_pool(
        privacy,
        data.client_sizes,
        clients_per_round=module.clients_per_round,
        weighting=module.weighting,
        clients_at_once=1,
    )
    cutoff = tail_cutoff(privacy.mechanism, privacy.noise_form)
    limited = bool((budget.affordable < UNLIMITED).any())
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "setting": privacy.setting,
        "privacy_unit": privacy.unit,
        "trust": privacy.trust,
        "adjacency": privacy.resolved_adjacency,
        "mechanism": privacy.mechanism,
        "delta": budget.delta.tolist(),
        "epsilon": budget.target.tolist(),
        "noise_multiplier": _shared(budget.multiplier.tolist()),
        "noise_multiplier_given": privacy.noise_multiplier is not None,
        "sampling_rate": budget.sampling_rate,
        "affordable_steps": _shared(budget.affordable.tolist()) if limited else None,
        "simulated": simulated_because(privacy) is not None,
        "simulated_because": simulated_because(privacy),
        "rng": privacy.rng,
        "noise_form": privacy.noise_form,
        "tail_cutoff": cutoff if math.isfinite(cutoff) else None,
        "arithmetic": _ARITHMETIC[privacy.noise_form],
        "thresholds": privacy.resolved_thresholds,
        "vote_share": privacy.votes,
        "allocation": privacy.resolved_allocation,
        "weighting": module.weighting,
        "weights": _shared(pool.weights.tolist()) if pool else None,
        "min_survivors": pool.survivors if pool else None,
        "cohort_rate": pool.rate if pool else None,
        "dataset": data.dataset_name,
        "transform_checked": data.transform is not None and not data.transform_problem,
        "client_sizes": data.client_sizes.tolist(),
        "clients_per_round": module.clients_per_round or data.num_clients,
        "planned_steps": budget.planned_steps.tolist(),
        "layers": list(module.layout.layer_names),
        "dims": list(module.layout.dims),
        "torch": torch.__version__,
    }


def _shared(values: list[float]) -> float | list[float]:
    """One number where all are equal."""
    return values[0] if len(set(values)) == 1 else values
