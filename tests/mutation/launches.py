"""Mistakes in the order of a launch and in what its programs tell each other."""

from __future__ import annotations

from tests.mutation.mutations import group

PROTOCOL = "tests/aadp_kernels/test_triton_protocol.py"
MODEL = "tests/test_cache_model.py"
ORDERS = f"{PROTOCOL}::TestEveryOrder {MODEL} tests/aadp_kernels/test_triton_privatize.py::TestPlan"

PROGRAMS = group(
    "aadp_kernels/_triton/privatize_kernel.py",
    f"{PROTOCOL}::TestRandomOrders",
    ("factor not waited for", "while word == 0:", "while word == 1:"),
    ("the second to last program sums", "== end - begin - 1", "== end - begin - 2"),
    ("every program sums", "if last:\n            total1", "if end > begin:\n            total1"),
    ("the ticket taken early is lost", "ticket = _taken(ahead, LANES)", "ticket = _taken(_take(counter, LANES), LANES)"),
)  # fmt: skip

PLANS = group(
    "aadp_kernels/_triton/plan.py",
    ORDERS,
    ("applied before the norm is known", "apply_at = np.maximum(read + window, unit_end)", "apply_at = read + window"),
    ("large layers applied from their beginning", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, index, index)"),
    ("small layers applied from their end", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, begins + ends - 1 - index, begins + ends - 1 - index)"),
    ("a window of the whole cache", "L2_cache_size // WINDOWS_IN_L2 or", "L2_cache_size or"),
    ("chunks as large as they were", "CHUNK = 1 << 12", "CHUNK = 1 << 14"),
    ("the plan used last is forgotten", "cache.popitem(last=False)", "cache.popitem()"),
)  # fmt: skip

MUTATIONS = [*PROGRAMS, *PLANS]
