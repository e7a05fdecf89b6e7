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
    "aadp_kernels/_triton/launch_plan.py",
    f"{PROTOCOL} {MODEL}",
    ("applied before the norm is known", "apply_at = np.maximum(read + window, unit_end)", "apply_at = read + window"),
    ("large layers applied from their beginning", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, index, index)"),
    ("small layers applied from their end", "np.where(large, begins + ends - 1 - index, index)", "np.where(large, begins + ends - 1 - index, begins + ends - 1 - index)"),
    ("a window of the whole cache", "L2_cache_size // WINDOWS_IN_L2 or", "L2_cache_size or"),
    ("chunks as large as they were", "CHUNK = 1 << 12", "CHUNK = 1 << 14"),
)  # fmt: skip

MEMORY = group(
    "aadp_kernels/_triton/launch_plan.py",
    "tests/aadp_kernels/test_triton_privatize.py -k remembers",
    ("the plan used last is forgotten", "list(cache)[:-PLANS]", "list(cache)[PLANS:]"),
    ("plans are forgotten in the order in which they were made", "cache.pop(name, None)", "cache.get(name)"),
)  # fmt: skip

CARDS = "tests/aadp_kernels/test_triton_float64.py"
AHEAD = "tests/aadp_kernels/test_warm_up.py"

DEVICES = [
    *group(
        "aadp_kernels/_triton/float64.py",
        CARDS,
        ("float64 of a graphics card as fast as in a data centre", "(8, 9): 2,", "(8, 9): 64,"),
        ("one transfer a clock of the memory", "getattr(properties, \"memory_clock_rate\", 0) * 2", "getattr(properties, \"memory_clock_rate\", 0)"),
        ("a warning about the form grid", "if form != \"wide\" or", "if form == \"fast\" or"),
    ),
    *group(
        "aadp_kernels/_triton/__init__.py",
        CARDS,
        ("PTX on an AMD device", "if form == \"fast\":", "if form == \"slow\":"),
    ),
    *group(
        "aadp_kernels/_dispatch.py",
        CARDS,
        ("Triton unasked on an AMD device", "device.type == \"cuda\" and torch.version.hip is not None:", "device.type == \"xpu\":"),
        ("no warning about slow noise", "if note is not None:", "if note is None:"),
    ),
    *group(
        "aadp_kernels/_triton/_device.py",
        CARDS,
        ("an option of NVIDIA's assembler on an AMD device", "constants.pop(\"maxnreg\", None)", "constants.get(\"maxnreg\")"),
    ),
    *group(
        "aadp_kernels/_triton/ahead.py",
        AHEAD,
        ("kernels without votes are compiled ahead", "one if case.votes else None", "None"),
        ("launches compile for ever", "module.launch = own", "pass"),
    ),
    *group(
        "aadp_kernels/_triton/cases.py",
        AHEAD,
        ("the kernel of clipping alone is not compiled ahead", "yield Case(\"privatize_kernel\", dtype, p=p, votes=votes, reference=reference)", "pass"),
    ),
    *group(
        "bench/measure.py",
        "tests/test_gpu_machine.py -k cases",
        ("a case that is not built ends the part", "results[title] = {\"failed\": reason_of(error)}", "raise"),
    ),
]  # fmt: skip

MUTATIONS = [*PROGRAMS, *WORDS, *PLANS, *MEMORY, *DEVICES]
