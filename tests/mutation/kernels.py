"""Mistakes in aadp_kernels."""

from __future__ import annotations

from tests.mutation.mutations import group

RNG = "tests/aadp_kernels/test_rng.py"
NOISE = "tests/aadp_kernels/test_noise.py"
FAST = "tests/aadp_kernels/test_fast.py"
_GRID = "tests/aadp_kernels/test_grid.py::test_"
_SUMS = "tests/aadp_kernels/test_grid_sums.py::test_"
GRID = " ".join(
    (
        _GRID + "equals_scalar_code_at_the_address",
        _GRID + "tables_are_the_rounded_distribution_functions",
        _GRID + "probabilities_are_those_of_the_floor_of_a_laplace_variable",
        _GRID + "numbers_are_the_integers_times_the_quantum",
        _GRID + "the_quantum_is_never_too_small",
        _SUMS + "the_integers_have_at_most_the_norm_of_the_clip",
        _SUMS + "small_contributions_survive_and_are_cut_towards_zero",
        _SUMS + "huge_ratios_and_long_sums_stay_in_range",
        _GRID + "distribution_accepts_the_scale_and_rejects_others",
        _SUMS + "inexactness_of_the_gaussian_covers_its_acceptance_test",
        _SUMS + "privatize_equals_the_formula_and_clients_one_by_one",
        _SUMS + "inexactness_grows_with_the_elements",
        _SUMS + "inexactness_in_numbers",
        _SUMS + "sums_are_clamped_before_the_noise_and_after",
    )
)
PRIVATIZE = "tests/aadp_kernels/test_privatize.py"
CLIP_SUM = "tests/aadp_kernels/test_clip_sum.py"
SENSITIVITY = "tests/aadp_kernels/test_sensitivity.py"
CPU = "tests/aadp_kernels/test_cpu.py"
CPU_NOISE = "tests/aadp_kernels/test_cpu_noise.py"
BACKWARD = "tests/aadp_kernels/test_clip_in_backward.py"

WORDS = group(
    "aadp_kernels/_torch/rng.py",
    RNG,
    ("rotation by 15", "_rotate_add(d, 16, scratch)", "_rotate_add(d, 15, scratch)"),
    ("one double round less", "for _ in range(rounds // 2):", "for _ in range(rounds // 2 - 1):"),
    ("key not added at the end", "torch.add(columns[1], head[4:8], out=words[4:8])", "words[4:8] = columns[1]"),
    ("first round key in every round", "odd.bitwise_xor_(keys[r])", "odd.bitwise_xor_(keys[0])"),
    ("outputs do not cross over", "even = even.flip(0).bitwise_xor_(odd)", "even = even.bitwise_xor_(odd)"),
)  # fmt: skip

