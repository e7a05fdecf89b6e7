"""What must hold between the header of a ledger and its lines, whoever wrote the hashes.

A chain of hashes shows that nothing was changed after it was written. Somebody who edits a line and
seals the chain again passes that test. These checks find such an edit where it contradicts what
else the ledger says. A ledger that is wrong throughout and without contradiction is not found; a
head hash that was kept elsewhere finds it.

The checks need the facts of a run's header. Those of schema 1 state all of them; a header of
schema 0, without `schema`, is checked as far as it goes; one that was made by hand, without
`planned_steps`, is not checked.
"""

from __future__ import annotations

import functools
import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from aadp_kernels import vote_noise
from fl_lightning.accounting.sum_costs import num_clients, of_client, of_clients, spent_digest
from fl_lightning.ledger.client_reports import undercharged_lines
from fl_lightning.ledger.correlated_checks import check_lines
from fl_lightning.ledger.evaluation_checks import check_evaluations
from fl_lightning.ledger.header_checks import check_header
from fl_lightning.values.release import ALL_CLIENTS, Release

SUMMED = ("client+aggregator", "client+secure_sum")
# (number of a line, release) → problems; called for all lines in order.
Check = Callable[[int, Release], Iterable[str]]


def contradictions(header: Mapping[str, Any], releases: Iterable[Release]) -> list[str]:
    """Where a header and the lines below it cannot both be true, each with its line; [] if nowhere.

    Lines that charge too little are looked for where nothing else is wrong.

    Args:
        header: of a ledger.
        releases: its lines, oldest first; gone through once.
    """
    checks, steps, multipliers = [], _nothing, _nothing
    if "planned_steps" in header:
        found = check_header(header)
        if found:
            return [f"line 1 (header): {problem}" for problem in found]
        checks = [_check_facts(header), check_lines(header), check_evaluations(header)]
        steps, multipliers = _check_steps(header), _check_multipliers(header)
    first: list[tuple[Check, list[str]]] = [(check, []) for check in checks]
    in_order: list[str] = []
    then: list[tuple[Check, list[str]]] = [(multipliers, []), (undercharged_lines(header), [])]
    fine: set[tuple[Any, ...]] = set()
    for line, release in enumerate(releases, 2):
        facts = _facts(release)
        if facts is None or facts not in fine:
            for check, problems in first:
                problems += check(line, release)
            if any(problems for _, problems in first):
                continue
            for check, problems in then:
                problems += check(line, release)
            if facts is not None and not any(problems for _, problems in then):
                fine.add(facts)
        in_order += steps(line, release)
    together = [problem for _, problems in first for problem in problems]
    return together or in_order or next((problems for _, problems in then if problems), [])


def _facts(release: Release) -> tuple[Any, ...] | None:
    """All that decides what is said of a line without those before it; None where more does.

    Most lines of a client have the facts of others, which need not be looked at again.
    """
    if release.client == ALL_CLIENTS or release.evaluation or release.quantum is not None:
        return None
    return (
        release.client, release.steps, release.mechanism, release.noise_multiplier,
        release.sampling_rate, release.adjacency, release.vote_noise_scale, release.num_layers,
        release.guarantee, release.epsilon_inflation, release.tail_delta,
    )  # fmt: skip


def _nothing(line: int, release: Release) -> Iterable[str]:
    return ()


def _check_facts(header: Mapping[str, Any]) -> Check:
    """A check of each line with the facts of the run."""
    noise = _calibrated(header)

    def check(line: int, release: Release) -> Iterator[str]:
        if not release.evaluation:
            for problem in _against_header(header, release, noise):
                yield f"line {line}: {problem}"

    return check


