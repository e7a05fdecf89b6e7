"""Mistakes in noise that is drawn again, and in what a whole run is charged."""

from __future__ import annotations

from tests.mutation.mutations import group

_NOISE = "tests/aadp_kernels/test_correlation.py"
_TRITON = "tests/aadp_kernels/test_triton_correlation.py"
_RUNS = "tests/aadp_kernels/test_factorization.py"
_OPACUS = "tests/aadp_kernels/test_integrations_opacus_cyclic.py"
_LOOP = "tests/aadp_kernels/test_integrations_cyclic.py"

MUTATIONS = [
    *group(
        "aadp_kernels/correlation.py",
        _NOISE,
        ("a band is missing", "later = correlation.coefficients[1:]", "later = correlation.coefficients[1:-1]"),
        ("bands are off by one", "later = correlation.coefficients[1:]", "later = correlation.coefficients[:-1]"),
        ("the sign is wrong", "return DrawnAgain(coefficient, key.words, step - back)", "return DrawnAgain(-coefficient, key.words, step - back)"),
        ("a step is off by one", "return DrawnAgain(coefficient, key.words, step - back)", "return DrawnAgain(coefficient, key.words, max(step - back - 1, 0))"),
        ("steps before the first", "isinstance(step, Tensor) or step >= back", "isinstance(step, Tensor) or step > back"),
        ("Laplace noise", "if mechanism != \"gaussian\":", "if False:"),
        ("the grid form", "if form == \"grid\":", "if False:"),
        ("keys of another generator", "if other.rng != key.rng:", "if False:"),
        ("the release itself", "and at == step:", "and at == -1:"),
    ),
    *group(
        "aadp_kernels/_torch/noise.py",
        _NOISE,
        ("nothing is drawn again", "for term in noise.again:", "for term in noise.again[:0]:"),
        ("a coefficient is missing", "value.add_(drawn.mul_(term.coefficient))", "value.add_(drawn)"),
    ),
    *group(
        "aadp_kernels/_cpu/sum_and_write.py",
        _NOISE,
        ("nothing is drawn again", "for term in range(len(plan.states)):", "for term in range(1):"),
        ("coefficients are those before", "_add_multiple(drawn, plan.coefficients[term], again)", "_add_multiple(drawn, plan.coefficients[term - 1], again)"),
        ("fast coefficients are those before", "np.float32(plan.coefficients[term])", "np.float32(plan.coefficients[term - 1])"),
    ),
    *group(
        "aadp_kernels/_triton/noise.py",
        _TRITON,
        ("nothing is drawn again", "for term in range(bands):", "for term in range(1):"),
        ("a coefficient is missing", "total[i] + columns[i] * factor", "total[i] + columns[i]"),
        ("this step again and again", "tl.load(steps + term)", "tl.load(steps)"),
        ("every key is this step's", "load_key(keys + term * (8 if CHACHA else 2), CHACHA)", "load_key(keys, CHACHA)"),
        ("keys of ChaCha overlap", "term * (8 if CHACHA else 2)", "term * 2"),
    ),
    *group(
        "aadp_kernels/_triton/word_rows.py",
        _TRITON,
        ("every block of a row is its first", "start + BLOCKS * row + ONLY", "start + BLOCKS * row"),
        ("neighbours change places", "columns += (a[i], b[i])", "columns += (b[i], a[i])"),
    ),
    *group(
        "aadp_kernels/_triton/_device.py",
        _TRITON,
        ("coefficients of the next step", "factors = [1.0, *(term.coefficient for term in noise.again)]", "factors = [*(term.coefficient for term in noise.again), 1.0]"),
        ("one step less", "weights, len(steps)", "weights, len(steps) - 1"),
    ),
    *group(
        "aadp_kernels/_triton/privatize.py",
        _TRITON,
        ("independent noise", "source_tensors(noise, device, scratch.step)", "source_tensors(noise._replace(again=()), device, scratch.step)"),
    ),
    *group(
        "aadp_kernels/_triton/ahead.py",
        "tests/aadp_kernels/test_warm_up.py",
        ("independent noise is compiled", "1, clients, again)", "1, clients)"),
    ),
    *group(
        "aadp_kernels/_triton/clip_sum.py",
        _TRITON,
        ("independent noise", "source_tensors(noise, device)", "source_tensors(noise._replace(again=()), device)"),
    ),
    *group(
        "aadp_kernels/factorization.py",
        _RUNS,
        ("rows after the last participation", "products[lag][horizon - 1 - later]", "products[lag][min(horizon - 1 - later, 3)]"),
        ("only the diagonal", "(1 if i == j else 2) * inner", "(1 if i == j else 0) * inner"),
        ("columns one row off", "c[t] = -(d[1 : back + 1]", "c[t] = (d[1 : back + 1]"),
        ("the first batch alone", "total[first:] += c[: horizon - first]", "total[:] = c"),
        ("an inverse that rises", "if (c < 0).any() or (np.diff(c) > 0).any():", "if False:"),
        ("momentum forgotten", "row[t] = rates[t] + momentum * row[t + 1]", "row[t] = rates[t] + row[t + 1]"),
    ),
    *group(
        "aadp_kernels/integrations/cyclic.py",
        _LOOP,
        ("noise from before the run", "step - first_step)", "step)"),
        ("a run charged as a step", "return noise_multiplier / self.sensitivity", "return noise_multiplier"),
        ("batches in another order", "part, self.next_step = self.next_step % self.period", "part, self.next_step = -self.next_step % self.period"),
    ),
    *group(
        "aadp_kernels/integrations/optim.py",
        _LOOP,
        ("steps beyond the plan", "self.next_step - self._began >= self.cyclic.steps:", "False:"),
        ("one step beyond the plan", "self.next_step - self._began >= self.cyclic.steps:", "self.next_step - self._began > self.cyclic.steps:"),
        ("where a run began is forgotten", "facts.get(\"began\", 0)", "self._began"),
        ("independent noise", "step=step, correlation=among,", "step=step, correlation=None,"),
    ),
    *group(
        "aadp_kernels/integrations/_opacus_cyclic.py",
        _OPACUS,
        ("every step charged for the run", "if self.taken == 1:", "if True:"),
        ("a run charged as a step", "self.plan.multiplier(self.noise_multiplier)", "self.noise_multiplier"),
        ("batches of other steps", "if self.handed_out != step:", "if False:"),
        ("a pass begins anew", "self.run.taken, len(self)", "0, len(self)"),
        ("steps beyond the plan", "if step >= plan.steps:", "if False:"),
        ("one step beyond the plan", "if step >= plan.steps:", "if step > plan.steps:"),
        ("steps are skipped", "if skips:", "if False:"),
        ("noise changes in a run", "if noise_multiplier != self.noise_multiplier:", "if False:"),
        ("a band is missing", "[: len(self.plan.coefficients) - 1]", "[: len(self.plan.coefficients) - 2]"),
        ("earlier steps in the wrong order", "self._addresses[::-1]", "self._addresses"),
    ),
    *group(
        "aadp_kernels/integrations/opacus.py",
        _OPACUS,
        ("the target of a run is that of a step", "multiplier = one * cyclic.sensitivity", "multiplier = one"),
        ("Poisson batches with shared noise", "if cyclic is not None and poisson_sampling:", "if False:"),
        ("Laplace noise shared", 'if cyclic is not None and self.mechanism != "gaussian":', "if False:"),
    ),
    *group(
        "aadp_kernels/integrations/_opacus.py",
        _OPACUS,
        ("independent noise", '"step": step, "correlation": among,', '"step": step, "correlation": None,'),
    ),
]  # fmt: skip
