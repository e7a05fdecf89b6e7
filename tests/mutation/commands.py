"""Mistakes in the commands' names and in what is found by a name."""

from __future__ import annotations

from tests.mutation.mutations import group

_COMMANDS = "tests/fl_lightning/test_commands.py"

MUTATIONS = [
    *group(
        "fl_lightning/command/shipped.py",
        _COMMANDS,
        ("a shipped name before a file", "if path.exists() or path.suffix", "if path.suffix"),
        ("names in any option", 'if before == "--config":', "if True:"),
        ("an unknown name goes on", '    raise ValueError(\n        f"config={name}: there', '    return name\n    raise ValueError(\n        f"config={name}: there'),
    ),
    *group(
        "fl_lightning/output/console.py",
        _COMMANDS,
        ("advertisements are shown", 'return not ("Tip:" in text', 'return True or not ("Tip:" in text'),
        ("everything is kept back", 'return not ("Tip:" in text and', 'return not ("" in text and'),
    ),
    *group(
        "fl_lightning/compare.py",
        "tests/fl_lightning/test_compare.py",
        ("seeds tell runs apart", "if name not in SEEDS}", "}"),
        ("folders tell runs apart", "if name not in _PLACES}", "}"),
        ("an interval of the values, not of their mean", "statistics.stdev(values) / math.sqrt(len(values))", "statistics.stdev(values)"),
        ("epsilon rounded down", "math.ceil(max(values) * 1000 - 1e-9)", "math.floor(max(values) * 1000)"),
        ("words that are code", "html.escape(', '.join(str(run.folder) for run in group.runs))", "', '.join(str(run.folder) for run in group.runs)"),
    ),
]  # fmt: skip