STANDARD_NOISE = group(
    "aadp_kernels/_torch/noise.py",
    f"{NOISE} {FAST}",
    ("step dropped from the address", "isinstance(step, Tensor) else signed32(step)", "isinstance(step, Tensor) else 0"),
    ("client dropped from the address", "counters[2] = clients.to(torch.int32)[:, None]", "counters[2] = 0"),
    ("layer dropped from the address", "word = signed32(layer + (domain << LAYER_BITS))", "word = signed32(domain << LAYER_BITS)"),
    ("mechanisms share their words", "word = signed32(layer + (domain << LAYER_BITS))", "word = signed32(layer)"),
    ("block dropped from the address", "counters[0] = block\n", "counters[0] = 0\n"),
    ("offset ignored", "skip = offset % per_tile", "skip = 0"),
    ("Gaussian radius 3/2", "radius = _sqrt_(_uniform_log(quads[:, 0], quads[:, 1], 32).mul_(-2))", "radius = _sqrt_(_uniform_log(quads[:, 0], quads[:, 1], 32).mul_(-4.5))"),
    ("only positive cosines", "cosine.mul_(low.bitwise_and(2).neg_().add_(1))", "cosine.mul_(1)"),
    ("pairs are equal", "torch.where(swap, cosine, sine, out=out[:, 1])", "torch.where(swap, sine, cosine, out=out[:, 1])"),
    ("Laplace always positive", "return magnitude.mul_(low.bitwise_and(1).mul_(2).sub_(1))", "return magnitude.mul_(-1)"),
    ("Laplace scale 2/3", "return magnitude.mul_(low.bitwise_and(1).mul_(2).sub_(1))", "return magnitude.mul_(low.bitwise_and(1).mul_(2).sub_(1)).mul_(2 / 3)"),
    ("fast Laplace scale 2/3", "return log_(u.mul_(2.0**-31)).mul_(word", "return log_(u.mul_(2.0**-31)).mul_(2 / 3).mul_(word"),
    ("fast Gaussian scale 3/2", "radius = _sqrt_(log_(u.mul_(2.0**-32)).mul_(-2))", "radius = _sqrt_(log_(u.mul_(2.0**-32)).mul_(-4.5))"),
    ("tail words not used", "u[small] = n[small].to(torch.float64).add_(tail, alpha=2.0**-32)", "pass"),
    ("coins for the wrong side", "return (bits.bitwise_and(whole - 1) < limit) | always", "return (bits.bitwise_and(whole - 1) >= limit) | always"),
)  # fmt: skip

UPDATES = group(
    "aadp_kernels/_torch/privatize.py",
    f"{PRIVATIZE} {CLIP_SUM}",
    ("norm of the first tensor only (L1)", "return sum((_row_sums(part.abs()) for part in parts[1:]), _row_sums(parts[0].abs()))", "return _row_sums(parts[0].abs())"),
    ("norm of the first tensor only (L2)", "return sum(squares[1:], squares[0]).sqrt()", "return squares[0].sqrt()"),
    ("signed sum for the L1 norm", "return sum((_row_sums(part.abs()) for part in parts[1:]), _row_sums(parts[0].abs()))", "return sum((_row_sums(part) for part in parts[1:]), _row_sums(parts[0]))"),
    ("noise scale 2/3", "torch.where(scale > 0, value + noise * scale, value)", "torch.where(scale > 0, value + noise * scale * 2 / 3, value)"),
    ("noise scale 3/2", "torch.where(scale > 0, value + noise * scale, value)", "torch.where(scale > 0, value + noise * scale * 1.5, value)"),
    ("noise twice", "torch.where(scale > 0, value + noise * scale, value)", "torch.where(scale > 0, value + 2 * noise * scale, value)"),
    ("reference added", "value = value - reference[i]", "value = value + reference[i]"),
    ("clip norm of the first layer", "size, rows = scale[:, layer], (norm, clip[:, layer], finite", "size, rows = scale[:, layer], (norm, clip[:, 0], finite"),
    ("noise scale of the first layer", "size, rows = scale[:, layer], (norm", "size, rows = scale[:, 0], (norm"),
    ("tensors of a layer share their noise", "piece = piece[:, start : start + part.shape[1]]", "piece = piece[:, : part.shape[1]]"),
    ("what is not finite stays", "finite = torch.isfinite(norm) & torch.isfinite(norm1)", "finite = torch.ones_like(norm, dtype=torch.bool)"),
    ("votes of the first layer's threshold", "None if votes_at is None else votes_at[:, layer]", "None if votes_at is None else votes_at[:, 0]"),
)  # fmt: skip

