"""The list of mutations fits the sources, and its table has no survivor without a reason."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.mutation.mutations import all_mutations  # noqa: E402

sys.path.remove(str(ROOT))
MUTATIONS = all_mutations()


def test_there_are_many_and_each_is_named_once() -> None:
    assert len(MUTATIONS) >= 60
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("file", sorted({m.file for m in MUTATIONS}))
def test_mutations_of_a_file_fit_it_and_their_tests_exist(file: str) -> None:
    text = (ROOT / file).read_text()
    for mutation in MUTATIONS:
        if mutation.file == file:
            assert text.count(mutation.old) == 1, mutation.name
            changed = text.replace(mutation.old, mutation.new)
            assert changed != text, mutation.name
            compile(changed, mutation.name, "exec")
            assert [t for t in mutation.tests.split() if not there(t)] == [], mutation.name


@cache
def there(test: str) -> bool:
    """Whether there are the file and the functions that an argument of pytest names."""
    file, *functions = test.split("::")
    if test.startswith("-") or "/" not in test:
        return True
    if not (ROOT / file).exists():
        return False
    text = (ROOT / file).read_text() if functions else ""
    return all(f"def {function.split('[')[0]}(" in text for function in functions)


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
