"""Mistakes in the compiled sums of records' gradients: products, embeddings, normalisation."""

from __future__ import annotations

from tests.mutation.mutations import group

_CPU_BACKWARD = "tests/aadp_kernels/test_cpu_clip_in_backward.py"

PRODUCTS = group(
    "aadp_kernels/_cpu/backward_products.py",
    _CPU_BACKWARD,
    ("first group for all", "part = record[i * whole : i * whole + used]\n                    add_scaled", "part = record[:used]\n                    add_scaled"),
    ("padding on one side", "(high + 2 * above) + y + above) * across + beside", "(high + 2 * above) + y + above) * across"),
    ("bias not in the norm", "norm1, total = absolute(own), square(own)", "norm1, total = 0.0, 0.0"),
    ("last record of a unit missing", "range(first, min(batch, first + each))", "range(first, min(batch, first + each - 1))"),
    ("only the last position in the bias", "bias[o] += g[start + o]", "bias[o] = g[start + o]"),
    ("clip factor not rounded down", "g.dtype.type(factor * shrink if factor < 1 else factor)", "g.dtype.type(factor * (1 + 1e-7))"),
)  # fmt: skip

JOINED_UNITS = group(
    "aadp_kernels/_cpu/product_sums.py",
    _CPU_BACKWARD,
    ("only the first unit", "range(k * per_client + 1, (k + 1) * per_client)", "range(0)"),
    ("columns of the first group", "k, i = part // (parts * plan.groups), part // parts % plan.groups", "k, i = part // (parts * plan.groups), 0"),
    ("only the first unit's bias", "add_scaled(rows[k], rows.dtype.type(1), sum_b[unit])", "add_scaled(rows[k], rows.dtype.type(0), sum_b[unit])"),
    ("weights of the first client for all", "rows[k * plan.out + i * inside + o, low + c]", "rows[i * inside + o, low + c]"),
    ("counts of the first unit", "counts[k, i] += seen[unit, i]", "counts[k, i] += seen[k * per_client, i]"),
    ("sums begin where they were", "sum_w[begin:end], sum_b[begin:end], counts[begin:end] = 0, 0, 0", "sum_b[begin:end], counts[begin:end] = 0, 0"),
)  # fmt: skip

EMBEDDING_ROWS = group(
    "aadp_kernels/_cpu/backward_embedding.py",
    f"{_CPU_BACKWARD}::test_rows_of_equal_tokens_add_up_before_the_norm "
    "tests/aadp_kernels/test_clip_in_backward_layers.py::test_sums_and_counts -k embedding",
    ("equal tokens apart in the norm", "total += square(both)", "total += whole"),
    ("equal tokens apart in the L1 norm", "norm1 += absolute(both) if l1 else 0.0", "norm1 += absolute(rows[order[start]]) if l1 else 0.0"),
    ("padding in the norm", "            if token != padding:\n", "            if True:\n"),
    ("padding in the sum", "                if index[record, t] != padding:\n", "                if True:\n"),
    ("factors left out of the sum", "factors[record], g[record, t, low:high]", "g.dtype.type(1), g[record, t, low:high]"),
    ("mask ignored", "if not mask[k, record % batch]:", "if False:"),
    ("clip norm of the first client", "clip[k], votes_at[k], SLACK", "clip[0], votes_at[k], SLACK"),
)  # fmt: skip

NORM_LAYERS = group(
    "aadp_kernels/_cpu/backward_norms.py",
    "tests/aadp_kernels/test_clip_in_backward_layers.py::test_sums_and_counts "
    "tests/aadp_kernels/test_clip_in_backward_layers.py::test_one_record_never_passes_the_clip_norm_in_float32 -k norm",
    ("input not in the weight's gradient", "own[j] += left * right", "own[j] += right"),
    ("norm of the first parameter only", "used = own[first * n : last * n]", "used = own[first * n : (first + 1) * n]"),
    ("clip norm of the first client", "clip[k], votes_at[k], SLACK", "clip[0], votes_at[k], SLACK"),
    ("mask ignored", "if not mask[k, b]:", "if not mask[k, b] and clip[k] < 0:"),
    ("inputs not centred", "(a[t * n + j] - shift) * factor", "a[t * n + j] * factor"),
)  # fmt: skip

NORM_UNITS = group(
    "aadp_kernels/_cpu/backward_norms.py",
    f"{_CPU_BACKWARD}::test_many_clients_have_the_sums_that_each_has_alone "
    f"{_CPU_BACKWARD}::test_an_input_that_is_not_finite_spoils_no_other_record",
    ("only the first unit's bias", "add_scaled(biases[k], sums.dtype.type(1), sums[unit, n:])", "add_scaled(biases[k], sums.dtype.type(0), sums[unit, n:])"),
    ("input's norm not in what is finite", "total_a += np.float64(left) * np.float64(left)", "total_a += 0.0"),
)  # fmt: skip

MUTATIONS = [*PRODUCTS, *JOINED_UNITS, *EMBEDDING_ROWS, *NORM_LAYERS, *NORM_UNITS]
