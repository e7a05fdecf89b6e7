"""Several processes: the noise of one, its model to float tolerance, and one ledger."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.values.release import Release
from tests.fl_lightning.ddp_jobs import go
from tests.fl_lightning.ddp_runs import ENVIRONMENT, charged

NOISE = {"noise_multiplier": 0.5, "epsilon": None, "clip_norm": 1.0, "delta": 0.01}
AGGREGATOR = NOISE | {"setting": "client+aggregator"}
SHARES = NOISE | {"setting": "client+secure_sum"}
LOCAL = NOISE | {"setting": "client+local", "thresholds": "released"}
CASES = {
    "none": {"privacy": {"setting": "none"}},
    "none shuffled": {
        "privacy": {"setting": "none"}, "sampling_rate": None, "batch_size": 4, "local_steps": None,
    },
    "abstract": {"privacy": NOISE | {"setting": "abstract"}},
    "record+local": {"privacy": NOISE, "local_steps": 2},
    "record+local vmap": {"privacy": NOISE, "execution": "vmap", "partition": "quantity"},
    "record+local laplace": {"privacy": NOISE | {"mechanism": "laplace"}},
    "record+local grid": {"privacy": NOISE | {"noise_form": "grid"}},
    "precision": {"privacy": NOISE | {"noise_multiplier": [0.5, 1.0]}, "weighting": "precision"},
    "client+local": {"privacy": LOCAL},
    "denoised": {"privacy": NOISE | {"noise_multiplier": 0.2}, "denoise": True},
    "one at a time": {"privacy": LOCAL, "memory_budget": 1e-9},
    "aggregator poisson": {"privacy": AGGREGATOR, "clients_per_round": 3},
    "aggregator fixed": {
        "privacy": AGGREGATOR | {"cohort_sampling": "fixed"}, "clients_per_round": 3,
    },
    "aggregator shared noise": {
        "privacy": AGGREGATOR | {"cohort_sampling": "fixed", "correlation": "banded"},
        "clients_per_round": 2, "rounds": 6,
    },
    "aggregator grid": {"privacy": AGGREGATOR | {"noise_form": "grid"}, "clients_per_round": 3},
    "nobody drawn": {"privacy": AGGREGATOR, "clients_per_round": 1, "clients": 40, "rounds": 6},
    "shares": {"privacy": SHARES},
    "shares laplace": {"privacy": SHARES | {"mechanism": "laplace", "min_survivors": 2}},
    "too few shares": {
        "privacy": SHARES | {"min_survivors": 5}, "dropout": 0.3, "deadline": 1e3, "rounds": 6,
    },
    "one client": {"privacy": LOCAL, "clients": 1},
    "cohort of one": {"privacy": NOISE, "clients_per_round": 1},
    "dropouts": {"privacy": NOISE, "dropout": 0.5, "deadline": 1.0, "rounds": 6},
    "leaving": {
        "privacy": NOISE | {"noise_multiplier": 2.0, "epsilon": [20.0, 2.0, 20.0, 2.0, 20.0]},
        "sampling_rate": 1.0, "rounds": 8,
    },
}  # fmt: skip
PURE_NOISE = {
    name: CASES[name] | {"records": "lost"}
    for name in ("record+local", "record+local grid", "client+local", "aggregator fixed")
}


def launch(folder, jobs, processes):
    """Run jobs in several processes that torch starts."""
    file = folder / f"jobs{processes}.json"
    file.write_text(json.dumps([job | {"processes": processes} for job in jobs]))
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *program, str(Path(__file__).with_name("ddp_jobs.py")), str(file)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


INTERRUPTED = {"privacy": NOISE | {"seed": None}, "rounds": 5}


SHARED = {
    "privacy": AGGREGATOR | {"cohort_sampling": "fixed", "correlation": "banded", "seed": None},
    "clients_per_round": 2, "rounds": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder in which two processes ran every case, and runs that were interrupted."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [case | {"folder": str(folder / name)} for name, case in CASES.items()]
    jobs += [case | {"folder": str(folder / f"lost {n}")} for n, case in PURE_NOISE.items()]
    stopped, again = str(folder / "stopped"), str(folder / "stopped and resumed")
    jobs += [INTERRUPTED | {"folder": f, "crash": 2} for f in (stopped, again)]
    jobs += [INTERRUPTED | {"folder": again, "resume": True}]
    jobs += [INTERRUPTED | {"folder": str(folder / "short"), "rounds": 2}]
    shared = SHARED | {"folder": str(folder / "shared noise"), "crash": 3}
    jobs += [shared, shared | {"crash": None, "resume": True}]
    for name in ("completed", "interrupted"):
        job = INTERRUPTED | {"folder": str(folder / f"one, {name}")}
        go(**(job | ({"crash": 2} if name == "interrupted" else {"rounds": 2})))
        jobs.append(job | {"resume": True})
    launch(folder, jobs, 2)
    return folder


def checkpoint(folder):
    return torch.load(Path(folder) / CHECKPOINT, weights_only=False)


def table(path):
    with Path(path).open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def lines(folder):
    """Ledger lines without what only binds or chains them."""
    _, releases = ledgers.read(folder)
    names = [field.name for field in fields(Release) if field.name != "digest"]
    return [{name: getattr(r, name) for name in names} for r in releases]


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], equal_nan=True, **tolerance)


def close_rows(a, b):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            want, got = numbers(value), numbers(other[name])
            if want is None:
                assert value == other[name], name
            else:
                assert got == pytest.approx(want, rel=1e-4, abs=1e-6), name


def numbers(value):
    """Floats of a cell or of a field; None where there are none."""
    try:
        return [float(v) for v in (value if isinstance(value, tuple) else [value])]
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two, tmp_path, name):
    go(folder=str(tmp_path), **CASES[name])
    both = two / name
    mine, theirs = checkpoint(tmp_path), checkpoint(both)
    close(theirs["state_dict"], mine["state_dict"])
    close(theirs["aadp_fl"]["history"], mine["aadp_fl"]["history"])
    close(theirs["aadp_fl"]["budget"], mine["aadp_fl"]["budget"])
    close_rows(table(both / "rounds.csv"), table(tmp_path / "rounds.csv"))
    found, wanted = (json.loads((f / "found.json").read_text()) for f in (both, tmp_path))
    assert found == pytest.approx(wanted, rel=1e-4)
    if CASES[name]["privacy"].get("setting") == "none":
        return
    assert ledgers.verify(both) == []
    if lines(tmp_path):
        close_rows(lines(both), lines(tmp_path))
        close_rows(table(both / "layers.csv"), table(tmp_path / "layers.csv"))
    assert charged(both) == charged(tmp_path)


@pytest.mark.parametrize("name", PURE_NOISE)
def test_the_noise_has_the_same_bits(two, tmp_path, name):
    # All records are lost: what is released is the noise and nothing else.
    go(folder=str(tmp_path), **PURE_NOISE[name])
    both, alone = (ledgers.read(f)[1] for f in (two / f"lost {name}", tmp_path))
    if name.startswith("record"):
        # An update is the difference of two models: its low bits are those of the global one too.
        both, alone = ([r for r in lines if r.round == 0] for lines in (both, alone))
    assert both == alone
    assert len({r.digest for r in both}) >= 3


# Going on in another number of processes --------------------------------------------------------


def test_a_round_repeated_by_as_many_processes_is_free_and_exact(two):
    stopped, resumed = (charged(two / f) for f in ("stopped", "stopped and resumed"))
    assert stopped == [(k, t, 0) for t in range(3) for k in range(5)]
    assert resumed == [(k, t, 0) for t in range(5) for k in range(5)]
    assert ledgers.verify(two / "stopped and resumed") == []


def test_secret_noise_that_rounds_share_goes_on_in_two_processes(two):
    folder = two / "shared noise"
    assert charged(folder) == [(-1, t, 0) for t in range(6)], "the interrupted round is free"
    assert ledgers.verify(folder) == []
    header, releases = ledgers.read(folder)
    assert not header["simulated"]
    assert [r.combined for r in releases[1:]] == [(t,) for t in range(5)]
    names = [line.split()[0] for line in (folder / "secret.rounds").read_text().split("\n") if line]
    assert names == [r.binding for r in releases]


def test_completed_rounds_go_on_in_another_number_of_processes(two, tmp_path):
    for folder in (two / "one, completed", tmp_path):
        if folder == tmp_path:  # two processes ran two rounds; one goes on
            shutil.copytree(two / "short", folder, dirs_exist_ok=True)
            before = checkpoint(folder)
            module = go(**INTERRUPTED, folder=str(folder), resume=True)
            assert module.run.budget.spent.tolist() == [5] * 5
            assert before["aadp_fl"]["processes"] == [2]
            assert checkpoint(folder)["aadp_fl"]["processes"] == [2, 1]
        assert charged(folder) == [(k, t, 0) for t in range(5) for k in range(5)]
        assert ledgers.verify(folder) == []
        assert [row["round"] for row in table(folder / "rounds.csv")] == list("01234")


def test_an_interrupted_round_has_fresh_noise_in_another_number_of_processes(two, tmp_path):
    shutil.copytree(two / "stopped", tmp_path, dirs_exist_ok=True)
    go(**INTERRUPTED, folder=str(tmp_path), resume=True)
    for folder in (two / "one, interrupted", tmp_path):
        lines = [(k, t, 0) for t in range(3) for k in range(5)]
        lines += [(k, 2, 1) for k in range(5)] + [(k, t, 0) for t in (3, 4) for k in range(5)]
        assert charged(folder) == lines
        for client in range(5):
            first, second = (
                r for r in ledgers.read(folder)[1] if (r.client, r.round) == (client, 2)
            )
            assert first.binding != second.binding
            assert first.digest != second.digest
        assert {r.steps for r in ledgers.report(folder).values()} == {6}


def test_a_simulated_run_has_fresh_noise_too_when_it_goes_on_in_one_process(two, tmp_path):
    # Its noise would otherwise be that of the interrupted round, on sums with other low bits.
    shutil.copytree(two / "client+local", tmp_path, dirs_exist_ok=True)
    go(str(tmp_path), **(CASES["client+local"] | {"rounds": 4, "resume": True}))
    go(str(tmp_path / "whole"), **(CASES["client+local"] | {"rounds": 4}))
    last = [ledgers.read(f)[1][-5:] for f in (tmp_path, tmp_path / "whole")]
    for mine, other in zip(*last, strict=True):
        assert (mine.client, mine.round) == (other.client, other.round)
        assert mine.binding != other.binding


@pytest.mark.slow
def test_two_processes_go_on_as_three(two, tmp_path):
    for name in ("short", "stopped"):
        shutil.copytree(two / name, tmp_path / name)
    jobs = [
        INTERRUPTED | {"folder": str(tmp_path / n), "resume": True} for n in ("short", "stopped")
    ]
    launch(tmp_path, jobs, 3)
    assert charged(tmp_path / "short") == [(k, t, 0) for t in range(5) for k in range(5)]
    assert [c for c in charged(tmp_path / "stopped") if c[1] == 2] == [
        (k, 2, attempt) for attempt in (0, 1) for k in range(5)
    ]
