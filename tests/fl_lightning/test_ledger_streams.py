"""A ledger is read line by line: what a pass says, and that memory does not grow with lines."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.ledger import Ledger, LedgerError, chain, read, stored, verify
from fl_lightning.ledger.quick_lines import QuickLines
from fl_lightning.ledger.stored import StoredReleases, reading
from fl_lightning.values.release import Release, parse_release, release_entry
from tests.fl_lightning.filled_ledger import HEADER, filled, release

ODD: list[dict[str, Any]] = [
    {},
    {"clip_norm": (0.0, 1e-300)},
    {"clip_norm": (-0.0, 1.7976931348623157e308)},
    {"clip_norm": (1e22, 123456789.123)},
    {"shares": (0.1, 0.30000000000000004)},
    {"num_layers": 1, "clip_norm": (2.5,), "shares": (1.0,)},
    {"quantum": 2.0**-40},
    {"quantum": 0.0},
    {"vote_noise_scale": 3.5},
    {"attempt": 3, "first_step": 12345678901234567},
    {"round": 12345678901234567890123},
    {"binding": 'quoted " text', "digest": "ä"},
    {"binding": "", "digest": "back\\slash"},
    {"epsilon_inflation": 1e-9, "tail_delta": 4.6e-21},
    {"guarantee": False, "sampling_rate": 1.0, "noise_multiplier": 0.0},
    {"client": -1},
    {"client": -1, "largest_weight": 2.0, "spent": "ab"},
]
# What nobody may have written: (a text of the line, another one).
EDITS = [
    (b'"attempt":0', b'"attempt":00'),
    (b'"attempt":0', b'"attempt":-0'),
    (b'"attempt":0', b'"attempt":0.0'),
    (b'"attempt":0', b'"attempt":false'),
    (b'"client":0', b'"client":-2'),
    (b'"client":0', b'"client":"0"'),
    (b'"clip_norm":[1.0', b'"clip_norm":[1.00'),
    (b'"clip_norm":[1.0', b'"clip_norm":[-1.0'),
    (b'"clip_norm":[1.0', b'"clip_norm":[1e999'),
    (b'"clip_norm":[1.0', b'"clip_norm":[nan'),
    (b'"clip_norm":[1.0', b'"clip_norm":[1_0.0'),
    (b'"clip_norm":[1.0,2.0]', b'"clip_norm":[1.0]'),
    (b'"clip_norm":[1.0,2.0]', b'"clip_norm":[]'),
    (b'"shares":[0.25,0.75]', b'"shares":[0.25,0.75,0.1]'),
    (b'"shares":[0.25,', b'"shares":[0.25, '),
    (b'"quantum":null', b'"quantum":nan'),
    (b'"quantum":null', b'"quantum":NaN'),
    (b'"quantum":null', b'"quantum":0.5,"quantum":0.25'),
    (b'"quantum":null', b'"quantum":1e-3'),
    (b'"mechanism":"gaussian"', b'"mechanism":"none"'),
    (b'"noise_multiplier":3.0', b'"noise_multiplier":"inf"'),
    (b'"noise_multiplier":3.0', b'"noise_multiplier":3.00'),
    (b'"steps":5', b'"steps":0'),
    (b'"round":1', b'"round":"1"'),
    (b'"kind":"release"', b'"kind":"evaluation"'),
    (b'"kind":"release"', b'"kind":"release","more":1'),
]


def plain_lines(path: Path, rounds: int = 3) -> Path:
    """A closed ledger whose lines are all of the form that is read without a parser; its file."""
    everything = [
        release(k, r, first_step=5 * r, clip_norm=(1.0, 0.5 + r))
        for r in range(rounds)
        for k in (0, 1)
    ]
    with Ledger.create(path, HEADER) as ledger:
        ledger.append(everything)
    return path / "ledger.jsonl"


def parsed(index: int, entry: dict[str, Any]) -> Any:
    return parse_release(entry)


def passes(path: Path) -> list[tuple[Any, ...]]:
    """What a pass says with the quick reader and without it; the quick one knows the first line."""
    found = []
    for quick in (QuickLines(), None):
        each = chain.Reading(path, parsed, quick)
        entries = list(each)
        assert all(type(e) is Release for e in entries)
        found.append((list(map(repr, entries)), entries, each.place, each.problems, each.torn))
    return found


def sealed(path: Path, lines: list[bytes], digest: str) -> None:
    path.write_bytes(b"".join(lines))
    chain.write_head(path, len(lines), digest)


def seal_text(text: bytes) -> tuple[bytes, str]:
    """A line of any text, with the right hash."""
    import hashlib

    digest = hashlib.sha256(text).hexdigest()
    return text[:-1] + b',"hash":"%b"}\n' % digest.encode(), digest


def test_quick_lines_are_what_a_parser_reads(tmp_path: Path) -> None:
    lines, digest = [], None
    plain = {"clip_norm": (1.0, 2.0)}
    for round in range(3):  # the second time everything that lines share is known
        for changes in ODD:
            line, digest = chain.seal(
                release_entry(release(**{"round": round} | plain | changes)), digest
            )
            lines.append(line)
    assert digest is not None
    path = tmp_path / "ledger.jsonl"
    sealed(path, lines, digest)
    quick, slow = passes(path)
    assert quick == slow
    assert len(quick[1]) == len(lines)
    assert not quick[3]
    for one, other in zip(quick[1], slow[1], strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert [*map(type, vars(one).values())] == [*map(type, vars(other).values())]


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_quick_lines_refuse_what_a_parser_refuses(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Lines that were spelled otherwise, or hold what none can, though their hash is right."""
    first, before = chain.seal(release_entry(release(0, 0, clip_norm=(1.0, 2.0))), None)
    line, _ = chain.seal(release_entry(release(0, 1, clip_norm=(1.0, 2.0))), before)
    text = line[: -len(b',"hash":""}\n') - 64] + b"}"
    assert text.count(old) == 1
    line, digest = seal_text(text.replace(old, new))
    path = tmp_path / "ledger.jsonl"
    sealed(path, [first, line], digest)
    quick, slow = passes(path)
    assert quick == slow
    assert quick[3], "it was taken"


