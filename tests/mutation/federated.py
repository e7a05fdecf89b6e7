"""Mistakes in the rules, the accounting and the mechanism of fl_lightning."""

from __future__ import annotations

from tests.mutation.mutations import group

POLICY = "tests/fl_lightning/test_policy.py tests/fl_lightning/test_policy_history.py"
MECHANISM = "tests/fl_lightning/test_mechanism.py"
SCALES = f"{MECHANISM}::test_releases_are_the_unnoised_update_plus_exactly_scaled_noise"
CHARGED = f"{MECHANISM}::test_the_ledger_charges_what_the_noise_is_worth"
ACCOUNTING = "tests/fl_lightning/test_accounting.py"
EXACTNESS = "tests/fl_lightning/test_exactness.py"

THRESHOLDS = group(
    "fl_lightning/privacy/thresholds.py",
    POLICY,
    ("total not divided over the layers", "clip_norm / (num_layers if p == 1", "clip_norm / (1 if p == 1"),
    ("L2 total divided by L", "else math.sqrt(num_layers))", "else num_layers)"),
    ("first clip norm 3/2", "torch.full((num_layers,), total,", "torch.full((num_layers,), 1.5 * total,"),
    ("L2 clip norm 2/3", "return factor * math.sqrt(math.pi / 2) * l1_norm / dims.sqrt()", "return factor * 2 / 3 * math.sqrt(math.pi / 2) * l1_norm / dims.sqrt()"),
    ("d instead of its root", "* l1_norm / dims.sqrt()", "* l1_norm / dims"),
    ("quantile rule moves the wrong way", "torch.exp(-lr * (below - quantile))", "torch.exp(lr * (below - quantile))"),
    ("quantile ignored", "torch.exp(-lr * (below - quantile))", "torch.exp(-lr * (below - 0.5))"),
    ("votes not centred", "expected_batch[:, None] + 0.5).clamp", "expected_batch[:, None]).clamp"),
    ("noisy fraction not held in [0, 1]", "+ 0.5).clamp(0.0, 1.0)", "+ 0.5)"),
    ("tracked norm unbounded above", "initial * NORM_RANGE)", "initial * float('inf'))"),
    ("noise of a Gaussian not taken off", "mean_abs.square() - 2 * noise_scale.square() / math.pi", "mean_abs.square()"),
    ("noise of a Gaussian taken off by 2/3", "mean_abs.square() - 2 * noise_scale.square() / math.pi", "mean_abs.square() - 2 * (2 / 3 * noise_scale).square() / math.pi"),
    ("noise of a Laplace taken off by 3/2", "excess = (mean_abs - noise_scale)", "excess = (mean_abs - 1.5 * noise_scale)"),
    ("Laplace estimate doubled", "noise_scale)).sqrt()) / 2", "noise_scale)).sqrt())"),
    ("L2 proportions like L1", "l1_norm if p == 1 else l1_norm.square() / dims", "l1_norm if p == 1 else l1_norm.square()"),
    ("no even part", "(1 - CLIP_FLOOR) * normalized(size) + CLIP_FLOOR / size.shape[-1]", "normalized(size)"),
    ("released clip norm can jump up", ", previous * MAX_CHANGE)", ", previous * 1e9)"),
    ("released clip norm can drop", "previous / MAX_CHANGE)", "previous / 1e9)"),
)  # fmt: skip

LOCAL = group(
    "fl_lightning/local/training.py",
    "tests/fl_lightning/test_client.py::test_local_training_equals_torch_sgd_and_idle_clients_stay",
    ("drawn away from the global model", "g + proximal * (params[n] - global_params[n])", "g - proximal * (params[n] - global_params[n])"),
    ("drawn back twice as much", "g + proximal * (params[n] - global_params[n])", "g + 2 * proximal * (params[n] - global_params[n])"),
)  # fmt: skip

