"""Whether a record was trained on: loss, likelihood ratio, and a server that sees all releases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_lightning.attacks import intervals, likelihood
from fl_lightning.attacks.attacked import AttackedRun, load_run, replay
from fl_lightning.attacks.candidates import Candidates, candidates_of
from fl_lightning.attacks.passive import PassiveServer
from fl_lightning.attacks.shadows import (
    Plan,
    check_shadows,
    is_probability,
    shadow_confidences,
)
from fl_lightning.ledger.risks import run_risks

Scores = dict[str, npt.NDArray[np.float64]]
LOSS, ONLINE, OFFLINE = "loss", "likelihood ratio", "likelihood ratio, offline"
PASSIVE = "all releases"
RATES = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 61)])


@dataclass(frozen=True)
class Membership:
    """What attacks found out about the candidates. Private: it tells of records.

    Args:
        scores: of every attack, [n], higher for members.
        member: whether each candidate was trained on, [n].
        ceiling: largest true positive rate that the ledger allows at each of `rates`, for "was the
            record used, or nothing in its place"; None where nothing is proven.
        swapped: the same for "was it this record or another one"; None where nothing is proven.
        facts: what was attacked and how.
    """

    scores: Scores
    member: npt.NDArray[np.bool_]
    ceiling: npt.NDArray[np.float64] | None
    swapped: npt.NDArray[np.float64] | None
    facts: Mapping[str, Any]

    def figures(self) -> dict[str, Any]:
        """Area and true positive rates of every attack with intervals, as JSON."""
        rates = intervals.FALSE_POSITIVE_RATES
        found = {
            name: attack_figures(values[self.member], values[~self.member])
            for name, values in self.scores.items()
        }
        ceilings = {"ceiling": self.ceiling, "ceiling_of_a_swap": self.swapped}
        return {
            **self.facts,
            "members": int(self.member.sum()),
            "others": int((~self.member).sum()),
            "attacks": found,
            **{
                name: None
                if curve is None
                else {f"tpr_at_{r:g}": float(np.interp(r, RATES, curve)) for r in rates}
                for name, curve in ceilings.items()
            },
        }


def attack_figures(
    members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """Area and true positive rates with intervals, as JSON."""
    return {
        "auc": asdict(intervals.area(members, others)),
        **{
            f"tpr_at_{rate:g}": asdict(intervals.power(members, others, rate))
            for rate in intervals.FALSE_POSITIVE_RATES
        },
    }


def ceilings(
    header: Mapping[str, Any] | None, releases: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Largest true positive rates at `RATES` by the ledger: of a record's use, and of a swap.

    A swap of two records is two steps of zero_out: whoever could tell them apart better than the
    bound applied twice would break one of them. Under replace_one both are the same.
    """
    risks = None if header is None else run_risks(header, releases)
    if risks is None:
        return None
    assert header is not None
    once = np.asarray(risks.worst.power(RATES))
    return once, once if header["adjacency"] == "replace_one" else risks.worst.power(once)


def model_scores(
    module: Any,
    network: Any,
    candidates: Candidates,
    shadows: tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]] | None,
) -> Scores:
    """Scores from the last model alone (black box), [n] each."""
    told = likelihood.scaled_confidences(
        network,
        module.loss,
        candidates.x,
        candidates.y,
        probability=is_probability(module),
    )
    found = {LOSS: told}
    if shadows is not None:
        found[ONLINE] = likelihood.online(told, *shadows)
        found[OFFLINE] = likelihood.offline(told, *shadows)
    return found


def attack_run(
    folder: str | Path, *, shadows: int = 64, watch: bool = True, seed: int = 0
) -> Membership:
    """Attack a finished run; its folder is only read.

    Args:
        folder: of the run.
        shadows: shadow models of the likelihood ratio; 0: only the other attacks.
        watch: whether the run is computed again to attack all its releases.
        seed: of the attacker.

    Raises:
        FileNotFoundError, LedgerError, ValueError: see `load_run`, `candidates_of`,
            `shadow_confidences` and `replay`.
    """
    if shadows and shadows < 4:
        raise ValueError(f"shadows={shadows} must be 0 or at least 4")
    run = load_run(folder)
    if shadows:
        check_shadows(run.module)
    candidates = candidates_of(run.data, seed=seed)
    network = copy.deepcopy(run.module.network)
    network.load_state_dict(dict(run.weights), strict=False)
    sizes = run.data.partition.sizes
    plan = Plan(copy.deepcopy(run.module), sizes, run.rounds, run.planned, run.multiplier)
    passive = PassiveServer(run.module, candidates, sizes)
    if watch:
        replay(run, [passive])
    trained = None
    if shadows:
        trained = shadow_confidences(plan, candidates, shadows=shadows, seed=seed)
    scores = model_scores(plan.module, network, candidates, trained)
    if watch:
        scores[PASSIVE] = passive.scores
    proven = ceilings(run.header, run.releases)
    return Membership(
        scores,
        candidates.member,
        None if proven is None else proven[0],
        None if proven is None else proven[1],
        _facts(run, shadows),
    )


def _facts(run: AttackedRun, shadows: int) -> dict[str, Any]:
    return {
        "setting": run.module.privacy.setting,
        "rounds": run.rounds,
        "clients": run.data.num_clients,
        "shadows": shadows,
        "ledger_head": None if run.header is None else len(run.releases),
    }


def picture(found: Membership) -> Any:
    """Figure: right against false alarms of every attack below the ceiling."""
    from fl_lightning.attacks.pictures import roc_panels

    name, ceiling = str(found.facts["setting"]), None
    if found.ceiling is not None and found.swapped is not None:
        ceiling = (RATES, found.ceiling, found.swapped)
    attacks = {
        attack: (values[found.member], values[~found.member])
        for attack, values in found.scores.items()
    }
    return roc_panels({name: attacks}, {name: ceiling})
