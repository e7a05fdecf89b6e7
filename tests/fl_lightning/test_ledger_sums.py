"""One line a round for sums: the same accounts as a line for every client, small and fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.ledger import compare, for_every_client, grown, header_of, sum_of
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.ledger import Ledger
from fl_lightning.ledger.accounts import accounts, largest_epsilon
from fl_lightning.ledger.client_reports import report_clients
from fl_lightning.values.client_set import encode
from fl_lightning.values.release import Release


def sums(clients: int, rounds: int) -> tuple[dict, list[Release]]:
    """Sums of everybody and of parts, which have other largest weights."""
    header = header_of(clients, rounds)
    generator, found = np.random.default_rng(0), []
    for round in range(rounds):
        line = sum_of(header, round, np.zeros(clients))
        if round % 3:
            ids = np.flatnonzero(generator.random(clients) < 0.6)
            weights, z = (np.array(header[n])[ids] for n in ("weights", "noise_multiplier"))
            least, most = float(z.min()), float(weights.max())
            line = replace(line, clients=encode(ids), noise_multiplier=least, largest_weight=most)
        found.append(line)
    return header, found


def test_a_sum_charges_each_client_as_a_line_of_its_own() -> None:
    header, lines = sums(40, 12)
    each = [own for line in lines for own in each_of(header, line)]
    one, all_lines = accounts(header, lines), accounts(header, each)
    assert one == all_lines
    assert [list(a.charges) for a in one.values()] == [list(a.charges) for a in all_lines.values()]
    reports = report_clients(header, lines)
    assert reports == report_clients(header, each)
    assert largest_epsilon(one) == max(r.epsilon for r in reports.values())
    assert len({r.noise_multipliers for r in reports.values()}) > 20


def each_of(header: dict, line: Release) -> list[Release]:
    ids = set(line.members(len(header["delta"])).tolist())
    whole = for_every_client(header, replace(line, clients=None))
    own = dict(zip(sorted(ids), client_multipliers(header, line).tolist(), strict=True))
    found = [r for r in whole if r.client in ids]
    assert [r.noise_multiplier for r in found] == list(own.values())
    return [replace(r, clients=None) for r in found]


def test_sums_survive_the_file(tmp_path: Path) -> None:
    header, lines = sums(40, 6)
    with Ledger.create(tmp_path, header) as ledger:
        for line in lines:
            ledger.append([line])
        with pytest.raises(ValueError, match="already recorded"):
            ledger.append([lines[0]])
    with Ledger.open(tmp_path) as ledger:
        assert list(ledger) == lines
        assert ledger.find(-1, 4) == [lines[4]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": 3}, "client must be -1"),
        ({"largest_weight": None}, "largest_weight"),
        ({"largest_weight": 0.0}, "largest_weight"),
        ({"spent": None}, "spent"),
        ({"clients": "2-1"}, "clients must be a set"),
    ],
)
def test_a_sum_that_is_none_is_refused(changes: dict, words: str) -> None:
    _, (line, *_) = sums(4, 1)
    with pytest.raises(ValueError, match=words):
        replace(line, **changes)


def test_memory_grows_by_lines_and_not_by_clients(tmp_path: Path) -> None:
    first, _, last = grown(tmp_path, header_of(2000, 100), 100)
    assert (last - first) / 90 < 3000, "bytes a round; a line for every client took 1.2 MB"


def test_it_is_small(tmp_path: Path) -> None:
    found = compare(300, 15, tmp_path)
    assert found["bytes_ratio"] > 60
    assert found["verify_seconds_ratio"] > 5


@pytest.mark.slow
def test_two_thousand_clients(tmp_path: Path) -> None:
    found = compare(2000, 150, tmp_path / "compared")
    assert found["bytes_ratio"] > 100
    assert found["verify_seconds_ratio"] > 50
    first, _, last = grown(tmp_path / "memory", header_of(2000, 500), 500)
    assert (last - first) / 450 < 3000