PERSONAL = group(
    "fl_lightning/local/personal.py",
    "tests/fl_lightning/test_personal_layers.py",
    ("fitted with dropout", "    network.eval()\n", "    pass\n"),
    ("modes are left in eval", "            layer.training = mode", "            pass"),
    ("the sum in place of the mean", "weight = batch.divisor.reciprocal()", "weight = torch.ones_like(batch.divisor)"),
    ("the last client's start for all", "shared = False", "shared = True"),
    ("what is not finite stays", "torch.where(columns(finite, v), v, start[n])", "v"),
    ("personal layers are released too", "        p.requires_grad_(False)", "        pass"),
    ("half a shared parameter", "if id(p) in mine", "if False"),
    ("nothing has to be left", "if found and not left", "if False"),
    ("an exported model stays frozen", "requires_grad_(True)", "requires_grad_(False)"),
)  # fmt: skip

ALLOCATION = group(
    "fl_lightning/privacy/allocation.py",
    POLICY,
    ("mse without the square of C", "dims * clip_norm.square()", "dims * clip_norm"),
    ("contribution without d", '"contribution": dims * contribution', '"contribution": contribution'),
    ("abstract like uniform", '"abstract": contribution', '"abstract": torch.ones_like(contribution)'),
    ("root dropped for Gaussian", "size = size.sqrt() if mechanism", "size = size if mechanism"),
    ("snr by the noise's scale, not its energy", "        size = size.square()\n", "        pass\n"),
    ("snr without d", '"snr": clip_norm * dims / contribution', '"snr": clip_norm / contribution'),
    ("flat noise without d", "return l1_norm.sum(-1).square() / flat", "return l1_norm.sum(-1).square() / (flat / dims.sum())"),
    ("square root for Laplace", "size.pow(1 / 3)", "size.pow(1 / 2)"),
    ("no floor", "(1 - floor) * normalized(size) + floor / size.shape[-1]", "normalized(size)"),
    ("shares sum to more than one", "(1 - floor) * normalized(size)", "normalized(size)"),
)  # fmt: skip

RATIOS = group(
    "fl_lightning/output/summary.py",
    "tests/fl_lightning/test_callbacks.py::test_one_row_a_client_and_layer "
    "tests/fl_lightning/test_callbacks.py::test_no_ratio_where_layers_show_nothing_that_is_released",
    ("a ratio of one layer that is all", ' or pl_module.privacy.clipping == "flat":', ":"),
    ("a ratio of raw history", 'if not pl_module.privacy.guarantee or pl_module', "if pl_module"),
    ("a ratio without the sizes of layers", "dtype=torch.float64), dims)", "dtype=torch.float64), dims / dims)"),
)  # fmt: skip

HISTORY = group(
    "fl_lightning/privacy/history.py",
    f"{POLICY} {CHARGED} "
    f"{MECHANISM}::test_personal_multipliers_scale_the_noise_of_their_own_clients",
    ("window of another client", "self.window[clients, slot] = l1_norm.double()", "self.window[0, slot] = l1_norm.double()"),
    ("window never moves on", "self.releases[clients] += 1", "pass"),
    ("window mean over its length", "filled = age < self.releases[clients, None]", "filled = age >= 0"),
    ("votes cost nothing", "sums, vote_scale = multiplier * for_sums, multiplier * for_votes", "sums, vote_scale = multiplier, multiplier * for_votes"),
    ("vote noise 2/3", "multiplier * for_sums, multiplier * for_votes", "multiplier * for_sums, multiplier * for_votes * 2 / 3"),
    ("one multiplier for all", "noise_multiplier=sums,", "noise_multiplier=sums[0],"),
    ("sensitivity of the other adjacency", "            noise_multiplier=sums,\n            adjacency=config.resolved_adjacency,", "            noise_multiplier=sums,\n            adjacency='zero_out',"),
    ("total of the L2 clip is its sum", "else self.initial_clip_norm.norm()", "else self.initial_clip_norm.sum()"),
    ("clip norms forget the last round", "previous=self.clip_norm[clients],", "previous=first,"),
)  # fmt: skip

