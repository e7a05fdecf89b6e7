"""Mistakes in the order of a launch and in what its programs tell each other."""

from __future__ import annotations

from tests.mutation.mutations import group

PROTOCOL = "tests/aadp_kernels/test_triton_protocol.py"
MODEL = "tests/test_cache_model.py"

PROGRAMS = group(
    "aadp_kernels/_triton/privatize_kernel.py",
    f"{PROTOCOL} -k RandomOrders",
    ("factor not waited for", "while word == 0:", "while word == 1:"),
    ("the second to last program sums", "== end - begin - 1", "== end - begin - 2"),
    ("every program publishes what it summed", "if last:\n                factor = ", "if end > begin:\n                factor = "),
)  # fmt: skip

WORDS = group(
    "aadp_kernels/_triton/privatize_kernel.py",
    "tests/aadp_kernels/test_triton_privatize.py -k reference_and_out",
    ("the notice taken for the factor", "return (~word).to(tl.float64", "return word.to(tl.float64"),
)  # fmt: skip

PLANS = group(
    "aadp_kernels/_triton/plan.py",
    f"{PROTOCOL} {MODEL}",
    ("applied before the norm is known", "apply_at = np.maximum(read + window, unit_end)", "apply_at = read + window"),
    ("large layers applied from their beginning", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, index, index)"),
    ("small layers applied from their end", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, begins + ends - 1 - index, begins + ends - 1 - index)"),
    ("a window of the whole cache", "L2_cache_size // WINDOWS_IN_L2 or", "L2_cache_size or"),
    ("chunks as large as they were", "CHUNK = 1 << 12", "CHUNK = 1 << 14"),
)  # fmt: skip

MEMORY = group(
    "aadp_kernels/_triton/plan.py",
    "tests/aadp_kernels/test_triton_privatize.py -k remembers",
    ("the plan used last is forgotten", "cache.popitem(last=False)", "cache.popitem()"),
    ("plans are forgotten in the order in which they were made", "cache.move_to_end(name)\n", "pass\n"),
)  # fmt: skip

MUTATIONS = [*PROGRAMS, *WORDS, *PLANS, *MEMORY]
