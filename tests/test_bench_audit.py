"""The table of audits: what it shows of its results, in the order of the cases."""

from bench.audit import CASES, audit_table, ordered


def result(shown, passed=True):
    bounds = [("independent canaries", shown), ("one run, curve", 2.0), ("one run, (ε, δ)", 1.0)]
    return {
        "epsilon_proven": 8.0,
        "epsilon_shown": shown,
        "tightness": shown / 8,
        "passed": passed,
        "bounds": [{"name": n, "shown": s, "canaries": 500} for n, s in bounds],
        "seconds": 12.3,
        "confidence": 0.99,
        "delta": 1e-5,
        "machine": {"torch": "2"},
        "load": 1.4,
    }


def test_rows_are_in_order_and_more_than_proven_is_named():
    first, second, *_ = CASES
    results = {f"{second}, ε = 8": result(9.0, False), f"{first}, ε = 8": result(6.0)}
    rows = audit_table(ordered(results)).splitlines()
    assert rows[2] == f"| {first}, ε = 8 | 8.00 | 6.00 | 75 % | 2.00 | 1.00 | - | 500 | 12 s |"
    assert "9.00 (more than proven)" in rows[3]
    assert "99 % confidence, δ = 1e-05" in rows[-1]