CERTIFIED = group(
    "aadp_kernels/certified.py",
    f"{PRIVATIZE} {CLIP_SUM}",
    ("clip dropped", "clipped = (bound > clip) & finite", "clipped = (bound > clip) & finite & (bound < 0)"),
    ("clip doubled", "room = (clip - count", "room = (2 * clip - count"),
    ("clip 2/3", "room = (clip - count", "room = (2 / 3 * clip - count"),
    ("norm not inflated by its rounding", "bound = norm * (1 + (count + 16) * 2.0**-52)", "bound = norm"),
    ("rounding of the output not covered", "bound * (1 + info.eps), 1.0)", "bound, 1.0)"),
    ("a vote at the threshold is against", "torch.where(norm1 <= votes_at, 0.5, -0.5)", "torch.where(norm1 < votes_at, 0.5, -0.5)"),
    ("votes turned round", "torch.where(norm1 <= votes_at, 0.5, -0.5)", "torch.where(norm1 <= votes_at, -0.5, 0.5)"),
    ("votes of 1 and 0", "torch.where(norm1 <= votes_at, 0.5, -0.5)", "torch.where(norm1 <= votes_at, 1.0, 0.0)"),
    ("who is not finite votes", "return torch.where(counts & ~torch.isnan(votes_at), vote, 0.0)", "return torch.where(~torch.isnan(votes_at), vote, 0.0)"),
    ("noise missing in the last layer", "return layout.filled if all(each) else", "return layout.filled[:-1] if all(each) else"),
)  # fmt: skip

SUMS = group(
    "aadp_kernels/_torch/clip_sum.py",
    f"{CLIP_SUM} {_SUMS}clip_sum_adds_the_integers_of_the_records",
    ("mask ignored", "live = finite & mask[piece]", "live = finite"),
    ("records summed unclipped", "total.add_(torch.mv(kept.t(), factor))", "total.add_(kept.sum(0))"),
    ("integers not summed", ".add_(counts.sum(0))", ".add_(counts[0])"),
    ("counts of clipped records include padding", "norm, clip[layer], live, layout.dims", "norm, clip[layer], finite, layout.dims"),
    ("noise of a tensor from the layer's beginning", "piece = piece[0, start : start + layout.sizes[i]]", "piece = piece[0, : layout.sizes[i]]"),
    ("noise missing", "add_noise(value, piece, scale[layer]).to", "value.to"),
    ("weights ignored", "                factor = factor * weights[piece]\n", "                pass\n"),
    ("weights of the first records", "weights[piece]", "weights[: len(factor)]"),
)  # fmt: skip

SUM_INTERFACE = group(
    "aadp_kernels/clip_sum.py",
    f"{CLIP_SUM} {_SUMS}clip_sum_adds_the_integers_of_the_records",
    ("sums so far forgotten", "return list(accumulate)", "return [torch.zeros_like(t) for t in accumulate]"),
    ("padding counted", "return mask.to(device) != 0", "return mask.to(device) == mask.to(device)"),
    ("weights above one", "(weights >= 0) & (weights <= 1)", "weights >= 0"),
    ("weights in the grid form", "    if form == \"grid\":\n        raise ValueError(\"weights", "    if False:\n        raise ValueError(\"weights"),
)  # fmt: skip

GRID_NOISE = group(
    "aadp_kernels/_torch/grid.py",
    GRID,
    ("rounded to the nearest", ".nan_to_num(0.0).trunc()", ".nan_to_num(0.0).round()"),
    ("magnitude for the negative", "return torch.where(negative, -1 - magnitude, magnitude)", "return torch.where(negative, -magnitude, magnitude)"),
    ("always positive", "return torch.where(negative, -1 - magnitude, magnitude)", "return magnitude"),
    ("a digit is off by one", "digit = torch.searchsorted(table, number, right=True)", "digit = torch.searchsorted(table, number, right=True) + 1"),
    ("digits in the wrong order", "remainder.bitwise_left_shift_(DIGIT_BITS).add_(digit)", "remainder.add_(digit << (DIGIT_BITS * j))"),
    ("sign bit counted as an octave", "_leading_zeros(first.bitwise_left_shift(1)).clamp_(max=63)", "_leading_zeros(first).clamp_(max=63)"),
    ("acceptance without ln 2", ".mul_(2.0**-OCTAVE_BITS).sub_(_LN2)", ".mul_(2.0**-OCTAVE_BITS)"),
    ("acceptance of another width", "x.mul_(x).mul_(0.5)", "x.mul_(x).mul_(0.75)"),
    ("zero drawn twice", "good = _accepts(own, magnitude) & ~(negative & (magnitude == 0))", "good = _accepts(own, magnitude)", "the mass of zero is 2^-31: no sample of a test can show it"),
    ("rejected draws kept", "waiting = waiting[~good]", "waiting = waiting[:0]"),
    ("every attempt the same words", "again[3] += attempt << LAYER_BITS", "pass"),
)  # fmt: skip

