"""The first line of a run's ledger: public facts that its releases share."""

from __future__ import annotations

import math
from typing import Any

import torch

from aadp_kernels import Layout, tail_cutoff
from fl_lightning.accounting.budget import UNLIMITED, Budget
from fl_lightning.data import FederatedDataModule
from fl_lightning.ledger.header import CORRELATED_SCHEMA, EVALUATION_SCHEMA, SCHEMA
from fl_lightning.privacy.simulated import simulated_because
from fl_lightning.release.summed import sum_rules
from fl_lightning.rules import Rules

_ARITHMETIC = {
    "wide": "float32 gradients, float64 noise",
    "fast": "float32 gradients and noise",
    "grid": "float32 gradients, whole-number sums and noise",
}


def ledger_header(
    rules: Rules, data: FederatedDataModule, layout: Layout, budget: Budget, run_id: str
) -> dict[str, Any]:
    """Facts of a run.

    Args:
        rules: of the run.
        data: records and who holds them; no more of it than the header shows is read.
        layout: trained parameters and their layers.
        budget: calibrated.
        run_id: public name of the run's secret.
    """
    privacy, sums = rules.privacy, sum_rules(rules, data.client_sizes)
    cutoff = tail_cutoff(privacy.mechanism, privacy.noise_form)
    limited = bool((budget.affordable < UNLIMITED).any())
    facts = {
        "schema": _schema(budget),
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
        "weighting": rules.weighting,
        "weights": _shared(sums.weights.tolist()) if sums else None,
        "min_survivors": sums.survivors if sums else None,
        "cohort_rate": sums.rate if sums else None,
        "dataset": data.dataset_name,
        "transform_checked": data.transform is not None and not data.transform_problem,
        "client_sizes": data.client_sizes.tolist(),
        "clients_per_round": rules.cohort_size(data.num_clients),
        "planned_steps": budget.planned_steps.tolist(),
        "layers": list(layout.layer_names),
        "dims": list(layout.dims),
        "torch": torch.__version__,
    }
    return facts | local_facts(rules) | correlation_facts(rules, budget) | evaluation_facts(budget)


def _schema(budget: Budget) -> int:
    if budget.evaluations is not None:
        return EVALUATION_SCHEMA
    return SCHEMA if budget.plan is None else CORRELATED_SCHEMA


def local_facts(rules: Rules) -> dict[str, Any]:
    """Facts of the header about local training beyond SGD; {} where there is none."""
    facts: dict[str, Any] = {}
    if rules.client_proximal:
        facts["client_proximal"] = rules.client_proximal
    if rules.personal:
        facts["personal"] = {
            "parameters": list(rules.personal),
            "steps": rules.personal_steps,
            "lr": rules.personal_lr,
        }
    return facts


def evaluation_facts(budget: Budget) -> dict[str, Any]:
    """Facts of the header about private evaluations; {} where there are none."""
    plan = budget.evaluations
    if plan is None:
        return {}
    facts = {
        "every_n_rounds": plan.every,
        "rounds": plan.rounds,
        "planned": plan.times,
        "share": plan.share,
        "apart": plan.apart,
        "records": plan.records.tolist(),
        "noise_multiplier": _shared(budget.evaluation_multiplier.tolist()),
    }
    return {"evaluation": facts}


def correlation_facts(rules: Rules, budget: Budget) -> dict[str, Any]:
    """Facts of the header about noise that rounds share; {} where each round has its own."""
    plan = budget.plan
    if plan is None:
        return {}
    return {
        "coefficients": list(plan.coefficients),
        "horizon": plan.horizon,
        "schedule_seed": rules.seed,
        "sensitivity": _shared(plan.sizes_of_one.whole.tolist()),
    }


def _shared(values: list[float]) -> float | list[float]:
    """One number where all are equal."""
    return values[0] if len(set(values)) == 1 else values