MECHANISM_PLACES = group(
    "fl_lightning/privacy/mechanism.py",
    f"{SCALES} {CHARGED} {MECHANISM}::test_released_votes_carry_exactly_scaled_noise "
    f"{MECHANISM}::test_noise_is_fresh_in_every_step_round_and_for_every_input "
    f"{MECHANISM}::test_tensors_layers_and_clients_share_no_noise "
    f"{MECHANISM}::test_personal_multipliers_scale_the_noise_of_their_own_clients "
    f"{MECHANISM}::test_other_private_values_never_meet_the_same_noise",
    ("accountant told of less sampling", "sampling_rate=sampling_rate,", "sampling_rate=sampling_rate / 2,"),
    ("noise of the wrong layer", "scale=columns(policy.noise_scale[:, layer].to(value.device), value)", "scale=columns(policy.noise_scale[:, 0].to(value.device), value)"),
    ("client dropped from the address", "                client=self.numbers,\n                layer=layer,", "                client=torch.zeros_like(self.clients),\n                layer=layer,"),
    ("tensors of a layer share their noise", "                offset=offset,\n", "                offset=0,\n"),
    ("noise subtracted twice its size", "(value.double() + noise).to(like[name].dtype)", "(value.double() - 2 * noise).to(like[name].dtype)"),
    ("noise not bound to the values", 'key = binding.step_key(self.key, step, [*sums.values(), counts, policy.noise_scale])', 'key = self.key.derive("values", step)'),
    ("votes without noise", "return (votes + noise).float()", "return votes.float()"),
    ("noise of an update not bound to its values", 'key=binding.step_key(key, 0, values)', 'key=key.derive("values", 0)'),
    ("accountant told of 3/2 the noise", "noise_multiplier=multiplier,\n        sampling_rate", "noise_multiplier=1.5 * multiplier,\n        sampling_rate"),
)  # fmt: skip

GRID_PLACES = group(
    "fl_lightning/privacy/mechanism.py",
    "tests/fl_lightning/test_noise_forms.py tests/fl_lightning/test_noise_forms_cost.py",
    ("a vote of one quantum more", "(0.5 / step_size * (1 - 2.0**-50)).floor()", "(0.5 / step_size).floor().add(1)"),
    ("half votes in quanta", "return (2 * votes).to(torch.int64) * each,", "return votes.to(torch.int64) * each,"),
    ("votes without grid noise", "total.clamp(-VOTE_LIMIT, VOTE_LIMIT) + noise)", "total.clamp(-VOTE_LIMIT, VOTE_LIMIT) + 0 * noise)"),
    ("grid sums of the first client", "accumulate=[sums[n][i] for n in layout.names]", "accumulate=[sums[n][0].clone() for n in layout.names]"),
    ("grid scale of the first client", "                scale=policy.noise_scale[i],\n", "                scale=policy.noise_scale[0] * 1.5,\n"),
)  # fmt: skip

EVENT = group(
    "fl_lightning/values/event.py",
    f"{ACCOUNTING}::test_known_values {ACCOUNTING}::test_edge_cases "
    f"{ACCOUNTING}::test_two_events_compose {ACCOUNTING}::test_unsampled_gaussian_is_exact "
    f"{ACCOUNTING}::test_sampled_laplace_rdp "
    f"{ACCOUNTING}::test_calibrate_pure {ACCOUNTING}::test_affordable_steps "
    f"{ACCOUNTING}::test_pld_is_below_rdp {ACCOUNTING}::test_affordable_steps_edges",
    ("sampling ignored", "if self.sampling_rate == 1\n            else", "if True\n            else"),
    ("Laplace taken for a Gaussian", "else dpa.LaplaceDpEvent(scale)", "else dpa.GaussianDpEvent(scale)"),
    ("pure epsilon inverted", "return 1 / self.noise_multiplier", "return self.noise_multiplier"),
    ("pure epsilon amplified twice", "return _log_mix(self.sampling_rate, 1 / self.noise_multiplier)", "return _log_mix(self.sampling_rate**2, 1 / self.noise_multiplier)"),
)  # fmt: skip

