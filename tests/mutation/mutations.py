"""What a mutation is, and all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One changed place.

    Args:
        file: source, from the root of the tree.
        what: the mistake in a few words, unique in its file.
        old: text that occurs exactly once in the file.
        new: what stands there instead.
        tests: arguments of pytest that should fail, separated by spaces.
        equivalent: why no test can fail, if none can.
    """

    file: str
    what: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}"


def group(file: str, tests: str, *places: tuple[str, ...]) -> list[Mutation]:
    """Mutations of one file that the same tests should notice: (what, old, new[, equivalent])."""
    return [Mutation(file, what, old, new, tests, *rest) for what, old, new, *rest in places]


def all_mutations() -> list[Mutation]:
    """Every mutation of the project."""
    from tests.mutation import (
        adapters,
        attacks,
        audits,
        choices,
        commands,
        correlated,
        deploy,
        federated,
        groups,
        kernels,
        kernels_backward,
        kernels_triton,
        launches,
        ledger,
        packaging,
        preflight,
        releases,
        risks,
        secure_sums,
        shared_rounds,
        shared_weights,
        stopping,
        tuning,
    )

    files = kernels, kernels_backward, kernels_triton, launches, adapters, correlated
    files += shared_rounds, ledger
    files += releases, stopping, commands, deploy, federated, preflight, groups, packaging
    files += risks, secure_sums, shared_weights, choices, audits, attacks, tuning
    return [mutation for file in files for mutation in file.MUTATIONS]