GRID_NUMBERS = group(
    "aadp_kernels/grid.py",
    GRID,
    ("quantum 2/3", "step = (scale * factor).clamp", "step = (scale * factor * 2 / 3).clamp"),
    ("ln 2 missing", '(LN2_UP if mechanism == "laplace" else 1.0)', "1.0"),
    ("no offset", "(noised.to(torch.float64) + OFFSETS[mechanism]) * step)", "noised.to(torch.float64) * step)"),
    ("sum not clamped after the noise", "(total.clamp(-LIMIT, LIMIT) + noise).clamp(-LIMIT, LIMIT)", "total.clamp(-LIMIT, LIMIT) + noise"),
    ("sum not clamped before the noise", "(total.clamp(-LIMIT, LIMIT) + noise).clamp(-LIMIT, LIMIT)", "(total + noise).clamp(-LIMIT, LIMIT)"),
)  # fmt: skip

GRID_COST = group(
    "aadp_kernels/grid_law.py",
    f"{GRID} tests/fl_lightning/test_noise_forms_cost.py::test_inexactness_of_the_kernels_is_what_is_charged",
    ("half the inflation (Laplace)", "return 2 * elements * _table_error(), 0.0", "return elements * _table_error(), 0.0"),
    ("half the inflation (Gaussian)", "return 2 * elements * eta,", "return elements * eta,"),
    ("tail of one element", "elements * math.erfc(cutoff / math.sqrt(2))", "math.erfc(cutoff / math.sqrt(2))"),
    ("acceptance not counted", "eta = _table_error() + _ACCEPTANCE_ERROR + discrete", "eta = _table_error() + discrete"),
)  # fmt: skip

SCALES = group(
    "aadp_kernels/scales.py",
    SENSITIVITY,
    ("replace_one not doubled", '(2.0 if adjacency == "replace_one" else 1.0)', "1.0"),
    ("zero_out doubled", '(2.0 if adjacency == "replace_one" else 1.0)', "2.0"),
    ("root of the share dropped", 'part = part.sqrt() if mechanism == "gaussian" else part', "part = part"),
    ("root of the share for Laplace", 'part = part.sqrt() if mechanism == "gaussian" else part', "part = part.sqrt()"),
    ("noise 2/3", "multiplier * sensitivities.where(noisy, 0.0) / part", "2 / 3 * multiplier * sensitivities.where(noisy, 0.0) / part"),
    ("shares above one allowed", "part = shares / total.clamp(min=1.0)", "part = shares"),
)  # fmt: skip

VOTES = group(
    "aadp_kernels/votes.py",
    SENSITIVITY,
    ("sums not paid for the votes (Gaussian)", "sums = total / math.sqrt(1 - vote_share)", "sums = total"),
    ("sums not paid for the votes (Laplace)", "return total / (1 - vote_share), total", "return total, total"),
    ("votes of one layer (Gaussian)", "total * vote * math.sqrt(num_layers / vote_share)", "total * vote * math.sqrt(1 / vote_share)"),
    ("votes of one layer (Laplace)", "total * vote * num_layers / vote_share", "total * vote / vote_share"),
    ("votes of width 1/4", 'vote = 1.0 if adjacency == "replace_one" else 0.5', 'vote = 1.0 if adjacency == "replace_one" else 0.25'),
)  # fmt: skip

