"""The figures at the end of a run, for a file and for people; ε is recomputed from the ledger."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from fl_lightning import plots
from fl_lightning.ledger.client_reports import (
    report_clients,
    shared_noise,
    show_bound,
    show_number,
)
from fl_lightning.ledger.risks import risk_figures, run_risks
from fl_lightning.privacy.allocation import division_ratio
from fl_lightning.privacy.simulated import simulated_because

if TYPE_CHECKING:
    from rich.table import Table

EVALUATIONS = "private_evaluation.csv"
_PACKAGES = ("aadp-fl", "torch", "pytorch-lightning", "numpy", "dp-accounting", "wandb")


def run_summary(trainer: pl.Trainer, pl_module: Any, seconds: float) -> dict[str, Any]:
    """All figures of the end of a run; ε is recomputed from the ledger.

    Args:
        trainer: the Trainer, after `test` if there was a test.
        pl_module: the FederatedModule.
        seconds: wall-clock time of the run.

    Returns:
        JSON-like values; None where there is no such figure, infinities as floats.
    """
    privacy, ledger = pl_module.privacy, pl_module.ledger
    facts = {} if ledger is None else ledger.header
    reports = {} if ledger is None else report_clients(facts, ledger.releases)
    active = [r for r in reports.values() if r.releases]
    epsilons = [r.epsilon for r in active]
    risks = None if ledger is None else run_risks(facts, ledger.releases)
    test = trainer.callback_metrics.get("test/accuracy")
    # The Trainer forgets its metrics when a test begins, and knows no round before a resumption.
    rounds = plots.read_rows(pl_module.run_path / "rounds.csv")
    validated = [r["sim_only_val_accuracy"] for r in rounds if r["sim_only_val_accuracy"]]
    return {
        "test_accuracy": None if test is None else float(test),
        "test_metrics": _test_metrics(trainer),
        "sim_only_val_accuracy": float(validated[-1]) if validated else None,
        **_personal(pl_module),
        **_private_evaluation(pl_module),
        **_search(facts),
        "setting": privacy.setting,
        "privacy": privacy_kind(privacy),
        "simulated": simulated_because(privacy) is not None,
        "simulated_because": simulated_because(privacy),
        "epsilon_min": min(epsilons, default=None),
        "epsilon_median": statistics.median(epsilons) if epsilons else None,
        "epsilon_max": max(epsilons, default=None),
        "delta_max": max((r.delta for r in active), default=None),
        **risk_figures(risks),
        "clients_that_released": len(active),
        "releases": sum(r.releases for r in active),
        "ledger_head": None if ledger is None else ledger.head_hash,
        **_nodes(pl_module),
        "rounds": len(rounds),
        "unit": privacy.unit,
        "trust": facts.get("trust"),
        "adjacency": facts.get("adjacency"),
        "mechanism": facts.get("mechanism"),
        "noise": shared_noise(facts),
        "thresholds": privacy.resolved_thresholds if privacy.private else None,
        "allocation": privacy.resolved_allocation if privacy.private else None,
        "division_ratio": _division_ratio(pl_module),
        "seconds": seconds,
        "versions": _versions(),
    }


def _personal(pl_module: Any) -> dict[str, Any]:
    """Parameters that are each client's own, by which its records are judged; {} without any."""
    names = pl_module.rules.personal
    return {"personal_parameters": list(names)} if names else {}


def _private_evaluation(pl_module: Any) -> dict[str, Any]:
    """The last private evaluation and the standard error of its noise; {} without any."""
    rows = plots.read_rows(pl_module.run_path / EVALUATIONS)
    if not pl_module.privacy.evaluate_every or not rows:
        return {}
    names = ("accuracy", "standard_error")
    return {f"val_private_{name}": float(rows[-1][name]) for name in names}


def _search(facts: Mapping[str, Any]) -> dict[str, float]:
    """What the search costs that chose the run, for the worst client; {} of a run of its own."""
    found = facts.get("search")
    if found is None:
        return {}
    epsilon, delta = max(zip(found["epsilon"], found["delta"], strict=True))
    return {"search_epsilon_max": epsilon, "search_delta": delta}


def _division_ratio(pl_module: Any) -> float | None:
    """Median over the clients of what `released_ratios` says of the history at hand."""
    if pl_module.run is None:
        return None
    ratios = released_ratios(pl_module, pl_module.run.history.l1_norm)
    return None if ratios is None else float(ratios.median())