ACCOUNTING_PLACES = group(
    "fl_lightning/accounting/composition.py",
    f"{ACCOUNTING}::test_known_values {ACCOUNTING}::test_edge_cases "
    f"{ACCOUNTING}::test_two_events_compose {ACCOUNTING}::test_unsampled_gaussian_is_exact "
    f"{ACCOUNTING}::test_sampled_laplace_rdp "
    f"{ACCOUNTING}::test_calibrate_pure {ACCOUNTING}::test_affordable_steps "
    f"{ACCOUNTING}::test_pld_is_below_rdp {ACCOUNTING}::test_affordable_steps_edges",
    ("no noise costs nothing", "        return math.inf\n    pure = sum(", "        return 0.0\n    pure = sum("),
    ("pure epsilon counted once", "event.pure_epsilon() * count for event, count in key", "event.pure_epsilon() for event, count in key"),
    ("RDP counted once", "np.sum([_rdp(event) * count for event, count in key], axis=0)", "np.sum([_rdp(event) for event, count in key], axis=0)"),
    ("multipliers add up", "sum(count / event.noise_multiplier**2 for", "sum(count / event.noise_multiplier for"),
    ("PLD composes once", "accountant.compose(event.dp_event(), count)", "accountant.compose(event.dp_event(), 1)"),
    ("order off by one", "np.log(delta * _ORDERS) / (_ORDERS - 1)", "np.log(delta * _ORDERS) / _ORDERS"),
    ("sampled Laplace without its second term", "np.log((high - 1) / (2 * high - 1)) - high / scale", "np.full_like(high, -np.inf)"),
    ("affordable steps one too many", "        halve = not halve\n    return low", "        halve = not halve\n    return high"),
)  # fmt: skip

EXACTNESS_PLACES = group(
    "fl_lightning/accounting/exactness.py",
    EXACTNESS,
    ("Laplace tail 2/3", "math.expm1(min(shift, 2 * cutoff)) / 2", "math.expm1(min(shift, 2 * cutoff)) / 3"),
    ("missing mass not charged", "leaves + delta * missing)", "leaves)"),
    ("pairs counted as elements", "pairs = sum(-(-count // 2) for count in streams)", "pairs = sum(streams)"),
    ("Gaussian tail of one pair", "leaves = math.sqrt(pairs) *", "leaves = 1.0 *"),
    ("shift inverted", "    shift = 1 / event.noise_multiplier\n", "    shift = event.noise_multiplier\n"),
    ("tails charged once for all steps", "left = delta - steps * extra.delta - times", "left = delta - extra.delta - times"),
    ("inflation charged once for all steps", "compose_epsilon(counts, left) + steps * extra.epsilon", "compose_epsilon(counts, left) + extra.epsilon"),
    ("calibration ignores the extras", "if charged(multiplier) <= epsilon:", "if True:"),
    ("affordable steps ignore the extras", "if charged_epsilon(event, steps, delta, extra) <= epsilon:", "if True:"),
    ("votes draw no noise", "return (*dims, *([len(dims)] if votes else []))", "return tuple(dims)"),
)  # fmt: skip

FLAT = group(
    "fl_lightning/privacy/one_factor.py",
    "tests/fl_lightning/test_flat.py tests/fl_lightning/test_flat_rules.py "
    "tests/fl_lightning/test_clipped_networks.py "
    "tests/fl_lightning/test_shared_and_split_layers.py",
    ("clip dropped", "return (1 / size.clamp(min=1e-300)).clamp(max=1.0)", "return torch.ones_like(size)"),
    ("records below the clip norm doubled", "size.clamp(min=1e-300)).clamp(max=1.0)", "size.clamp(min=1e-300)).clamp(max=2.0)"),
    ("layers by themselves: clip dropped", "return (clip_norm[:, None] / sizes.clamp(min=1e-300)).clamp(max=1.0)", "return torch.ones_like(sizes)"),
    ("layers by themselves: the first one's factor for all", "layer.sums(factor[at], finite[at])", "layer.sums(factor[0], finite[at])"),
    ("weight and bias that are layers of their own taken for one", "if isinstance(layer, RecordGradients) and weight and bias and row[weight] != row[bias]:", "if isinstance(layer, RecordGradients) and weight is None and bias:"),
    ("the last part of a batch alone", "total[n] + v if total else v", "v"),
    ("one layer's norm for all", "sizes[at] += square", "sizes[at] = square"),
    ("strange records of a layer count in others", "finite[at] &= own", "finite[at] = own"),
    ("automatic clipping without its constant", "1 / (size + AUTOMATIC_GAMMA / units[0])", "1 / size"),
    ("votes turned round", "(l1 <= votes_at[:, None]).double() - 0.5", "(l1 > votes_at[:, None]).double() - 0.5"),
    ("joint: noise of a layer not its unit", "return policy.clip_norm / (part.sqrt() if", "return policy.clip_norm * (part.sqrt() if"),
    ("joint: Gaussian units of Laplace", "part.sqrt() if mechanism", "part if mechanism"),
    ("joint: L1 over layers", 'order = p if clipping == "flat" else 1 if', 'order = p if clipping == "flat" else 2 if'),
    ("roundings of the factors not covered", "ROUNDING = 1 - 1e-6", "ROUNDING = 1 + 1e-6"),
)  # fmt: skip