_BOTH_PASSES = (
    f"{CPU}::test_privatize_clips_to_the_last_bits_of_the_specification "
    f"{CPU}::test_privatize_below_the_clip_norm_has_the_bits_of_the_specification "
    f"{CPU}::test_what_is_not_finite_is_zeroed {CPU}::test_fast_privatize_is_close_to_the_specification "
    f"{CPU}::test_the_bound_holds {CPU}::test_the_bound_holds_beneath_fast_noise "
    f"{CPU}::test_rows_and_threads_change_nothing "
    "tests/aadp_kernels/test_cpu_clip.py::test_fast_factors_cover_the_rounding_of_a_difference"
)
PASSES = group(
    "aadp_kernels/_cpu/sum_and_write.py",
    _BOTH_PASSES,
    ("noise 2/3", "            out[i] = x[i] * factor + noise[i] * scale\n", "            out[i] = x[i] * factor + noise[i] * scale * 2 / 3\n"),
    ("noise subtracted", "            out[i] = x[i] * factor + noise[i] * scale\n", "            out[i] = x[i] * factor - noise[i] * scale\n"),
    ("clip dropped", "            out[i] = x[i] * factor + noise[i] * scale\n", "            out[i] = x[i] + noise[i] * scale\n"),
    ("noise 2/3 in place", "out[i] = out[i] * factor + noise[i] * scale", "out[i] = out[i] * factor + noise[i] * scale * 2 / 3"),
    ("noise 3/2 in place", "out[i] = out[i] * factor + noise[i] * scale", "out[i] = out[i] * factor + noise[i] * scale * 3 / 2"),
    ("clip dropped in place", "out[i] = out[i] * factor + noise[i] * scale", "out[i] = out[i] + noise[i] * scale"),
    ("clip dropped in place without noise", "            out[i] *= factor", "            out[i] *= 1"),
    ("dead rows stay", "    elif dead:\n", "    elif dead and scale < 0:\n"),
    ("client dropped from the address", "state[2] = np.uint32(plan.clients[row])", "state[2] = np.uint32(0)"),
    ("layer dropped from the address", "state[3] = np.uint32(layer_words[layer])", "state[3] = np.uint32(layer_words[0])"),
    ("noise of a tensor from the tile's beginning", "noise + (first + start - low) * value.itemsize", "noise"),
    ("a quarter of the norm missing", "lanes[j] += (abs(a) + abs(b)) + (abs(c) + abs(d))", "lanes[j] += (abs(a) + abs(b)) + abs(c)"),
    ("layer boundary off by one", "while column >= units[layer + 1]:\n            layer += 1\n        low", "while column > units[layer + 1]:\n            layer += 1\n        low"),
    ("fast factor not rounded down", "lowered = np.float32(weight * LOWER if weight < 1 else weight)", "lowered = np.float32(weight)"),
)  # fmt: skip

ELEMENTS = group(
    "aadp_kernels/_cpu/elements.py",
    _BOTH_PASSES,
    ("reference added", "x[i] -= minus[i]", "x[i] += minus[i]"),
)

_CPU_GRID = "tests/aadp_kernels/test_cpu_grid.py::test_"
GRID_PASS = group(
    "aadp_kernels/_cpu/grid.py",
    f"{_CPU_GRID}integers_equal_the_specification {_CPU_GRID}rows_without_noise_dead_rows_and_references",
    ("sign bit counted as an octave", "min(63, leading_zeros(numbers[e] << _U64(1)))", "min(63, leading_zeros(numbers[e]))"),
    ("a threshold forgotten", " + np.int64(table[first + 1] <= number)", ""),
    ("client dropped from the address", "np.uint32(source.clients[row])", "np.uint32(0)"),
    ("rejected draws kept", "if own.good[e] and not own.done[e]", "if not own.done[e]"),
)  # fmt: skip

GRID_RELEASES = group(
    "aadp_kernels/_cpu/grid_release.py",
    f"{_CPU_GRID}integers_equal_the_specification {_CPU_GRID}rows_without_noise_dead_rows_and_references",
    ("quantum 2/3", "(np.float64(noised) + offset) * quantum", "(np.float64(noised) + offset) * quantum * 2 / 3"),
    ("noise missing", "cut + values[at + i]", "cut"),
    ("clip dropped", "decisions.numbers[FACTOR, row, layer] / quantum", "1.0 / quantum"),
)  # fmt: skip

