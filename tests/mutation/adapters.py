"""Mistakes in aadp_kernels.integrations."""

from __future__ import annotations

from tests.mutation.mutations import group

_LIFE = "tests/aadp_kernels/test_integrations_life.py"
_STATES = "tests/aadp_kernels/test_integrations_states.py"
_MIXING = "tests/aadp_kernels/test_integrations_mixing.py"
_OPACUS = "tests/aadp_kernels/test_integrations_opacus.py"
_SAMPLES = "tests/aadp_kernels/test_integrations_per_sample.py"
_SEEN = "tests/aadp_kernels/test_integrations_watch.py"
_BACKWARD = "tests/aadp_kernels/test_integrations_backward.py"

WATCH = group(
    "aadp_kernels/integrations/_watch.py",
    f"{_SEEN}::test_parameters_used_outside_of_their_layer_raise_before_they_move "
    f"{_SEEN}::test_layers_called_twice_or_on_something_else_raise "
    f"{_SEEN}::test_every_forward_is_watched_and_not_the_first "
    f"{_SEEN}::test_as_many_positions_as_records_are_not_records "
    f"{_SEEN}::test_a_layer_that_is_called_by_chance_is_tried_when_it_is_called "
    f"{_SEEN}::test_a_path_that_one_or_two_records_never_take_raises "
    f"{_SEEN}::test_one_row_for_all_records "
    f"{_SEEN}::test_one_row_for_all_records_in_later_forwards_alone_raises "
    f"{_SEEN}::test_what_inputs_do_not_say_must_be_told "
    f"{_SEEN}::test_parts_of_a_model_are_called_within_records "
    f"{_SEEN}::test_every_signature_is_tried_with_two_numbers_of_records "
    f"{_SEEN}::test_copies_are_run_once "
    f"{_BACKWARD}::test_two_backward_passes_of_one_forward_always_raise "
    f"{_BACKWARD}::test_checkpointed_activations {_BACKWARD}::test_reentrant_checkpoints_raise "
    f"{_BACKWARD}::test_other_tensors_in_the_place_of_parameters_raise "
    f"{_LIFE}::test_a_second_optimizer_retires_the_first "
    f"{_LIFE}::test_the_watch_ends_with_the_optimizer "
    f"{_STATES}::test_copies_and_files_of_the_model",
    ("a foreign gradient is let through", '        """Autograd has a gradient for a parameter itself."""\n', '        """Autograd has a gradient for a parameter itself."""\n        return\n'),
    ("layers get their own parameters", "        alias = own.detach().requires_grad_()\n", "        return own\n"),
    ("a second call passes", "if layer in forward.called:", "if layer in forward.given:"),
    ("rows are not looked at", "x.shape[0] != forward.records:", "x.shape[0] < 0:"),
    ("calls outside of a forward pass", "        elif forward is None:\n", "        elif forward is None and x is None:\n"),
    ("inputs that disagree are the first's", "if len(sizes) != 1:", "if len(sizes) < 1:"),
    ("no signature is tried", "        if tried is None:\n", "        if tried is None and simple is None:\n"),
    ("one signature is tried", "signature = (model.training, *map(shape_of_record, leaves))", "signature = model.training"),
    ("one record only", "zip((1, 2), tried[:2], strict=True)", "zip((1, 1), tried[:2], strict=True)"),
    ("layers by chance are not tried", "            if not forward.untried():\n                return\n", "            return\n"),
    ("untried layers pass", "        if forward.untried():\n            names", "        if forward.untried() and not _TRIALS:\n            names"),
    ("a second gradient of a forward passes", "elif name in forward.given:", "elif name in forward.called:"),
    ("what is computed again gives gradients", "            forward = None\n        elif", "            forward = forward or Forward(None)\n        elif"),
    ("other tensors pass", "if own is not private:", "if own is None:"),
    ("any layer may get one row for all", "if layer in forward.sharing:", "if forward.called:"),
    ("an old optimizer lives on", "        if isinstance(old, Watch):\n", "        if old is self:\n"),
    ("copies are watched", "        return ModelHook(None)\n", "        return ModelHook(self.act)\n"),
    ("the watch never ends", '        self.closed = why\n', '        self.closed = why\n        return\n'),
)  # fmt: skip