BUDGET = group(
    "fl_lightning/accounting/budget.py",
    f"{EXACTNESS} {MECHANISM}::test_a_client_that_cannot_pay_releases_nothing_and_keeps_its_history "
    "tests/fl_lightning/test_resume.py::test_clients_that_cannot_pay_leave_and_the_run_ends",
    ("one step beyond the budget", "self.spent[clients] + steps <= self.affordable[clients]", "self.spent[clients] + steps - 1 <= self.affordable[clients]"),
)  # fmt: skip

RUNNING = (
    *group(
        "fl_lightning/accounting/running.py",
        "tests/fl_lightning/test_running_epsilon.py",
        ("shown inflation missing", "return found + self._on_top", "return found"),
        ("cut tails are not paid", "left = self._delta - self._tails - tails", "left = self._delta - tails"),
        ("multipliers add up", "release.steps / multipliers**2", "release.steps / multipliers"),
        ("the quietest step counts least", "np.minimum.at(self._least, ids, multipliers)", "self._least[ids] = multipliers"),
        ("rounds of a plan without weights", "sizes=np.concatenate([sizes[m] for _, m, _, sizes in mine]),", "sizes=None,"),
    ),
    *group(
        "fl_lightning/accounting/gaussian.py",
        "tests/fl_lightning/test_running_epsilon.py",
        ("the lower end of epsilon", "<= wanted, 0.0, high)", "<= wanted, 0.0, 0.999 * high)"),
        ("delta without its second term", "- second) / 2", "- 0 * second) / 2"),
        ("half a move", "t = move / 2 - epsilon / move", "t = move / 4 - epsilon / move"),
        ("next to no noise", "multipliers > _LEAST", "multipliers > 0"),
        ("the series where it does not hold", "np.where(x < _FAR, product,", "np.where(x < 2, product,"),
    ),
    *group(
        "fl_lightning/accounting/step_curve.py",
        "tests/fl_lightning/test_running_epsilon.py",
        ("what is beyond the grid is lost", "lost = -math.expm1(steps * math.log1p(-self.beyond)) + 3 * _TAIL", "lost = 0.0"),
        ("one direction alone", "for start, deltas in profiles]", "for start, deltas in profiles[1:] or profiles]"),
        ("one step fewer", "self.transform**steps, self.cells", "self.transform ** (steps - 1), self.cells"),
        ("the window is where it began", "np.roll(masses, steps * self.start - self.first)", "np.roll(masses, steps * self.start - self.first - 9)"),
    ),
)  # fmt: skip

DENOISING = group(
    "fl_lightning/server/aggregate.py",
    "tests/fl_lightning/test_denoise.py",
    ("variance of Laplace noise halved", 'of_unit = 2.0 if mechanism == "laplace"', 'of_unit = 1.0 if mechanism == "laplace"'),
    ("weights not squared in the variance", "(weights.square() * variance)", "(weights * variance)"),
    ("noise of one number taken for that of a layer", "torch.tensor(self.layout.dims, dtype=torch.float64) * self.variance", "self.variance"),
)  # fmt: skip

DRY = "tests/fl_lightning/test_dry_round.py"

SERVER_STEP = group(
    "fl_lightning/server/optimizer.py",
    DRY,
    ("schedule not stepped to its end", "for done in range(rounds):", "for done in range(1):"),
    ("optimizer not stepped", "        optimizer.step()\n", ""),
)  # fmt: skip

EVALUATION = group(
    "fl_lightning/networks/outputs.py",
    DRY,
    ("fewer outputs than classes accepted", "if count >= num_classes or", "if True or"),
    ("probabilities compared with 0", "0.5 if probability else 0.0", "0.0"),
)  # fmt: skip

ONE_USE = group(
    "aadp_kernels/clip_in_backward/single_use.py",
    "tests/aadp_kernels/test_clip_in_backward.py",
    ("rows that are no records accepted", "if rows != [count]:", "if False:"),
    ("two records alone looked at", "for count in (1, 2):", "for count in (2,):"),
    ("layers used twice accepted", "if len(rows) > 1:", "if len(rows) > 9:"),
)  # fmt: skip