TRANSFORMS = group(
    "aadp_kernels/_cpu/transform.py",
    f"{CPU_NOISE}::test_noise_has_the_bits_of_the_specification "
    f"{CPU_NOISE}::test_fast_noise_is_close_to_the_specification "
    f"{CPU_NOISE}::test_fast_noise_is_refined_where_the_word_is_small",
    ("wide Laplace sign", "sign = np.float64(np.int32((low & np.int32(1)) * np.int32(2) - np.int32(1)))", "sign = -1.0"),
    ("wide Gaussian radius", "math.sqrt(log(u * 2.0**-32) * -2.0)", "math.sqrt(log(u * 2.0**-32) * -4.5)"),
    ("fast Laplace scale", "rows[i] = _laplace32(words[i])", "rows[i] = _laplace32(words[i]) * _F32(1.5)"),
    ("elements out of order", "noise[w + 4 * t + c] = rows[w + n * c + t]", "noise[w + 4 * t + c] = rows[w + 4 * t + c]"),
    ("fast Gaussian pairs equal", "    return a, b\n", "    return a, a\n"),
    ("tail words of the same domain", "state[3] += _U32(2 << LAYER_BITS)", "state[3] += _U32(0 << LAYER_BITS)"),
)  # fmt: skip

_CPU_CLIP = "tests/aadp_kernels/test_cpu_clip.py::test_"
DECISIONS = group(
    "aadp_kernels/_cpu/clip.py",
    f"{_CPU_CLIP}decisions_are_those_of_the_specification "
    f"{_CPU_CLIP}every_row_has_the_precision_of_its_own_dtype "
    f"{_CPU_CLIP}rows_beside_each_other_and_one_after_another_give_the_same",
    ("clip doubled", "factor = max(clip - count", "factor = max(2 * clip - count"),
    ("norm not inflated", "bound = norm * (1 + (count + 16) * 2.0**-52)", "bound = norm"),
    ("rounding of the output not covered", "/ (bound * (1 + eps))", "/ bound"),
    ("underflow not covered", "clip - count * smallest * eps", "clip"),
    ("subnormal factors", "factor >= _TINY else", "factor >= 0 else"),
    ("what is not finite stays", "factor if finite and factor >= _TINY", "factor if factor >= _TINY"),
    ("a vote at the threshold is against", "0.5 if norm1 <= votes_at else -0.5", "0.5 if norm1 < votes_at else -0.5"),
    ("only the first unit of a layer", "for unit in range(units[layer], units[layer + 1]):", "for unit in range(units[layer], units[layer] + 1):"),
    ("L2 votes with the L2 norm", "0.5 if norm1 <= votes_at else", "0.5 if norm <= votes_at else"),
    ("norms of the first layer's units", "low, high = start + units[layer], start + units[layer + 1]", "low, high = start, start + units[1]"),
    ("precision of the first row", "of = row if len(decisions.eps) > 1 else 0", "of = 0"),
)  # fmt: skip

CLIP_IN_BACKWARD = group(
    "aadp_kernels/clip_in_backward/clip.py",
    BACKWARD,
    ("clip dropped", "bound[:, None] / torch.where(over, norm, 1.0), 1.0)", "1.0, 1.0)"),
    ("clip doubled", "bound[:, None] / torch.where(over, norm, 1.0), 1.0)", "2 * bound[:, None] / torch.where(over, norm, 1.0), 1.0)"),
    ("mask ignored", "live = finite & rule.mask\n", "live = finite\n"),
    ("norm not inflated", "norm = norm * (1 + slack)\n", "norm = norm * 1\n"),
    ("clip norm of the first client", "over = ~(norm <= rule.clip[:, None])", "over = ~(norm <= rule.clip[0])"),
    ("votes turned round", "votes = torch.where(norm1 <= level, 0.5, -0.5)", "votes = torch.where(norm1 <= level, -0.5, 0.5)"),
    ("a negative clip norm does not silence", "torch.where(rule.clip >= 0, rule.clip * (1 - 1e-12), 0.0)", "rule.clip.abs() * (1 - 1e-12)"),
)  # fmt: skip