@pytest.mark.parametrize("where", ["hash", "prev", "digest"])
def test_a_line_that_is_known_by_its_form_is_hashed(tmp_path: Path, where: str) -> None:
    file = plain_lines(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[5])
    value = entry[where].encode()
    lines[5] = lines[5].replace(value, value[:-1] + (b"0" if value[-1:] != b"0" else b"1"))
    file.write_bytes(b"".join(lines))
    assert verify(file)[0].startswith("line 6 ")
    for skim in (False, True):
        found = reading(file, skim=skim)
        assert len(list(found)) == 5
        assert found.problems[0].startswith("line 6 ")


def test_lines_of_a_known_form_follow_each_other(tmp_path: Path) -> None:
    file = plain_lines(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    for changed in ([*lines[:4], lines[5], lines[4], lines[6]], [*lines[:4], *lines[5:]]):
        file.write_bytes(b"".join(changed))
        assert verify(file)[0].startswith("line 5 does not follow the line before it")
        with pytest.raises(LedgerError, match="line 5 does not follow"):
            Ledger.open(tmp_path)


def test_releases_are_a_sequence(tmp_path: Path) -> None:
    header, releases = stored(filled(tmp_path))
    whole = read(tmp_path)[1]
    assert isinstance(releases, StoredReleases)
    assert (len(releases), list(releases)) == (6, whole)
    assert list(releases) == whole, "they can be gone through again"
    for index in (slice(2, 5), slice(None, None, 2), slice(None, None, -1), slice(4, 99)):
        assert releases[index] == tuple(whole[index])
    assert [releases[i] for i in (0, 5, -1)] == [whole[0], whole[5], whole[5]]
    with pytest.raises(IndexError):
        releases[6]
    assert header["setting"] == HEADER["setting"]


def test_a_file_that_changes_is_found_when_it_is_gone_through(tmp_path: Path) -> None:
    file = filled(tmp_path)
    with Ledger.open(tmp_path) as ledger:
        releases = ledger.releases
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError, match="missing"):
        list(releases)


def test_rounds_under_way_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a run which goes on from a checkpoint may do again, whatever came after it."""
    rounds = [0, 1, 2, 1, 3, 4, 5]  # round 1 was drawn again
    seen: dict[int, int] = {}
    with Ledger.create(tmp_path, {**HEADER, "run_id": "a"}) as ledger:
        for round in rounds:
            attempt = seen[round] = seen.get(round, -1) + 1
            ledger.append([release(k, round, attempt=attempt) for k in (0, 1)])
    everything = read(tmp_path)[1]
    for releases in (0, 2, 6, 8, 10, 14, None):
        known = None if releases is None else {"run_id": "a", "releases": releases}
        with Ledger.open(tmp_path, known) as ledger, monkeypatch.context() as patch:
            newest = max((r.round for r in everything[:releases]), default=0)
            patch.setattr(StoredReleases, "__iter__", lambda _: pytest.fail("read again"))
            for round in range(max(0, newest - 1), 7):
                wanted = [r for r in everything if (r.client, r.round) == (1, round)]
                assert ledger.find(1, round) == wanted, (releases, round)
            patch.undo()
            for round in range(7):
                wanted = [r for r in everything if (r.client, r.round) == (0, round)]
                assert ledger.find(0, round) == wanted


@pytest.mark.parametrize("what", ["open", "verify", "releases"])
def test_memory_does_not_grow_with_lines(tmp_path: Path, what: str) -> None:
    peaks = []
    for rounds in (300, 3000):
        folder = tmp_path / str(rounds)
        plain_lines(folder, rounds)
        verify(folder)  # imports, and what else is made once
        tracemalloc.start()
        if what == "verify":
            assert not verify(folder)
        with Ledger.open(folder) as ledger:
            count = sum(1 for _ in ledger.releases) if what == "releases" else len(ledger)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 2 * rounds
    # 5,400 more lines have 3.5 MB, and would take more than that as objects.
    assert peaks[1] - peaks[0] < 300_000
