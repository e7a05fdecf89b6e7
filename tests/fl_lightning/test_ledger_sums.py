"""One line a round for sums: the same accounts as a line for every client, small and fast."""

from __future__ import annotations

import pickle
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


def test_memory_does_not_grow_with_rounds(tmp_path: Path) -> None:
    first, _, last = grown(tmp_path, header_of(2000, 100), 100)
    # Bytes a round. A line in memory would take 900; what other tests left moves it a little.
    assert (last - first) / 90 < 300


def test_past_rounds_are_found_in_the_file(tmp_path: Path) -> None:
    header, lines = sums(40, 8)
    again = replace(lines[2], attempt=1, binding="b" * 64)
    with Ledger.create(tmp_path, header) as ledger:
        for line in lines[:6]:
            ledger.append([line])
        assert [ledger.find(-1, k) for k in range(7)] == [*([line] for line in lines[:6]), []]
        with pytest.raises(ValueError, match="already recorded"):
            ledger.append([lines[0]])
    with Ledger.open(tmp_path) as ledger:  # as from a checkpoint of round 2
        ledger.append([again])
        assert [ledger.find(-1, k) for k in (0, 2, 5)] == [
            [lines[0]],
            [lines[2], again],
            [lines[5]],
        ]
        ledger.append([lines[6]])
        assert [ledger.find(-1, k) for k in (2, 5, 6)] == [
            [lines[2], again],
            [lines[5]],
            [lines[6]],
        ]
        assert list(ledger.releases) == [*lines[:6], again, lines[6]]
        assert len(ledger) == 8
    assert len(ledger.releases) == 8, "a closed ledger can be read"


def test_a_copy_in_another_process_follows_and_keeps_two_rounds_in_memory(tmp_path: Path) -> None:
    header, lines = sums(40, 8)
    with Ledger.create(tmp_path, header) as ledger:
        ledger.append(lines[:1])
        known = pickle.loads(pickle.dumps((ledger.header, ledger.rounds, ledger.head_hash)))
        copy = Ledger.copy_of(tmp_path, *known)
        for line in lines[1:]:
            ledger.append([line])
            assert copy.find(-1, line.round) == []
            copy.follow([line], ledger.head_hash)
            assert copy.find(-1, line.round) == [line]
            assert list(copy.releases) == lines[: line.round + 1]
        assert copy.head_hash == ledger.head_hash
        assert len(pickle.dumps(copy.rounds)) < 3 * len(pickle.dumps(lines[0])) + 1000
        assert copy.find(-1, 0) == [lines[0]], "read from the file"


def test_lines_of_an_interrupted_append_were_never_taken(tmp_path: Path) -> None:
    header, lines = sums(40, 2)
    with Ledger.create(tmp_path, header) as ledger:
        ledger.append([lines[0]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fl_lightning.ledger.chain.move_head", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ledger.append([lines[1]])
        assert list(ledger.releases) == [lines[0]]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
    assert (last - first) / 450 < 150