WATCHED = group(
    "aadp_kernels/clip_in_backward/watched.py",
    "tests/aadp_kernels/test_watched.py",
    ("layers used twice accepted", "elif name in self._called:", "elif False:"),
    ("calls of an earlier forward counted", "self._called.clear()", "pass"),
    ("rows that are no records accepted", "if not x.dim() or x.shape[0] != self._records:", "if False:"),
    ("layers outside of a forward accepted", "if torch._C._current_graph_task_id() == -1:", "if False:"),
    ("values of guarded parameters readable", "if func not in _METADATA:", "if False:"),
    ("trained parameters not guarded", "parameter.__class__ = GuardedParameter", "pass"),
    ("layers read their own parameters", "return x, given.get(weight, own.get(\"weight\")), given.get(bias, own.get(\"bias\"))", "return x, own.get(\"weight\"), own.get(\"bias\")"),
    ("one number of records looked at", "for count in (1, 2):", "for count in (3,):"),
    ("any layer may get one row for all", "return name in self._sharing", "return True"),
    ("rows for all may be mixed", "check_own_rows(lambda: run(moved(self.values), 2), layers)", "pass"),
)  # fmt: skip

WATCHED_CLIPPING = group(
    "fl_lightning/privacy/clipping.py",
    "tests/fl_lightning/test_watched_forwards.py",
    ("refused batches are not computed by records", "return _or_by_records(one_pass, _rounded_like_one_pass(by_records(False), rounding))", "return one_pass"),
    ("other factors by records than in one pass, by layer", "policy = replace(policy, clip_norm=shorter)", "pass"),
    ("other factors by records than in one pass, flat", "sums = {name: value * ROUNDING for name, value in sums.items()}", "pass"),
    ("parameters put into the clipped network", "        watch=watch,\n", ""),
)  # fmt: skip

CHECKPOINTED = group(
    "aadp_kernels/clip_in_backward/autograd.py",
    "tests/aadp_kernels/test_clip_in_backward_use.py",
    ("the clip norm is computed again", "ctx.how = kind, p, clip, mask, votes_at", "ctx.how = kind, p, clip * torch.inf, mask, votes_at"),
)  # fmt: skip