SUMS = group(
    "aadp_kernels/integrations/_gradients.py",
    f"{_BACKWARD}::test_two_backward_passes_before_a_step "
    f"{_BACKWARD}::test_a_backward_pass_that_failed_is_not_released "
    f"{_LIFE}::test_what_has_changed_is_refused_before_anything_moves "
    f"{_LIFE}::test_gradients_from_before_are_forgotten "
    f"{_LIFE}::test_a_failing_step_moves_nothing_and_draws_no_noise_twice "
    f"{_LIFE}::test_a_first_step_that_fails_inside_is_undone "
    "tests/aadp_kernels/test_integrations.py::test_stale_gradients_are_refused "
    "tests/aadp_kernels/test_integrations.py::test_micro_batches_give_one_step",
    ("any number of forwards", "if self.forwards and not self.micro_batches:", "if self.forwards < 0:"),
    ("old gradients are kept", "            parameter.grad = None\n        self.zeroed()", "            pass\n        self.zeroed()"),
    ("micro-batches replace each other", "                there.add_(grad)", "                there.copy_(grad)"),
    ("changed gradients pass", " or grad._version != self._versions[name]", ""),
    ("other gradients pass", "grad is None or grad is not left", "grad is None or left is None"),
    ("failed passes are released", "if self._running - allowed:", "if allowed - self._running and not allowed:"),
    ("spent sums are released again", "        self._spent = _ZERO_FIRST\n", '        self._spent = ""\n'),
    ("half noised sums are kept", "            parameter.grad = None\n        self._left.clear()", "            pass\n        self._left.clear()"),
)  # fmt: skip

OPTIMIZER = group(
    "aadp_kernels/integrations/optim.py",
    f"{_LIFE} {_STATES}",
    ("parameters are not compared", "if self._trained_now() == self._trained and all(", "if self._trained and all("),
    ("gradients of frozen ones pass", "all(p.grad is None for p in self._frozen)", "self._frozen is not None"),
    ("noise is drawn before it is counted", "step, self.next_step = self.next_step, self.next_step + 1", "step = self.next_step"),
    ("steps that fail are free", "            self.steps_taken += 1\n", ""),
    ("a first step is not undone", "                parameter.copy_(value)\n", "                pass\n"),
    ("loading goes back", 'self.next_step = max(self.next_step, facts["next_step"])', 'self.next_step = facts["next_step"]'),
    ("the closure runs twice", "                found = closure()\n", "                found = closure() and closure()\n"),
    ("raised clip norms pass", "        self._kept.check()\n", ""),
    ("retired ones step", "        if self._watch.closed:\n", '        if self._watch.closed == "no":\n'),
)  # fmt: skip

WRAPPED = group(
    "aadp_kernels/integrations/_wrapped.py",
    f"{_LIFE} {_STATES}",
    ("frozen ones have a part", "for name, p in found.items() if p.requires_grad}", "for name, p in found.items()}"),
    ("LBFGS passes", "if isinstance(optimizer, torch.optim.LBFGS):", "if optimizer is None:"),
)  # fmt: skip

STATES = group(
    "aadp_kernels/integrations/_public_state.py",
    f"{_STATES}::test_states_of_something_else_are_refused",
    ("multipliers are not compared", '"mechanism", "noise_multiplier", "p",', '"mechanism", "p",'),
    ("layers are not compared", '("layers", "mechanism"', '("mechanism"'),
    ("other runs after own steps", 'facts["run"] != own["run"]', 'facts["run"] == "no"'),
)  # fmt: skip

OPACUS = group(
    "aadp_kernels/integrations/_opacus.py",
    f"{_OPACUS}::test_two_passes_between_steps_are_refused "
    f"{_OPACUS}::test_frozen_layers_stay_and_unfrozen_ones_are_refused",
    ("parameters are not compared", "if trained != self._trained:", "if trained is None:"),
    ("gradients of frozen ones pass", "if any(p.grad is not None for p in frozen):", "if frozen is None:"),
    ("accumulation is never forbidden", "self.sums.micro_batches = False", "self.sums.micro_batches = True"),
)  # fmt: skip

