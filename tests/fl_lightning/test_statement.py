"""The statement: its figures are the ledger's, and each setting says what it must."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.ledger import Ledger, Release, report
from fl_lightning.privacy.statement import privacy_statement


def statement(path: Path, facts: dict[str, Any], *releases: dict[str, Any]) -> tuple[str, str]:
    """Statement and head hash of a run with these releases."""
    header = {
        "setting": "record+local",
        "privacy_unit": "record",
        "trust": "client",
        "adjacency": "zero_out",
        "mechanism": "gaussian",
        "delta": [1e-5, 1e-6, 1e-5],
        "epsilon": [8.0, 8.0, 8.0],
        "simulated": False,
        **facts,
    }
    usual = {
        "round": 0,
        "steps": 50,
        "mechanism": "gaussian",
        "noise_multiplier": 3.0,
        "sampling_rate": 0.1,
        "adjacency": header["adjacency"],
        "num_layers": 1,
        "clip_norm": (1.0,),
        "shares": (1.0,),
        "binding": "",
        "digest": "",
    }
    with Ledger.create(path, header) as ledger:
        ledger.append([Release(**{**usual, **r}) for r in releases])
        return privacy_statement(ledger), ledger.head_hash


def test_figures_come_from_the_ledger(tmp_path: Path) -> None:
    releases = [{"client": c, "noise_multiplier": z} for c, z in enumerate((3.0, 4.0, 5.0))]
    text, digest = statement(tmp_path, {}, *releases)
    epsilons = sorted(r.epsilon for r in report(tmp_path).values())
    row = " | ".join(f"{e:.4g}" for e in epsilons)
    assert f"| epsilon | {row} |" in text
    assert "| delta | 1e-06 | 1e-05 | 1e-05 |" in text
    assert f"**epsilon {epsilons[-1]:.4g} at delta 1e-05 (largest over 3 clients" in text
    assert f"epsilon {2 * epsilons[-1]:.4g}, delta {2e-5 * math.exp(epsilons[-1]):.4g}" in text
    assert f"last hash `{digest}`" in text
    assert "noise multiplier (noise scale / sensitivity, votes included): 3 to 5" in text
    assert "spent more" not in text


def test_more_noise_or_steps_change_the_headline(tmp_path: Path) -> None:
    """The plan says 8 throughout; the statement follows what was released."""
    texts = [
        statement(tmp_path / str(steps), {}, {"client": 0, "steps": steps})[0]
        for steps in (50, 5000)
    ]
    assert "epsilon 0.9708 at" in texts[0]
    assert "epsilon 0.9708 at" not in texts[1]
    assert "1 clients spent more than their target" in texts[1]


@pytest.mark.parametrize(
    ("facts", "change", "present", "absent"),
    [
        (
            {},
            {},
            ["one record of one client", "Sensitivity: the clip norm", "Poisson"],
            ["SIMULATED"],
        ),
        (
            {"setting": "client+local", "adjacency": "replace_one"},
            {"sampling_rate": 1.0},
            ["all records of one client", "twice the clip norm", "know that it took part"],
            ["Poisson", "Nominal"],
        ),
        ({"simulated": True}, {}, ["SIMULATED: public seed", "PUBLIC seed"], ["stays secret"]),
        (
            {"setting": "abstract"},
            {"guarantee": False},
            ["Nominal epsilon, no guarantee", "nominal, no guarantee"],
            ["Adversary", "Assumptions"],
        ),
        (
            {"setting": "none"},
            {"noise_multiplier": 0.0, "guarantee": False},
            ["No privacy", "epsilon infinite"],
            ["Adversary", "Assumptions", "Nominal"],
        ),
        ({"tail_cutoff": 8.2}, {"tail_delta": 1e-9}, ["8.2 noise scales", "1e-09 (largest"], []),
        (
            {},
            {"epsilon_inflation": 2e-7},
            ["Real arithmetic: noise form `wide`", "epsilon 2e-07 (largest", "Exact gradients"],
            ["Floating point"],
        ),
        ({"noise_form": "fast"}, {}, ["Real arithmetic: noise form `fast`"], ["Floating point"]),
        (
            {"noise_form": "grid", "setting": "client+local", "adjacency": "replace_one"},
            {"sampling_rate": 1.0},
            ["Floating point: noise form `grid`", "whole numbers"],
            ["Real arithmetic", "Exact gradients"],
        ),
        (
            {"noise_form": "grid"},
            {},
            ["Floating point: noise form `grid`", "Exact gradients"],
            ["Real arithmetic"],
        ),
    ],
)
def test_settings(
    tmp_path: Path, facts: dict, change: dict, present: list[str], absent: list[str]
) -> None:
    text, _ = statement(tmp_path, facts, {"client": 0, **change})
    for words in present:
        assert words in text
    for words in absent:
        assert words not in text


def test_one_unnoised_release_makes_epsilon_infinite(tmp_path: Path) -> None:
    text, _ = statement(tmp_path, {}, {"client": 0}, {"client": 1, "noise_multiplier": 0.0})
    assert "**epsilon infinite at delta" in text


def test_nothing_released(tmp_path: Path) -> None:
    text, _ = statement(tmp_path, {})
    assert "**epsilon 0 at delta" in text
    assert "Ledger of 0 releases" in text


def test_it_is_one_page(tmp_path: Path) -> None:
    text, _ = statement(tmp_path, {"simulated": True}, *({"client": c} for c in range(3)))
    assert text.endswith("\n")
    assert len(text.splitlines()) < 60
    assert "\n\n\n" not in text
    assert all(not part.startswith("## ") or "\n" not in part for part in text.split("\n\n"))