COMMAND_LINE = [
    *group(
        "fl_lightning/command/class_arguments.py",
        "tests/fl_lightning/test_class_arguments.py",
        ("arguments outlive their class", "        if _same(first, second):\n", "        if True:\n"),
        ("a default is told as typed", "if not _is_default(n, v, known)]", "]"),
        ("a class after its arguments", "            place = i\n", "            pass\n"),
    ),
    *group(
        "fl_lightning/command/run_folder.py",
        "tests/fl_lightning/test_run_folder.py",
        ("two runs share a folder", "return made if made and made[-1] == folder else []", "return [folder]"),
        ("folders of refused runs stay", "shutil.rmtree(folder, ignore_errors=True)", "pass"),
        ("folders of runs that began go", "    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:\n        self._made = []", "    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:\n        pass"),
        ("every process makes a folder", 'all(os.environ.get(name, "0") == "0"', 'True or all(os.environ.get(name, "0") == "0"'),
    ),
    *group(
        "fl_lightning/resumption.py",
        "tests/fl_lightning/test_going_on.py",
        ("another optimizer goes on", "if known.get(name) != value:", "if False:"),
        ("more rounds than planned", "if max_epochs is not None and max_epochs > planned:", "if False:"),
        ("another plan", "if given is not None and given != planned:", "if False:"),
        ("other shapes go on", "        if mine != known:\n", "        if False:\n"),
        ("any checkpoint is taken", "    if state is None:\n        raise", "    if False:\n        raise"),
    ),
    *group(
        "fl_lightning/output/console.py",
        "tests/fl_lightning/test_console.py",
        ("letters that cannot be shown end a run", "plain = text.encode(encoding, _ERRORS)", "plain = text.encode(encoding)"),
        ("a closed pipe ends a run", "    except (OSError, ValueError, SystemExit):", "    except AssertionError:"),
    ),
    *group(
        "fl_lightning/output/finish.py",
        "tests/fl_lightning/test_console.py tests/fl_lightning/test_users_files.py",
        ("a failure after the rounds ends the run", "    except Exception as error:\n        words", "    except KeyError as error:\n        words"),
        ("a missing test set is read", "    if not data.has_test:\n", "    if False:\n"),
    ),
    *group(
        "fl_lightning/export.py",
        "tests/fl_lightning/test_export.py",
        ("metadata in any order", 'header["__metadata__"] = dict(metadata)', "pass"),
    ),
    *group(
        "fl_lightning/accounting/exactness.py",
        "tests/fl_lightning/test_least_noise.py",
        ("the least noise is not tried", "if floor is not None and charged(floor) <= epsilon:", "if False:"),
        ("the floor takes no account of delta", " and steps * cost.delta <= delta / 2", ""),
    ),
    *group(
        "fl_lightning/data/text.py",
        "tests/fl_lightning/test_users_files.py",
        ("texts in other letters accepted", "    if count > MOST_UNKNOWN * total:", "    if False:"),
        ("an author in other letters accepted", "if len(text) > length and count >", "if False and count >"),
        ("other letters read as a letter", "np.minimum(points, 255)", "points % 256"),
    ),
    *group(
        "fl_lightning/data/hub.py",
        "tests/fl_lightning/test_users_files.py",
        ("indices of a palette taken as brightness", "if wanted is None else value.convert(wanted)", ""),
    ),
    *group(
        "fl_lightning/data/labels.py",
        "tests/fl_lightning/test_users_files.py",
        ("words beside numbers accepted", "    if len(words) < len(values):", "    if False:"),
        ("words numbered as they come", "names = tuple(sorted(set(words)))", "names = tuple(dict.fromkeys(words))"),
    ),
    *group(
        "fl_lightning/data/utf8.py",
        "tests/fl_lightning/test_users_files.py",
        ("a byte order mark stays", 'raw.decode("utf-8-sig")', 'raw.decode("utf-8")'),
    ),
]  # fmt: skip

FUNCTIONAL = group(
    "fl_lightning/networks/functional.py",
    "tests/fl_lightning/test_functional.py",
    (
        "a module of two names exchanged twice",
        "network.named_modules():",
        "network.named_modules(remove_duplicate=False):",
    ),
    ("a shared parameter exchanged once", "given[name] = by_tensor[id(tensor)]", "pass"),
)

CONVOLUTIONS = group(
    "fl_lightning/networks/convolutions.py",
    "tests/fl_lightning/test_convolutions.py::test_group_normalisation_behind_a_convolution_is_vmapped",
    ("group normalisation left in channels_last", "if func is F.group_norm:", "if False:"),
)

NAMED = group(
    "fl_lightning/privacy/named_options.py",
    "tests/fl_lightning/test_named_options.py",
    ("later options bind no noise", "if n in always or values[n] != defaults[n]", "if n in always"),
    ("options of a comparator bind no noise", 'return options | vars(options.pop("comparator"))', 'return {n: v for n, v in options.items() if n != "comparator"}'),
)  # fmt: skip

SHORT_NAMES = group(
    "fl_lightning/values/short_names.py",
    "tests/fl_lightning/test_short_names.py",
    ("short names: an end is no fork", 'enumerate((*path, ""))', "enumerate(path)"),
    ("short names: no fork stays", "> 1]", "> 2]"),
    ("short names: every part stays", "> 1]", "> 0]"),
    ("short names: two layers with one name", "if len(set(some)) == len(some)", "if some"),
)  # fmt: skip

MUTATIONS = [
    *SHORT_NAMES, *NAMED, *LOCAL, *PERSONAL, *CONVOLUTIONS, *FUNCTIONAL, *THRESHOLDS, *ALLOCATION, *RATIOS, *HISTORY,
    *MECHANISM_PLACES, *GRID_PLACES, *EVENT, *ACCOUNTING_PLACES, *EXACTNESS_PLACES, *FLAT,
    *BUDGET, *RUNNING, *DENOISING, *SERVER_STEP, *EVALUATION, *COMMAND_LINE, *ONE_USE, *WATCHED,
    *WATCHED_CLIPPING, *CHECKPOINTED,
]  # fmt: skip