SAMPLERS = group(
    "aadp_kernels/integrations/_per_sample.py",
    _SAMPLES,
    ("convolutions are padded with zeros", 'return layer.padding_mode != "zeros"', 'return layer.padding_mode == "zeros"'),
    ("padding rows have gradients", "return layer.padding_idx is not None or layer.scale_grad_by_freq", "return layer.scale_grad_by_freq"),
    ("frequencies do not scale", "return layer.padding_idx is not None or layer.scale_grad_by_freq", "return layer.padding_idx is not None"),
    ("every norm has a bias", "return type(layer) is nn.LayerNorm and layer.bias is None", "return False"),
    ("wrapped models keep their samplers", "        if sample is None and needs_functorch(layer):\n", "        if sample is None and needs_functorch(layer) and not batch_first:\n"),
    ("hooks see the second call", "if _owner(h) is not made}", "if _owner(h) is not None}"),
    ("a batch without records fails", "        if not len(x):\n", "        if not len(x) and grad is None:\n"),
    ("raw errors of samplers", "except (RuntimeError, TypeError, NotImplementedError) as error:", "except ZeroDivisionError as error:"),
    ("recurrent layers pass", "    nn.RNNBase:", "    nn.Transformer:"),
    ("cells pass", "    nn.RNNCellBase:", "    nn.TransformerEncoder:"),
    ("bilinear layers pass", "    nn.Bilinear:", "    nn.TransformerDecoder:"),
    ("bags pass", "    nn.EmbeddingBag:", "    nn.Transformer:"),
    ("layers that mix records pass", "        reason = mixing(layer)\n", "        reason = None\n"),
    ("sparse gradients pass", "nn.Embedding) and layer.sparse:", "nn.Embedding) and layer.sparse is None:"),
    ("expanded weights of padded embeddings pass", 'if mode == "ew" and isinstance(layer, nn.Embedding)', 'if mode == "EW" and isinstance(layer, nn.Embedding)'),
)  # fmt: skip

ROWS = group(
    "aadp_kernels/integrations/_rows.py",
    _SAMPLES,
    ("rows are not looked at", "        if rows != self._count and not", "        if rows is None and not"),
    ("one record only", "zip((1, 2), tried, strict=True)", "zip((1, 1), tried, strict=True)"),
    ("no signature is tried", "            if self._kind not in self._tried:\n", "            if self._kind is None:\n"),
    ("untried layers pass", "        if untried:\n", "        if untried and not _TRIALS:\n"),
    ("layers by chance are not tried again", "            self._try(tried, model, args, kwargs, count, seed)\n", "            pass\n"),
    ("other inputs pass", "        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):\n", "        if not isinstance(args[0], Tensor):\n"),
    ("several outputs pass", "if not (self._unseen() or isinstance(output, Tensor)):", "if not (self._unseen() or output is not None):"),
    ("calls outside of a forward pass", "        if self._count is None:\n", "        if self._count is None and layer is None:\n"),
    ("batch normalisation goes back to training", "            reason = mixing(norm)\n", "            reason = None\n"),
    ("packed sequences are refused", "        packed = recurrent and", "        packed = not recurrent and"),
    ("the watch outlives the hooks", "if made is None or not made.hooks_enabled or not", "if made is None or not"),
)  # fmt: skip

_HIDDEN = f"{_MIXING}::test_mixing_that_hides_is_found"

COMPARISON = group(
    "aadp_kernels/integrations/_comparison.py",
    _HIDDEN,
    ("gradients of mixed records pass", "        return _mixing(name and self._differing(_in_order(have, want), want))\n", '        return ""\n'),
    ("small gradients alone are sent back", "_FACTORS = (1.0, 1e3)", "_FACTORS = (1.0,)"),
    ("parameters are where they are", "found[name] = value + size * by.to(value)", "found[name] = value"),
)  # fmt: skip

INDEPENDENCE = group(
    "aadp_kernels/integrations/_independence.py",
    f"{_MIXING}::test_one_record_shows_nothing_and_the_next_batch_is_compared "
    f"{_HIDDEN}",
    ("two records are enough for good", "            self._compared[kind] = wanted\n", "            self._compared[kind] = _COUNT\n"),
    ("mixing in training passes", "comparison.interacting(rows) if repeats", "comparison.interacting(rows) if not repeats"),
)  # fmt: skip

MUTATIONS = [
    *COMPARISON,
    *INDEPENDENCE,
    *WATCH,
    *SUMS,
    *OPTIMIZER,
    *WRAPPED,
    *STATES,
    *OPACUS,
    *SAMPLERS,
    *ROWS,
]
