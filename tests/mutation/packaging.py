"""Mistakes in what an installation needs, and in which side of a benchmark a table shows."""

from __future__ import annotations

from tests.mutation.mutations import group

PACKAGING = "tests/test_packaging.py"
ONE_SIDE = (
    "tests/test_bench_report.py::test_a_table_names_one_configuration_and_never_the_best_of_a_row"
)
ONE_PLACE = "tests/test_bench_report.py::test_a_generated_part_has_one_place"

REQUIREMENTS = group(
    "fl_lightning/requirements.py",
    PACKAGING,
    ("a package is forgotten", '    "pooch",\n', ""),
    ("missing packages pass", "if not installed(name)]", "if installed(name)]"),
    ("a missing fcntl passes", 'lacks = [] if find_spec("fcntl") else ["fcntl"]', "lacks: list[str] = []"),
    ("missing fork hooks pass", 'lacks += [] if hasattr(os, "register_at_fork")', 'lacks += [] if hasattr(os, "fork")'),
    ("the extra is not named", "'aadp-fl[federated]'", "'aadp-fl'"),
)  # fmt: skip

CHECKED = group(
    "fl_lightning/__init__.py",
    PACKAGING,
    ("the system is not checked", "check_system()\n", ""),
    ("the packages are not checked", "check_packages(ESSENTIAL)\n", ""),
    ("another version", '__version__ = "0.1.0"', '__version__ = "0.1.1"'),
)

TABLES = [
    *group(
        "bench/report.py",
        ONE_SIDE,
        ("any generator of a form", 'DEFAULT = "ours, wide, chacha20"', 'DEFAULT = "ours, wide"'),
        ("plain torch before compiled", '("triton", "numba", "torch")', '("torch", "numba", "triton")'),
        ("peers against another side", "mine, peer = side_of(case, DEFAULT), quickest_peer(case)", 'mine, peer = side_of(case, "ours, fast, chacha20"), quickest_peer(case)'),
    ),
    *group(
        "bench/pages.py",
        ONE_PLACE,
        ("two places pass", "if text.count(begin) != 1 or", "if text.count(begin) < 1 or"),
    ),
]  # fmt: skip

MUTATIONS = [*REQUIREMENTS, *CHECKED, *TABLES]