CLIP_MATRICES = group(
    "aadp_kernels/clip_in_backward/matrix_rules.py",
    BACKWARD,
    ("norm of a product without its root", "else (a2 * w + b) * g2", "else (a2.sqrt() * w + b) * g2"),
    ("bias not in the norm of a product", "else (a2 * w + b) * g2", "else (a2 * w) * g2"),
)  # fmt: skip

GRAM = group(
    "aadp_kernels/clip_in_backward/products.py",
    "tests/aadp_kernels/test_products.py",
    ("what cancels is taken for small", "square + bound * lengths.sqrt().sum(1).square()", "square"),
    ("bias not in the norm", "            of_a += 1\n", "            pass\n"),
    ("Gram matrices in float32", "wide = x.to(torch.float64)", "wide = x"),
    ("factors left out of the sum", "scaled = g * factor", "scaled = g + 0 * factor"),
    ("Gram matrices for L1 norms", "fits = a.is_cpu and rule.needed.weight and not needs_l1(rule)", "fits = a.is_cpu and rule.needed.weight"),
)  # fmt: skip

KEPT = group(
    "aadp_kernels/clip_in_backward/two_steps.py",
    "tests/fl_lightning/test_clipped_networks.py tests/aadp_kernels/test_two_steps.py",
    ("strange records in the sums", "    (g,) = zeroed(ok, g)\n", ""),
    ("bias not in the norm of a vector", "else (a2 * w + b) * g2", "else (a2 * w) * g2"),
    ("factors left out of embeddings", "rows = rows * per_record(f, rows)", "rows = rows * 1"),
    ("factors left out of narrow inputs", "(a * factor).flatten(0, -2)", "a.flatten(0, -2)"),
    ("factors left out of biases", "slopes.t() @ each", "slopes.sum(0)"),
    ("factors left out of what is held", "return f[0] @ a[0] if weight", "return a[0].sum(0) if weight"),
    ("bias not in the norm of what is held", "(bias, rule.needed.bias)", "(bias, False)"),
    ("strange Gram matrices pass", "bounded(*both, dtype=g.dtype)[None]", "torch.ones_like(square, dtype=torch.bool)[None]"),
    ("factors left out of wide inputs", "slopes = (g * factor).flatten(0, -2)", "slopes = g.flatten(0, -2)"),
)  # fmt: skip

_CPU_BACKWARD = "tests/aadp_kernels/test_cpu_clip_in_backward.py"
_PRODUCTS = (
    f"{_CPU_BACKWARD}::test_sequences_of_any_shape {_CPU_BACKWARD}::test_convolutions_of_any_shape"
)

TILES = group(
    "aadp_kernels/_cpu/gather_gemm.py",
    _PRODUCTS,
    ("every column is the first", "load_long(columns, long(j))", "load_long(columns, long(0))"),
    ("the second vector is the first", "_address(builder, builder.add(row, long(VECTOR * v)), vector), align=bytes_each", "_address(builder, row, vector), align=bytes_each"),
    ("positions are not added up", "[left, right[v], total]", "[left, right[v], ir.Constant(vector, None)]"),
)  # fmt: skip

ROWS = group(
    "aadp_kernels/_cpu/row_sums.py",
    f"{_PRODUCTS} {_CPU_BACKWARD}::test_a_record_alone_never_passes_the_clip_norm_in_float32",
    ("L2 norm 2/3", "        total += value * value\n", "        total += value * value * 4 / 9\n"),
    ("squares in float32", "value = np.float64(x[i])", "value = x[i]"),
    ("signed sum for the L1 norm", "total += abs(np.float64(x[i]))", "total += np.float64(x[i])"),
    ("only the last record", "total[i] += factor * x[i]", "total[i] = factor * x[i]"),
)  # fmt: skip