def _against_header(
    header: Mapping[str, Any], release: Release, noise: Callable[[Release], Iterator[str]]
) -> Iterator[str]:
    """Problems of one line with the facts of the run; `noise` looks at those of schema 1."""
    setting = header["setting"]
    if bool(header.get("schema")) and release.is_sum != (setting in SUMMED):
        yield f"is {'a sum' if release.is_sum else 'of one client'}, the setting is {setting}"
        return
    if release.client == ALL_CLIENTS and setting not in SUMMED:
        yield f"is a sum, the setting is {setting}"
        return
    stated = {
        "mechanism": (release.mechanism, header["mechanism"]),
        "adjacency": (release.adjacency, header["adjacency"]),
        "guarantee": (release.guarantee, setting != "abstract"),
        "num_layers": (release.num_layers, len(header["dims"])),
        "votes": (release.vote_noise_scale is not None, header["thresholds"] == "quantile"),
        "grid": (release.quantum is not None, header["noise_form"] == "grid"),
        "sampling_rate": (release.sampling_rate, _rate(header, release)),
    }
    if setting != "record+local":
        stated["steps"] = release.steps, 1
    for name, (line, fact) in stated.items():
        if line != fact:
            yield f"{name} is {line}, by the header it is {fact}"
    everyone = num_clients(header)
    last = release.client if release.clients is None else int(release.members(everyone)[-1])
    if last >= everyone:
        yield f"client {last} is not among the {everyone} clients"
    elif header.get("schema"):
        yield from noise(release)


def _rate(header: Mapping[str, Any], release: Release) -> float:
    """The sampling rate by the header; of a header that states none, the line's."""
    if header.get("schema"):
        return header["sampling_rate"]
    if header["setting"] == "record+local":
        return release.sampling_rate
    return header.get("cohort_rate") or 1.0


def _calibrated(header: Mapping[str, Any]) -> Callable[[Release], Iterator[str]]:
    """A check whether a line has the noise that was calibrated."""
    everyone = num_clients(header)

    @functools.lru_cache(maxsize=64)
    def cohort(clients: str | None) -> tuple[int, float, float]:
        ids = Release.members_of(clients, everyone)
        # Rounds that share noise have one scale: that of all clients.
        among = ids if header.get("coefficients") is None else slice(None)
        z, weight = (of_clients(header, name)[among] for name in ("noise_multiplier", "weights"))
        return len(ids), float(z.min()), float(weight.max())

    def check(release: Release) -> Iterator[str]:
        if release.is_sum and header.get("member") is not None:
            # At a node: z and largest weight are of clients that its header does not know. What it
            # is charged follows from them by the formulas that weighted it.
            z = release.noise_multiplier
        elif release.is_sum:
            count, z, largest = cohort(release.clients)
            if release.largest_weight != largest:
                yield f"largest_weight is {release.largest_weight}, by the header it is {largest}"
            least, most = header["min_survivors"] or 1, everyone
            if header["cohort_rate"] is None:
                most = header["clients_per_round"]
            if not least <= count <= most:
                yield f"{count} clients are in the sum, by the header {least} to {most}"
        else:
            z = of_client(header["noise_multiplier"], release.client)
            assert z is not None
        if release.noise_multiplier != z:
            yield f"noise_multiplier is {release.noise_multiplier}, calibrated was {z}"
        elif release.vote_noise_scale is not None and header["vote_share"] > 0:
            wanted = _vote_noise_scale(header, z)
            if not math.isclose(release.vote_noise_scale, wanted, rel_tol=1e-9):
                yield f"vote_noise_scale is {release.vote_noise_scale}, by the header {wanted}"
        if release.quantum is not None and release.noise_multiplier == z:
            wanted = _quantum(header, release)
            if not math.isclose(release.quantum, wanted, rel_tol=1e-9):
                yield f"quantum is {release.quantum}, by its noise {wanted}"

    return check


def _quantum(header: Mapping[str, Any], release: Release) -> float:
    """Coarsest grid of a line, by its clip norms, shares and multiplier."""
    import torch

    from aadp_kernels import grid, noise_scales

    sums = release.noise_multiplier
    if release.vote_noise_scale is not None:
        sums, _ = vote_noise(
            sums,
            num_layers=release.num_layers,
            vote_share=header["vote_share"],
            mechanism=release.mechanism,
            adjacency=release.adjacency,
        )
    scales = noise_scales(
        torch.tensor(release.clip_norm, dtype=torch.float64),
        torch.tensor(release.shares, dtype=torch.float64),
        mechanism=release.mechanism,
        noise_multiplier=sums,
        adjacency=release.adjacency,
    )
    return float(grid.quantum(scales, release.mechanism).max())


