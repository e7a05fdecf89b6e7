"""The statement: its figures are the ledger's, and each setting says what it must."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.ledger import Ledger, Release, report
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.simulated import (
    simulated_because,
    simulated_reason,
)
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.rounding import round_up


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
    row = " | ".join(round_up(e) for e in epsilons)
    assert f"| epsilon | {row} |" in text
    assert "| delta | 1e-06 | 1e-05 | 1e-05 |" in text
    assert f"**epsilon {round_up(epsilons[-1])} at delta 1e-05 (largest over 3 clients" in text
    assert f"last hash `{digest}`" in text
    assert "noise multiplier (noise scale / sensitivity, votes included): 3 to 5" in text
    assert "spent more" not in text


def test_more_noise_or_steps_change_the_headline(tmp_path: Path) -> None:
    """The plan says 8 throughout; the statement follows what was released."""
    texts = [
        statement(tmp_path / str(steps), {}, {"client": 0, "steps": steps})[0]
        for steps in (50, 5000)
    ]
    assert "epsilon 0.9709 at" in texts[0]
    assert "epsilon 0.9709 at" not in texts[1]
    assert "1 client spent more than its target" in texts[1]


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


LOCAL = {"setting": "client+local", "adjacency": "replace_one"}
SUM = {"setting": "client+aggregator"}
SHARES = {"setting": "client+secure_sum", "min_survivors": 2}
EVERY = [
    ({}, 0.1),
    ({}, 1.0),
    ({"adjacency": "replace_one"}, 0.1),
    ({"adjacency": "replace_one"}, 1.0),
    (LOCAL, 1.0),
    (SUM, 0.1),
    (SUM, 1.0),
    (SHARES, 1.0),
]
# Every sentence that is not always there: a part of it, and when it is true.
SENTENCES = {
    "Exact gradients: ": lambda setting, adjacency, rate: setting == "record+local",
    "Transforms make each input from one record alone": (
        lambda setting, adjacency, rate: setting == "record+local"
    ),
    "Transforms make a client's inputs from its own records": (
        lambda setting, adjacency, rate: setting != "record+local"
    ),
    "nobody learns which records took part": (
        lambda setting, adjacency, rate: setting == "record+local" and rate < 1
    ),
    "nobody but the trusted server learns which clients took part": (
        lambda setting, adjacency, rate: setting == "client+aggregator" and rate < 1
    ),
    "keeps to itself who took part": (
        lambda setting, adjacency, rate: setting == "client+aggregator" and rate < 1
    ),
    "and knows who took part": (
        lambda setting, adjacency, rate: setting == "client+aggregator" and rate == 1
    ),
    "which records were sampled": (
        lambda setting, adjacency, rate: setting == "record+local" and rate < 1
    ),
    "which clients were sampled": (
        lambda setting, adjacency, rate: setting == "client+aggregator" and rate < 1
    ),
    "longer, when more takes part": lambda setting, adjacency, rate: rate < 1,
    "Secure aggregation: ": lambda setting, adjacency, rate: setting == "client+secure_sum",
    "Which clients fail in a round does not depend": (
        lambda setting, adjacency, rate: setting in ("client+aggregator", "client+secure_sum")
    ),
    "times the client's public weight": (
        lambda setting, adjacency, rate: setting in ("client+aggregator", "client+secure_sum")
    ),
    "their sensitivities add up": (
        lambda setting, adjacency, rate: setting in ("client+aggregator", "client+secure_sum")
    ),
    "Every client adds noise of its own": lambda setting, adjacency, rate: (
        setting == "client+local"
    ),
    "one record at each of m clients": lambda setting, adjacency, rate: setting == "record+local",
    "releases of 5 clients": (
        lambda setting, adjacency, rate: setting in ("record+local", "client+local")
    ),
    "1 noised sums, in which 5 clients could be": (
        lambda setting, adjacency, rate: setting in ("client+aggregator", "client+secure_sum")
    ),
    "is replaced by zero": lambda setting, adjacency, rate: adjacency == "zero_out",
    "is replaced by any other unit": lambda setting, adjacency, rate: adjacency == "replace_one",
    "upper bound |": lambda setting, adjacency, rate: adjacency == "replace_one" and rate < 1,
    "Generator (computational): ": lambda setting, adjacency, rate: True,
    "Public, and the same for both neighbours: ": lambda setting, adjacency, rate: True,
    "Without the private data were chosen: ": lambda setting, adjacency, rate: True,
    "Side channels are not observed: how long a round takes": (
        lambda setting, adjacency, rate: True
    ),
    "delta 1 ": lambda setting, adjacency, rate: False,
    "epsilons and deltas of these clients add up": lambda setting, adjacency, rate: False,
}


@pytest.mark.parametrize(("facts", "rate"), EVERY)
def test_every_sentence_stands_where_it_is_true(
    tmp_path: Path, facts: dict[str, Any], rate: float
) -> None:
    facts = {"delta": [1e-5] * 5, "epsilon": [8.0] * 5, **facts}
    releases = [{"client": k, "sampling_rate": rate, "steps": 1} for k in range(5)]
    text, _ = statement(tmp_path, facts, *releases)
    setting, adjacency = facts.get("setting", "record+local"), facts.get("adjacency", "zero_out")
    for words, true in SENTENCES.items():
        assert (words in text) == true(setting, adjacency, rate), words


def group_row(text: str, words: str) -> list[str]:
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {words} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize(
    ("facts", "words", "multiplier"),
    [
        ({}, "5 records of one client", 6 / 5),
        ({}, "one record at each of 5 clients", 6 / math.sqrt(5)),
        (LOCAL, "5 clients", 6 / math.sqrt(5)),
        (SUM, "5 clients", 6 / 5),
        (SHARES, "5 clients", 6 / 5),
    ],
)
def test_groups_are_the_gaussians_that_they_are(
    tmp_path: Path, facts: dict[str, Any], words: str, multiplier: float
) -> None:
    facts = {"delta": [1e-5] * 5, "epsilon": [8.0] * 5, **facts}
    releases = [{"client": k, "sampling_rate": 1.0, "noise_multiplier": 6.0} for k in range(5)]
    text, _ = statement(tmp_path, facts, *releases)
    epsilon = compose_epsilon({NoiseEvent("gaussian", multiplier): 50}, 1e-5)
    one = compose_epsilon({NoiseEvent("gaussian", 6.0): 50}, 1e-5)
    cells = group_row(text, words)
    assert cells[0] == round_up(epsilon)
    assert cells[1].endswith(f" at {round_up(5 * one)}")
    assert cells[2:] == ["exact", "not stated"]


def test_a_sum_of_everybody_counts_its_steps_once(tmp_path: Path) -> None:
    facts = {**SUM, "delta": [1e-5] * 5, "epsilon": [8.0] * 5}
    line = {"client": -1, "sampling_rate": 0.2, "noise_multiplier": 2.0, "steps": 1}
    sums = [{**line, "round": r, "digest": str(r), "tail_delta": 1e-9} for r in range(10)]
    text, _ = statement(tmp_path / "all", facts, *sums)
    each = [{**s, "client": k} for s in sums for k in range(5)]
    same, _ = statement(tmp_path / "each", facts, *each)
    cells = group_row(text, "2 clients")
    assert cells == group_row(same, "2 clients")
    assert "10 noised sums, in which 5 clients could be, in 10 rounds" in text
    assert "10 noised sums, in which 5 clients could be, in 10 rounds" in same
    assert "delta 1e-08 (largest client)" in text
    assert "delta 1e-08 (largest client)" in same
    assert float(cells[0]) > compose_epsilon({NoiseEvent("gaussian", 2.0, 0.2): 10}, 1e-5)


def test_a_group_is_in_every_step_of_a_round(tmp_path: Path) -> None:
    facts = {**SUM, "delta": [1e-5] * 5, "epsilon": [8.0] * 5}
    line = {"client": -1, "sampling_rate": 0.2, "noise_multiplier": 2.0}
    rows = []
    for rounds, steps in ((10, 1), (5, 2)):
        sums = [{**line, "steps": steps, "round": r, "digest": str(r)} for r in range(rounds)]
        text, _ = statement(tmp_path / str(rounds), facts, *sums)
        rows.append(group_row(text, "2 clients"))
    assert rows[0] == rows[1]


def test_charges_of_a_client_and_of_everybody_add_up(tmp_path: Path) -> None:
    facts = {**SUM, "delta": [1e-5] * 3, "epsilon": [8.0] * 3}
    line = {"sampling_rate": 1.0, "steps": 1, "tail_delta": 1e-9}
    releases = [
        {**line, "client": -1},
        {**line, "client": 1, "round": 1},
        {**line, "client": 2, "round": 1, "tail_delta": 3e-9},
    ]
    assert "delta 4e-09 (largest client)" in statement(tmp_path, facts, *releases)[0]


def test_groups_are_no_larger_than_what_there_is(tmp_path: Path) -> None:
    facts = {"client_sizes": [4, 3], "delta": 1e-5, "epsilon": 8.0}
    text, _ = statement(tmp_path, facts, {"client": 0}, {"client": 1})
    assert re.findall(r"^\| (\d+|one record at each of \d+) (?:records|clients)", text, re.M) == [
        "2",
        "one record at each of 2",
    ]
    alone, _ = statement(tmp_path / "one", {**LOCAL, "delta": 1e-5}, {"client": 0})
    assert "## Groups" not in alone


def test_inexact_noise_of_a_group_is_charged_where_the_header_says_what_it_was(
    tmp_path: Path,
) -> None:
    facts = {**SUM, "delta": [1e-5] * 5, "noise_form": "wide", "dims": [100, 10]}
    line = {"client": -1, "sampling_rate": 1.0, "noise_multiplier": 2.0, "steps": 1}
    cells = group_row(statement(tmp_path, facts, line)[0], "5 clients")
    assert 0 < float(cells[3]) < 1e-9


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"seed": 3}, "public seed"),
        ({"rng": "philox10"}, None),
        ({"rng": "chacha8"}, None),
        ({"setting": "none", "seed": 3}, None),
    ],
)
def test_when_a_run_is_simulated(options: dict[str, Any], reason: str | None) -> None:
    assert simulated_because(PrivacyConfig(**options)) == reason


def test_old_headers_say_that_the_seed_was_public() -> None:
    assert simulated_reason({"simulated": True}) == "public seed"
    assert simulated_reason({"simulated": False}) is None


@pytest.mark.parametrize("rng", ["chacha12", "philox7"])
def test_generators_of_older_versions_are_unknown_to_new_runs(rng: str) -> None:
    with pytest.raises(ValueError, match="rng"):
        PrivacyConfig(rng=rng)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("facts", "present", "absent"),
    [
        (
            {"simulated": True, "simulated_because": "generator philox7", "rng": "philox7"},
            ["SIMULATED: generator philox7", "`philox7` is no basis", "key stays secret"],
            ["(computational)", "public seed", "PUBLIC"],
        ),
        (
            {"simulated": True, "simulated_because": "public seed", "rng": "chacha20"},
            ["SIMULATED: public seed", "words of `chacha20` from uniform", "PUBLIC seed"],
            ["no basis", "stays secret"],
        ),
        ({"rng": "philox10"}, ["key of 64 bits", "analysed it as a cipher"], ["SIMULATED"]),
        ({"rng": "chacha20"}, ["words of `chacha20` from uniform"], ["64 bits", "SIMULATED"]),
        ({"thresholds": "fixed"}, ["initial network, the clip norms"], ["first clip norms"]),
        ({"thresholds": "quantile"}, ["initial network, the first clip norms"], []),
        ({"transform_checked": True}, ["compared on a few records before the run"], []),
        ({}, [], ["compared on a few records"]),
    ],
)
def test_what_is_assumed(
    tmp_path: Path, facts: dict, present: list[str], absent: list[str]
) -> None:
    text, _ = statement(tmp_path, facts, {"client": 0})
    for words in present:
        assert words in text
    for words in absent:
        assert words not in text


def test_it_is_one_page(tmp_path: Path) -> None:
    text, _ = statement(tmp_path, {"simulated": True}, *({"client": c} for c in range(3)))
    assert text.endswith("\n")
    assert len(text.splitlines()) < 80
    assert "\n\n\n" not in text
    assert all(not part.startswith("## ") or "\n" not in part for part in text.split("\n\n"))