LINEAR_ROWS = group(
    "aadp_kernels/_cpu/backward_linear.py",
    f"{BACKWARD}::test_clipped_sums_and_counts {BACKWARD}::test_one_record_never_passes_the_clip_norm_in_float32 "
    f"{BACKWARD}::test_the_factor_covers_the_error_of_the_norm_and_a_negative_clip_silences",
    ("bias not in the norm", "np.sqrt((norms[b, 0] * weight + bias) * norms[b, 1])", "np.sqrt(norms[b, 0] * weight * norms[b, 1])"),
    ("bias not in the L1 norm", "norm1 = (norms[b, 2] * weight + bias) * norms[b, 3]", "norm1 = norms[b, 2] * weight * norms[b, 3]"),
    ("clip dropped", "return clip * (1 - 1e-12) / inflated if clip >= 0 else 0.0", "return 1.0"),
    ("clip doubled", "return clip * (1 - 1e-12) / inflated", "return 2 * clip * (1 - 1e-12) / inflated"),
    ("records of the first client", "a + k * each * features, g + k * each * out", "a, g"),
    ("clip norm of the first client", "clip[k], votes_at[k], largest", "clip[0], votes_at[k], largest"),
    ("mask of the first client", "mask + k * batch, dtype", "mask, dtype"),
    ("rounding of the scaled gradient not covered", "factor *= shrink", "factor *= 1.0"),
    ("padding counts", "    if not live:\n", "    if not live and clip < 0:\n"),
)  # fmt: skip

GRAM_KERNEL = group(
    "aadp_kernels/_cpu/gram.py",
    "tests/aadp_kernels/test_products.py",
    ("half of the products only", "total += own + 2 * rest", "total += own + rest"),
    ("what cancels is taken for small", "return max(total, 0.0) + bound * lengths * lengths", "return max(total, 0.0)"),
    ("bias not in the norm", "rest += (of_a[s, t] + bias) * of_g[s, t]", "rest += of_a[s, t] * of_g[s, t]"),
    ("only the last columns", "out[s + i, t + j] += found[i][j]", "out[s + i, t + j] = found[i][j]"),
    ("products of the first columns again", "out[t, k] = np.float64(x[t, low + k])", "out[t, k] = np.float64(x[t, k])"),
)  # fmt: skip

REUSE = group(
    "aadp_kernels/_reuse.py",
    "tests/aadp_kernels/test_reuse.py",
    ("the newest step again is new", "if step <= self._newest.get(domain, -1):", "if step < self._newest.get(domain, -1):"),
    ("what waits is forgotten", "                self._enter()\n                self._refuse", "                self._refuse"),
    ("an earlier step passes", "if step < last or (step == last and", "if (step == last and"),
    ("an overlap passes", "step == last and _overlap(spans, start, stop)", "step == last and False"),
    ("ids twice pass", "len(clients) > 1 and len(set(clients)) < len(clients)", "len(clients) < 0"),
    ("pieces of a step replace each other", "drawn[client] = (step, _joined(self.last[client][1], start, stop))", "pass"),
    ("what waits is entered for the first layer", "self._streams[domain, layer].record(", "self._streams[domain, 0].record("),
)  # fmt: skip

MUTATIONS = [
    *WORDS, *REUSE, *STANDARD_NOISE, *UPDATES, *CERTIFIED, *SUMS, *SUM_INTERFACE, *GRID_NOISE,
    *GRID_NUMBERS, *GRID_COST, *SCALES, *VOTES, *CLIP_IN_BACKWARD, *CLIP_MATRICES, *GRAM, *KEPT, *TILES,
    *ROWS, *LINEAR_ROWS, *GRAM_KERNEL, *ELEMENTS, *PASSES, *DECISIONS, *GRID_PASS,
    *GRID_RELEASES, *TRANSFORMS,
]  # fmt: skip