def _vote_noise_scale(header: Mapping[str, Any], multiplier: float) -> float:
    """Noise scale of the votes, which share one budget with the layers."""
    return vote_noise(
        multiplier,
        num_layers=len(header["dims"]),
        vote_share=header["vote_share"],
        mechanism=header["mechanism"],
        adjacency=header["adjacency"],
    )[1]


class _Attempts:
    """Counts the lines of a client in a round, in eight bytes a line."""

    def __init__(self) -> None:
        self._rounds: dict[int, array[int]] = {}  # of each client, ascending
        self._repeated: Counter[tuple[int, int]] = Counter()

    def before(self, release: Release) -> int:
        """How many were before this one, which counts from now on."""
        rounds = self._rounds.setdefault(release.client, array("Q"))
        if not rounds or rounds[-1] < release.round:
            rounds.append(release.round)
            return 0
        place = bisect_left(rounds, release.round)
        if rounds[place] != release.round:
            rounds.insert(place, release.round)
            return 0
        self._repeated[release.client, release.round] += 1
        return self._repeated[release.client, release.round]


def _check_steps(header: Mapping[str, Any]) -> Check:
    """A check for the first line before which one is missing or repeated, or that is too many."""
    everyone = num_clients(header)
    most = np.full(everyone, np.inf)
    if header.get("affordable_steps") is not None:
        most = of_clients(header, "affordable_steps")
    # Of single clients lists are faster.
    summed = header["setting"] in SUMMED
    spent: Any = np.zeros(everyone, dtype=np.int64) if summed else [0] * everyone
    limits: Any = most if summed else most.tolist()
    attempts = _Attempts()
    number, found = 0, False

    def check(line: int, release: Release) -> Iterator[str]:
        nonlocal number, found
        if found or release.evaluation:
            return
        problem = _out_of_place(number, release, attempts.before(release), spent)
        number += 1
        problem = problem or _too_many(release, spent, limits)
        if problem:
            found = True
            yield f"line {line}: {problem}"

    return check


def _out_of_place(number: int, release: Release, attempts: int, spent: Any) -> str:
    """Why lines before this one must be missing or others; "" if nothing says so."""
    if release.attempt != attempts:
        return (
            f"attempt {release.attempt} at round {release.round}, of which there are {attempts} "
            "before it: lines were removed or repeated"
        )
    before = spent[release.client] if release.client != ALL_CLIENTS else int(spent.max())
    before = number if release.is_sum else before
    if release.first_step != before:
        return (
            f"begins at step {release.first_step}, the lines before it end at {before}: lines were "
            "removed or repeated"
        )
    if release.is_sum and release.spent != spent_digest(spent):
        return "the clients of the sums before it are not those that it was written after"
    return ""


def _too_many(release: Release, spent: Any, most: Any) -> str:
    """Count a line's steps; what shows that they are more than was calibrated."""
    if release.client != ALL_CLIENTS:
        client = release.client
        spent[client] += release.steps
    else:
        ids = release.members(len(spent))
        spent[ids] += release.steps
        client = int(ids[(spent - most)[ids].argmax()])
    if spent[client] <= most[client]:
        return ""
    return (
        f"takes client {client} to {spent[client]} steps, its noise was calibrated for "
        f"{most[client]:.0f}"
    )


def _check_multipliers(header: Mapping[str, Any]) -> Check:
    """A client's noise is calibrated once: a check that its lines have one event (schema 0)."""
    if header.get("schema") or header["setting"] in SUMMED:
        return _nothing
    first: dict[int, Release] = {}
    found = False

    def check(line: int, release: Release) -> Iterator[str]:
        nonlocal found
        one = first.setdefault(release.client, release)
        if not found and release.event != one.event:
            found = True
            yield (
                f"line {line}: noise_multiplier {release.noise_multiplier}, sampling_rate "
                f"{release.sampling_rate}; before, client {release.client} had "
                f"{one.noise_multiplier} and {one.sampling_rate}"
            )

    return check
