"""The list of mutations fits the sources, and its table has no survivor without a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.mutation.mutations import Mutation, all_mutations  # noqa: E402

sys.path.remove(str(ROOT))
MUTATIONS = all_mutations()


def test_there_are_many_and_each_is_named_once() -> None:
    assert len(MUTATIONS) >= 60
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_fits_its_source_and_its_tests_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    changed = text.replace(mutation.old, mutation.new)
    assert changed != text
    compile(changed, mutation.file, "exec")
    for test in mutation.tests.split():
        path = ROOT / test.split("::")[0]
        assert test.startswith("-") or path.exists() or "/" not in test, test
        for function in test.split("::")[1:]:
            assert f"def {function.split('[')[0]}(" in path.read_text(), test


def test_no_mutation_survives_without_a_reason() -> None:
    table = (ROOT / "docs" / "mutation.md").read_text()
    for mutation in MUTATIONS:
        (row,) = [
            line
            for line in table.splitlines()
            if line.startswith(f"| `{mutation.file}` | {mutation.what} | ")
        ]
        result = row.split(" | ")[2]
        assert result in ("killed", "not tried yet", f"equivalent: {mutation.equivalent}"), row
