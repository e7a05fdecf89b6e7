"""A sweep of W&B as a charged search: laws are kept, what cannot be charged is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fl_lightning.tune import __main__ as command
from fl_lightning.tune.plan import SearchPlan
from fl_lightning.tune.search import Search
from fl_lightning.tune.shown import shown_by_wandb
from fl_lightning.tune.space import Space
from fl_lightning.tune.sweep import plan_of

ROOT = Path(__file__).resolve().parents[2]
LR: dict[str, Any] = {"min": 0.1, "max": 3.0}
LOG = {"distribution": "log_uniform"}
_E, _LOG = math.e, math.exp(1 / 8)
SWEEP: dict[str, Any] = {"method": "random", "parameters": {"model.client_lr": LR}}


def test_the_shipped_sweep_is_a_plan() -> None:
    path = ROOT / "configs" / "sweeps" / "digits.yaml"
    plan = SearchPlan.read(path, {"epsilon": [3.0, 8.0], "delta": 1e-5})
    assert plan.epsilon == [3.0, 8.0]
    assert (plan.number.mean, plan.config) == (40, ("configs/base.yaml",))
    assert plan.fixed == {"data.val_fraction": 0.1}
    assert plan.space.laws["model.client_lr"] == {"log_uniform": [0.1, 3.0]}
    assert plan.space.laws["trainer.max_epochs"] == {"choice": [10, 20, 40]}
    assert "read_test_set" not in plan.space.laws
    with pytest.raises(ValueError, match="epsilon is missing, there or as --epsilon"):
        SearchPlan.read(path, {"delta": 1e-5})


@pytest.mark.parametrize(
    ("given", "law"),
    [
        ({"value": 3}, {"constant": 3}),
        ({"values": [1, "a"]}, {"choice": [1, "a"]}),
        ({"values": [1, 2], "probabilities": [1, 4]}, {"weighted_choice": [[1, 1], [2, 4]]}),
        ({"min": 1, "max": 4}, {"int_uniform": [1, 4]}),
        ({"min": 1, "max": 4.0}, {"uniform": [1, 4.0]}),
        ({"distribution": "q_uniform", "min": 0, "max": 4}, {"uniform": [0, 4, 1]}),
        ({"distribution": "q_uniform", "min": 0, "max": 4, "q": 0.5}, {"uniform": [0, 4, 0.5]}),
        ({"distribution": "log_uniform", "min": 0, "max": 1}, {"log_uniform": [1.0, math.e]}),
        ({"distribution": "inv_log_uniform", "min": 0, "max": 1}, {"log_uniform": [1 / _E, 1.0]}),
        ({"distribution": "log_uniform_values", **LR}, {"log_uniform": [0.1, 3.0]}),
        ({"distribution": "inv_log_uniform_values", **LR}, {"log_uniform": [0.1, 3.0]}),
        ({"distribution": "q_log_uniform_values", **LR, "q": 2}, {"log_uniform": [0.1, 3.0, 2]}),
        ({"distribution": "normal", "mu": 2}, {"normal": [2, 1]}),
        ({"distribution": "q_log_normal", "sigma": 2, "q": 3}, {"log_normal": [0, 2, 3]}),
    ],
)  # fmt: skip
def test_every_law_of_a_sweep(given: dict[str, Any], law: dict[str, Any]) -> None:
    found = plan_of({**SWEEP, "parameters": {"model": {"parameters": {"client_lr": given}}}})
    if "constant" in law:
        assert found["fixed"] == {"model.client_lr": law["constant"]}
    else:
        assert found["space"] == {"model.client_lr": law}
        Space(found["space"])


@pytest.mark.parametrize(
    ("law", "mean", "deviation"),
    [
        ({"weighted_choice": [[1, 1], [5, 3]]}, 4.0, math.sqrt(3)),
        ({"int_uniform": [2, 4]}, 3.0, math.sqrt(2 / 3)),
        ({"uniform": [0.0, 3.0, 1.0]}, 1.5, math.sqrt(11 / 12)),
        ({"normal": [2.0, 0.5]}, 2.0, 0.5),
        ({"log_normal": [0.0, 0.5]}, _LOG, _LOG * math.sqrt(math.expm1(1 / 4))),
        ({"log_uniform": [1.0, math.e]}, _E - 1, math.sqrt((_E**2 - 1) / 2 - (_E - 1) ** 2)),
    ],
)  # fmt: skip
def test_laws_are_drawn_as_they_say(law: dict[str, Any], mean: float, deviation: float) -> None:
    generator = np.random.default_rng(5)
    space = Space({"a": law})
    found = np.array([space.draw(generator)["a"] for _ in range(20_000)])
    assert found.mean() == pytest.approx(mean, abs=5 * deviation / math.sqrt(20_000))
    assert found.std() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bayes"}, "method='bayes' must be random"),
        ({"method": "grid"}, "method='grid' must be random"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: looking"),
        ({"metric": {"name": "a", "goal": "maximize", "target": 0.9}}, "metric.target: stopping"),
        ({"metric": {"name": "sim_only/val_accuracy"}}, "metric.goal=None must be maximize"),
        ({"metric": {"name": "test/accuracy", "goal": "maximize"}}, "metric.name='test/accuracy'"),
        ({"program": "train.py"}, "program='train.py' must be"),
        ({"command": ["${program}", "${args_json}"]}, r"command: '\$\{args_json\}'"),
        ({"command": ["--lr", "${envvar:LR}"]}, "command: '--lr="),
        ({"command": "fit"}, "command='fit' must be a list"),
        ({"run_cap": "x"}, "trials.mean='x' must be a number"),
        ({"run_cup": 3}, "'run_cup' is none of a sweep's"),
        ({"parameters": {}}, "must name at least one option"),
        ({"parameters": {"a": 3}}, "parameters: a=3 must have values"),
        ({"parameters": {"a": {"min": 1}}}, "a: distribution=None must be one of constant"),
        ({"parameters": {"a": {"distribution": ["x"]}}}, "must be one of constant"),
        ({"parameters": {"a": {"distribution": "uniform", "min": 1}}}, "max is missing of uniform"),
        ({"parameters": {"a": {"values": [1], "mx": 2}}}, "'mx' is unknown of categorical"),
        ({"parameters": {"a": {"values": [1], "probabilities": [1, 2]}}}, "one number for each"),
        ({"parameters": {"a": {**LOG, "min": "x", "max": 1}}}, "takes numbers"),
        ({"parameters": {"a": {**LOG, "min": 1, "max": 1e9}}}, "takes numbers"),
        ({"parameters": {"a": LR, "privacy.epsilon": {"value": 1}}}, "--privacy.epsilon: a search"),
        ({"parameters": {"privacy.epsilon": {"values": [1, 2]}}}, "privacy.epsilon is the same"),
        ({"parameters": {"a": LR, "trainer.logger": {"value": True}}}, "--trainer.logger"),
    ],
)  # fmt: skip
def test_what_cannot_be_charged_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **change}))
    given = ["--epsilon", "8", "--delta", "1e-5", "--run_dir", str(tmp_path / "run")]
    assert command.main([str(path), *given]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(words, told), told
    assert not (tmp_path / "run").exists()


def test_an_epsilon_beside_the_files_own_is_refused(tmp_path: Path) -> None:
    path = ROOT / "configs" / "searches" / "digits.yaml"
    with pytest.raises(ValueError, match=r"epsilon is 8.0 there already: --epsilon=3.0"):
        SearchPlan.read(path, {"epsilon": 3.0})


def test_fixed_options_are_part_of_the_plan(tmp_path: Path) -> None:
    budget = {"epsilon": 8.0, "delta": 1e-5}
    plans = []
    for fraction in (0.1, 0.2):
        path = tmp_path / f"{fraction}.yaml"
        fixed = {"data.val_fraction": {"value": fraction}}
        path.write_text(yaml.safe_dump({**SWEEP, "parameters": {**SWEEP["parameters"], **fixed}}))
        plans.append(SearchPlan.read(path, budget))
    Search(plans[0], tmp_path / "run", 3, 1, lambda *_: None).close()
    with pytest.raises(ValueError, match="another plan"):
        Search(plans[1], tmp_path / "run", 3, 1, lambda *_: None)


def test_wandb_gets_the_chosen_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "options.json").write_text(json.dumps({"privacy.clip_norm": 1.5}))
    (chosen / "summary.json").write_text(json.dumps({"test_accuracy": 0.875}))
    told = shown_by_wandb(chosen, tmp_path / "wandb_of_chosen", "mine")
    assert told.startswith("W&B: offline")
    first = {path.name for path in (tmp_path / "wandb_of_chosen" / "wandb").glob("offline-run-*")}
    kept = (tmp_path / "wandb_of_chosen" / "wandb_id").read_text()
    assert all(name.endswith(kept) for name in first)
    shown_by_wandb(chosen, tmp_path / "wandb_of_chosen", "mine")
    assert (tmp_path / "wandb_of_chosen" / "wandb_id").read_text() == kept
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert shown_by_wandb(chosen, tmp_path / "w", "mine") == "W&B: disabled"
