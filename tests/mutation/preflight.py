"""Mistakes in what is tried and refused before a run begins."""

from __future__ import annotations

from tests.mutation.mutations import group

RECORDS_ALONE = group(
    "fl_lightning/preflight/forward_check.py",
    "tests/fl_lightning/test_bad_input.py tests/fl_lightning/test_shared_weights.py",
    ("parameters that a forward writes accepted", "written = [n for n, v in state.items() if not torch.equal(v, before[n])]", "written = []"),
    ("what is kept of records not seen", "if not _close(first, again):", "if False:"),
)  # fmt: skip

DRY = "tests/fl_lightning/test_dry_round.py"
INDEPENDENCE = group(
    "fl_lightning/preflight/record_independence.py",
    DRY,
    ("differences not seen", "<= _RTOL * size + floor + 1e-12:", "<= 1e9:"),
    ("records that draw numbers not compared", "return _mixed(name) if name else \"\"", "return \"\""),
    ("records that draw numbers not tried alone", "for i in (0, size // 2, size - 1):", "for i in ():"),
)  # fmt: skip

DRY_ROUND = group(
    "fl_lightning/preflight/dry_round.py",
    DRY,
    ("records alone not compared", "problem = mixed_records(", "problem = \"\" and mixed_records("),
    ("autograd on the network not compared", "problem = foreign_gradient(", "problem = \"\" and foreign_gradient("),
    ("checkpoint not tried", "        _try_checkpoint(proposed, server)\n", ""),
    ("small batches not tried", "            smaller = range(2, len(x)) if", "            smaller = () if"),
    ("vmap kept where it fails", "        except _CannotTrain as error:\n", "        except ZeroDivisionError as error:\n"),
)  # fmt: skip

TRANSFORM = "tests/fl_lightning/test_transform_check.py"
TRANSFORM_CHECK = group(
    "fl_lightning/data/transform_check.py",
    TRANSFORM,
    ("records alone not compared", "if _equal(alone, used[rows]):", "if True:"),
    ("a part of the records not compared", 'return "" if _equal(apply(x[:part]), used[:part]) else _BESIDE', 'return ""'),
    ("random numbers taken for an excuse", "            if not _equal(apply(beside)[[place]], values[[place]]):\n", "            if False:\n"),
    ("what changes by itself accepted", "if not _equal(apply(few), values):", "if False:"),
)  # fmt: skip

TRANSFORMED = group(
    "fl_lightning/data/transform.py",
    TRANSFORM,
    ("mark kept when values are made again", "    path.with_suffix(ALONE).unlink(missing_ok=True)", "    ALONE"),
    ("records of the user changed", "given = x.clone() if fields is None", "given = x if fields is None"),
    ("first meets private records", "        _meet_drawn_records(function, x, arguments, fields)\n", "        pass\n"),
)  # fmt: skip

DIVIDED = group(
    "fl_lightning/data/hidden_states.py",
    "tests/fl_lightning/test_hidden_states.py",
    ("states of padding kept", "hidden.where(seen[..., None] > 0, 0.0)", "hidden"),
    ("no layers at all", "if not 0 < frozen_layers < count:", "if not 0 <= frozen_layers < count:"),
    ("all layers", "if not 0 < frozen_layers < count:", "if not 0 < frozen_layers <= count:"),
    ("a layer in both parts", "(upper, range(frozen_layers))", "(upper, range(frozen_layers - 1))"),
    ("the whole encoder changed", "copy.deepcopy(body), copy.deepcopy(body)", "copy.deepcopy(body), body"),
    ("two parts not compared", "if not _make(lower, upper, body):", "if False:"),
    ("the encoder left in evaluation", "        body.train(training)\n", "        body.train()\n"),
)  # fmt: skip

TRANSFORM_REFUSED = group(
    "fl_lightning/preflight/checks.py",
    TRANSFORM,
    ("a transform that learns accepted", "if data.transform_problem and private:", "if False:"),
)  # fmt: skip

TRAINER = "tests/fl_lightning/test_trainer_check.py"
CALLBACK_CHECK = group(
    "fl_lightning/preflight/callback_check.py",
    TRAINER,
    ("callbacks that replace weights accepted", "if isinstance(callback, kind):", "if False:"),
    ("only the class itself refused", "if isinstance(callback, kind):", "if type(callback) is kind:"),
    ("private figures may decide", "if monitor.startswith(_PRIVATE) and proposed.rules.privacy.private:", "if False:"),
    ("figures that nobody logs accepted", "if not _is_logged(monitor, proposed):", "if False:"),
    ("figures of others refused", "return True  # what others log is not known", "return False"),
)  # fmt: skip

TRAINER_CHECK = group(
    "fl_lightning/preflight/trainer_check.py",
    TRAINER,
    ("options without meaning accepted", "        if wrong:\n", "        if False:\n"),
    ("half a round accepted", "            batches < 1,", "            False,"),
    ("batches within a round accepted", "every_round and isinstance(interval, int) and interval > 1", "False"),
)  # fmt: skip

LABELS = group(
    "fl_lightning/data/labels.py",
    "tests/fl_lightning/test_labels.py",
    ("labels out of range accepted", "if not len(y) or 0 <=", "if True or 0 <="),
    ("lists of labels accepted", "    if y.ndim == 1:\n        return\n", "    return\n"),
    ("numbers cut to integers", "if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:", "if False:"),
)  # fmt: skip

NETWORK_CHECK = group(
    "fl_lightning/networks/check.py",
    DRY,
    ("complex parameters accepted", "if p.requires_grad and p.dtype not in _REAL:", "if False:"),
    ("parameters without elements accepted", "and not is_lazy(p) and not p.numel():", "and False:"),
    ("sparse gradients accepted", "if layer.sparse and layer.weight.requires_grad:", "if False:"),
    ("norms that train() wakes accepted", "and not (layer.training or mode)", "and not mode"),
)  # fmt: skip


MUTATIONS = [
    *RECORDS_ALONE,
    *INDEPENDENCE,
    *DRY_ROUND,
    *TRANSFORM_CHECK,
    *TRANSFORMED,
    *DIVIDED,
    *TRANSFORM_REFUSED,
    *CALLBACK_CHECK,
    *TRAINER_CHECK,
    *LABELS,
    *NETWORK_CHECK,
]
