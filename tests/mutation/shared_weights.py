"""Mistakes in weights that layers share or hold turned, and in layers of other libraries."""

from __future__ import annotations

from tests.mutation.mutations import group

SHARED_WEIGHTS = group(
    "aadp_kernels/clip_in_backward/shared_weights.py",
    "tests/fl_lightning/test_shared_and_split_layers.py",
    ("uses clipped as if they stood alone", "square = square + 2 * _products(one, other)", "square = square + 0.0 * _products(one, other)"),
    ("their product once", "square = square + 2 * _products(one, other)", "square = square + _products(one, other)"),
    ("rounding of what cancels not covered", "square = square + eps *", "square = square + 0.0 *"),
    ("one use alone in the sum", "total[name] = total[name] + value if name in total else value", "total[name] = value"),
    ("tokens of other rows count in a block", "self.columns * inside[..., None])", "self.columns)"),
    ("L1 norms of one use", "block = torch.stack([use.block(low, min(size, low + rows)) for use in uses]).sum(0)", "block = uses[0].block(low, min(size, low + rows))"),
    ("biases of a shared weight's layers dropped", "if each.bias_name is not None]", "if each.bias_name is None]"),
    ("uses whose other part is not finite", "finite = torch.stack([f for _, _, f in found]).all(0)", "finite = torch.stack([f for _, _, f in found]).any(0)"),
)  # fmt: skip

TRANSPOSED = group(
    "aadp_kernels/clip_in_backward/transposed.py",
    "tests/aadp_kernels/test_transposed.py tests/fl_lightning/test_shared_and_split_layers.py",
    ("not turned back", "return flat.view(-1, out, features).transpose(1, 2)", "return flat.view(-1, features, out)"),
    ("one client's not turned back", "None if found[1] is None else found[1].t()", "found[1]"),
    ("clients' not turned back", "None if found[1] is None else found[1].transpose(1, 2)", "None if found[1] is None else found[1].reshape(-1, *weight.shape[1:])"),
)  # fmt: skip

FOREIGN = group(
    "aadp_kernels/clip_in_backward/foreign.py",
    "tests/aadp_kernels/test_foreign.py",
    ("another norm for an RMS norm", "return have.shape == want.shape and torch.allclose(have.float(), want, error, error)", "return True"),
    ("a bias is left out", "if len([*module.parameters()]) > 1 or [*module.children()]:", "if False:"),
)  # fmt: skip

MUTATIONS = [*SHARED_WEIGHTS, *TRANSPOSED, *FOREIGN]