def released_ratios(pl_module: Any, size: Any) -> Tensor | None:
    """`division_ratio` of each row of layer sizes that follow from releases.

    Args:
        pl_module: a FederatedModule.
        size: L1 norms, or contributions, which are in the same proportions, [k, L].

    Returns:
        R [k]; None where the history is raw, or all layers are clipped as one and nothing is known
        of each.
    """
    if not pl_module.privacy.guarantee or pl_module.privacy.clipping == "flat":
        return None
    dims = torch.tensor(pl_module.layout.dims, dtype=torch.float64)
    return division_ratio(torch.as_tensor(size, dtype=torch.float64), dims)


def _nodes(pl_module: Any) -> dict[str, Any]:
    """Of a run whose clients are nodes, the name of each and the last head of its own ledger."""
    if pl_module.federation is None or pl_module.run is None:
        return {}
    heads = pl_module.run.releases.heads
    members = pl_module.federation.members
    return {"nodes": [{"name": m.name, "ledger_head": heads.get(k)} for k, m in enumerate(members)]}


def privacy_kind(privacy: Any) -> str:
    """What may be said of ε, in a few words; `proven` only of secret noise."""
    given = privacy.noise_multiplier
    if privacy.setting == "none" or (given is not None and not any(np.atleast_1d(given))):
        return "none"
    if not privacy.guarantee:
        return "nominal ε, no guarantee"
    return "proven" if simulated_because(privacy) is None else "simulated"


def _test_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """What the metrics of the run found in the test records, by name."""
    found = {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }
    return {name: value for name, value in found.items() if name not in ("loss", "accuracy")}


def final_table(summary: dict[str, Any], files: Mapping[str, Any] | None = None) -> Table:
    """The figures of `run_summary` for people, and where the run's files are."""
    from rich.table import Table

    table = Table("", "", title="run", show_header=False)
    for name, value in final_rows(summary):
        table.add_row(name, value, style="bold" if name.startswith("SIMULATED") else None)
    for name, path in (files or {}).items():
        if path is not None:
            table.add_row(name, str(path))
    return table


def final_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of `run_summary` in words, in the order of the final table."""
    rows: list[tuple[str, str]] = []
    if summary["simulated"]:
        reason = summary["simulated_because"]
        rows.append((f"SIMULATED ({reason})", "protects nobody"))
    rows.append(("test accuracy", _show(summary["test_accuracy"])))
    rows += [
        (f"test {name}", _show(value)) for name, value in summary.get("test_metrics", {}).items()
    ]
    rows.append(("sim_only validation accuracy", _show(summary["sim_only_val_accuracy"])))
    if "val_private_accuracy" in summary:
        figures = (summary["val_private_accuracy"], summary["val_private_standard_error"])
        shown = " ± ".join(map(show_number, figures))
        rows.append(("private validation accuracy, ± its noise", shown))
    if "personal_parameters" in summary:
        rows.append(("accuracy is of clients' own", ", ".join(summary["personal_parameters"])))
    rows.append(("privacy", summary["privacy"]))
    if summary["privacy"] != "none":
        spread = " / ".join(
            _show(summary[f"epsilon_{n}"], show_bound) for n in ("min", "median", "max")
        )
        rows.append(("ε by client, min / median / max", spread))
        if "search_epsilon_max" in summary:
            whole = show_bound(summary["search_epsilon_max"])
            rows.append(("ε of the search that chose it", whole))
        rows.append(("δ (largest)", _show(summary["delta_max"])))
        rows.append(("layers against flat, noise energy", _show(summary["division_ratio"])))
        rows.append(("advantage of an attack, at most", _show(summary["attack_advantage_max"])))
        names = ("unit", "trust", "adjacency", "mechanism", "thresholds", "allocation")
        names += ("noise",) if summary.get("noise") else ()
        for name in (*names, "releases"):
            rows.append((name, _show(summary[name])))
    rows.append(("rounds", _show(summary["rounds"])))
    rows.append(("time", f"{summary['seconds']:.1f} s"))
    return rows


def _show(value: Any, show: Callable[[float], str] = show_number) -> str:
    if value is None:
        return "-"
    return show(value) if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
