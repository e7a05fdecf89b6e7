"""The benchmarks: layer tables, and gates that can fail."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import (
    cases,
    child,
    dp_step,
    kernels,
    measure,
    ours,
    parity,
    peers,
    report,
    step_peers,
    worker,
)
from bench import steps as private_steps
from bench.contender import Contender, Local, gate
from bench.problem import Problem
from fl_lightning.models import CNN, MLP

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = cases.Case(
    "small", lambda: {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (9, 100)}, clients=4
)


@pytest.mark.parametrize(
    ("table", "count", "tensors"),
    [
        (cases.resnet((2, 2, 2, 2), False), 11_689_512, 62),
        (cases.resnet((3, 4, 6, 3), True), 25_557_032, 161),
        (cases.vit_b16(), 86_567_656, 152),
        (cases.bert_base(), 109_482_240, 199),
        (cases.gpt2_small(), 124_439_808, 148),
        (cases.llama_3_8b(), 8_030_261_248, 291),
        (cases.lora_llama_3_8b(8), 20_971_520, 448),
    ],
    ids=["resnet18", "resnet50", "vit_b16", "bert_base", "gpt2", "llama", "lora"],
)
def test_tables_have_the_published_counts(table: cases.Table, count: int, tensors: int) -> None:
    assert sum(map(prod, table.values())) == count
    assert len(table) == tensors


def test_the_projects_tables_are_its_models() -> None:
    cnn = CNN(image_size=28, channels=[16, 32], kernel_sizes=[6, 4], strides=[2, 2], hidden=[])
    mlp = MLP(in_features=784, hidden=[64])
    for table, model in ((cases.project_cnn(), cnn), (cases.project_mlp(), mlp)):
        assert table == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_groups_of_a_table_are_modules() -> None:
    layout = cases.CASES["resnet18"].layout()
    assert layout.num_layers == 41
    assert layout.layer_names[:2] == ("conv1", "bn1")


def unit_noise(mechanism: str, n: int = 4000) -> Tensor:
    torch.manual_seed(3)
    if mechanism == "gaussian":
        return torch.randn(n)
    return torch.distributions.Laplace(0.0, 1.0).sample((n,))


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_noise_check_accepts_right_and_rejects_wrong(mechanism: str) -> None:
    z = unit_noise(mechanism)
    parity.check_noise(z, mechanism)
    wrong = {
        "2/3": z * 2 / 3,
        "3/2": z * 3 / 2,
        "shifted": z + 0.3,
        "repeated": torch.cat([z[:2000], z[:2000]]),
        "nan": z.clone().index_fill_(0, torch.tensor([5]), torch.nan),
        "too few": z[:500],
        "the other mechanism": unit_noise("gaussian" if mechanism == "laplace" else "laplace"),
    }
    for value in wrong.values():
        with pytest.raises(parity.ParityError, match="noise"):
            parity.check_noise(value, mechanism)


def test_clip_and_specification_checks_reject() -> None:
    x = torch.linspace(0.1, 1, 50)
    parity.check_clip({0: x}, {0: x.double()}, 1e-5)
    with pytest.raises(parity.ParityError, match="tensor 0"):
        parity.check_clip({0: 1.001 * x}, {0: x.double()}, 1e-5)
    zero = torch.zeros(50, dtype=torch.float64)
    parity.check_same(x, x.double(), zero, 0.1)
    with pytest.raises(parity.ParityError, match="specification"):
        parity.check_same(x + 1e-5, x.double(), zero, 0.1)


def broken(**change: float) -> Callable[[Problem], Local]:
    """An eager loop that clips or draws noise wrongly."""

    def build(problem: Problem) -> Local:
        right = peers._eager(problem)

        def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
            if change.get("frozen"):
                torch.manual_seed(0)
            right(tensors, change.get("noise", 1.0) * scale, step)
            for tensor in tensors:
                tensor.mul_(change.get("factor", 1.0))
            if change.get("skip"):
                tensors[-1].copy_(problem.tensors[-1])
            return tensors

        return Local(problem, body)

    return build


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    "change",
    [{"noise": 2 / 3}, {"noise": 3 / 2}, {"factor": 0.99}, {"skip": 1.0}, {"frozen": 1.0}],
    ids=str,
)
def test_gate_rejects_a_wrong_peer(p: int, change: dict[str, float]) -> None:
    torch.manual_seed(1)
    problem = Problem.build(SMALL, CPU, p=p, mechanism="laplace" if p == 1 else "gaussian")
    good = Contender("eager", "peer", "layer", broken())
    assert gate(good, good.build(problem), problem, 10**6) == "statistics"
    bad = Contender("eager", "peer", "layer", broken(**change))
    runner, entry = kernels.prepare(bad, problem)
    assert runner is None
    assert entry["skipped"].startswith("wrong result")
    runner, entry = kernels.prepare(Contender("eager", "ours", "layer", bad.build), problem)
    assert runner is None
    assert entry["failed"].startswith("wrong result")


def test_gate_knows_what_one_norm_covers() -> None:
    """A clip of single tensors does not pass for one of layers, nor the other way round."""
    problem = Problem.build(SMALL, CPU, p=1, mechanism="laplace")
    runner = Local(problem, peers._eager(problem))
    for level in ("tensor", "all"):
        with pytest.raises(parity.ParityError, match="clip"):
            gate(Contender("eager", "peer", level, broken()), runner, problem, 10**6)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
@pytest.mark.parametrize("reference", [False, True])
def test_ours_and_the_plain_peers_pass(summed: bool, mechanism: str, reference: bool) -> None:
    torch.manual_seed(2)
    problem = Problem.build(
        SMALL, CPU, p=1 if mechanism == "laplace" else 2, mechanism=mechanism,
        reference=reference and not summed, summed=summed,
    )  # fmt: skip
    mine = ours.contenders(problem, ("philox10", "chacha20"))
    names = {side.name.split(",")[1].strip() for side in mine}
    assert {"wide", "fast"} <= names
    plain = [s for s in peers.contenders(problem) if "eager" in s.name]
    for side in [*mine, *plain]:
        compared = gate(side, side.build(problem), problem, 10**6)
        assert (compared == "specification") == (side.spec is not None)


def test_foreach_peer_passes() -> None:
    torch.manual_seed(2)
    problem = Problem.build(SMALL, CPU, p=1, mechanism="laplace", reference=True)
    side = next(s for s in peers.contenders(problem) if s.name == "foreach")
    assert gate(side, side.build(problem), problem, 10**6) == "statistics"


def test_least_bytes_count_the_operation() -> None:
    n = 4 * (1200 + 40 + 900)
    whole = Problem.build(SMALL, CPU, p=1, mechanism="laplace", reference=True)
    assert whole.least_bytes() == 4 * (2 * n) + 4 * (n // 4)
    summed = Problem.build(SMALL, CPU, p=1, mechanism="laplace", summed=True, rows=8)
    assert summed.least_bytes() == 4 * (2 * n) + 4 * (2 * n) // 8


def test_sides_take_turns() -> None:
    seen: list[str] = []

    def timer(name: str) -> measure.Timer:
        return lambda: (seen.append(name), 2.0 if name == "b" else 1.0)[1]

    samples = measure.interleaved({n: timer(n) for n in "abc"}, 40, 60.0)
    repeats = ["".join(seen[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(repeat) == [*"abc"] for repeat in repeats)
    # A rotation would leave each side behind the same one in nearly all repeats.
    behind = Counter(pair for repeat in repeats for pair in (repeat[:2], repeat[1:]))
    assert min(behind[a + b] for a, b in itertools.permutations("abc", 2)) >= 7
    assert measure.ratios(samples["b"], samples["a"]) == (2.0, 2.0, 2.0)
    assert len(measure.interleaved({"a": timer("a")}, 50, 0.0)["a"]) == 3
    assert measure.quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 1.8, 4.2)


def test_time_memory_and_launches_of_a_call() -> None:
    done = []
    clock = measure.timer(lambda: time.sleep(0.02), CPU, before=lambda: done.append(1))
    assert 0.02 <= clock() < 0.5
    assert done == [1]
    extra = measure.peak_extra(lambda: torch.ones(20_000_000).sum(), CPU)
    if extra is not None:
        assert 60e6 < extra < 120e6
    x = torch.ones(3)
    assert measure.launches(lambda: x.add_(1).mul_(2), CPU) == 2


def test_a_missing_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PYTHON", Path("/nowhere/bin/python"))
    problem = Problem.build(SMALL, CPU, p=1, mechanism="laplace")
    side = next(s for s in peers.contenders(problem) if "pfl" in s.name)
    runner, entry = kernels.prepare(side, problem)
    assert runner is None
    assert "make bench-peers" in entry["skipped"]


def test_a_missing_library_of_the_other_environment_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "PYTHON", Path(sys.executable))
    with pytest.raises(ImportError, match="no_such_peer"):
        child.Child("no_such_peer", str(tmp_path), {}, scale=1.0)


def test_worker_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def peer(x: Tensor) -> tuple[str, Callable[[float], list[list[Tensor]]]]:
        return "1.0", lambda scale: [[x * scale]]

    torch.save({"x": torch.ones(2)}, tmp_path / "problem.pt")
    monkeypatch.setitem(worker.PEERS, "double", peer)
    monkeypatch.setattr(sys, "argv", ["worker", "double", str(tmp_path / "problem.pt")])
    commands = [
        {"do": "run", "scale": 2.0},
        {"do": "results", "scale": 3.0},
        {"do": "run", "scale": "x"},
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(c) + "\n" for c in commands)))
    worker.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0] == {"version": "1.0"}
    assert said[1]["seconds"] >= 0
    path = Path(said[2]["path"])
    assert torch.equal(torch.load(path)[0][0], torch.full((2,), 3.0))
    path.unlink()
    assert "TypeError" in said[3]["error"]


@pytest.mark.parametrize("p", [1, 2])
def test_step_gate_accepts_ours_and_rejects_wrong_steps(p: int) -> None:
    torch.manual_seed(0)
    setup = private_steps.Setup.build("MLP", 12, CPU, p)
    right = lambda s: private_steps.ours(s, "wide", "philox10")  # noqa: E731
    assert dp_step.gate(dp_step.StepRunner(setup, right), "layer") == "equal clipped gradients"

    def noisier(factor: float) -> Callable[[private_steps.Setup], private_steps.Built]:
        def build(own: private_steps.Setup) -> private_steps.Built:
            model, step = right(own)
            return model, lambda scale: step(factor * scale)

        return build

    wrong = {"not clipped": private_steps.plain, "2/3": noisier(2 / 3), "3/2": noisier(3 / 2)}
    for build in wrong.values():
        with pytest.raises(parity.ParityError):
            dp_step.gate(dp_step.StepRunner(setup, build), "layer")
    with pytest.raises(parity.ParityError):
        dp_step.gate(dp_step.StepRunner(setup, right), "tensor")


def test_vmap_peer_passes_on_every_network() -> None:
    for name in ("MLP", "CNN", "transformer"):
        torch.manual_seed(0)
        setup = private_steps.Setup.build(name, 6, CPU)
        runner = dp_step.StepRunner(setup, private_steps.vmap_grad)
        assert dp_step.gate(runner, "layer") == "equal clipped gradients"


def test_a_step_in_another_process_is_gated_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_SELF_PYTHON", sys.executable)
    setup = private_steps.Setup.build("MLP", 8, CPU)
    for variant, wrong in (("", None), ("no noise", "noise")):
        peer = step_peers.StepPeer("self", "tests.step_peer", variant, "layer")
        runner = step_peers.RemoteRunner(setup, peer)
        try:
            assert runner.version == "1.0"
            if wrong is None:
                assert dp_step.gate(runner, "layer") == "equal clipped gradients"
                assert 0 < runner.timer()() < 10
                assert (runner.peak_extra() or 0) >= 0
            else:
                with pytest.raises(parity.ParityError, match=wrong):
                    dp_step.gate(runner, "layer")
        finally:
            runner.close()


def test_steps_whose_environment_is_missing_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BENCH_JAX_PYTHON", "BENCH_OPAKE_PYTHON"):
        monkeypatch.setenv(name, "/nowhere/bin/python")
    setup = private_steps.Setup.build("MLP", 8, CPU)
    found = step_peers.sides(setup)
    peers = {"JAX, vmap by hand", "jax_privacy", "jax_privacy, nan_safe", "Opake"}
    assert {name for name, (kind, _, _) in found.items() if kind == "peer"} == peers
    assert found.keys() - peers == {"JAX, no privacy"}
    for _, _, make in found.values():
        with pytest.raises(ImportError, match="make bench-peers"):
            make(setup)
    assert step_peers.sides(private_steps.Setup.build("MLP", 8, CPU, p=1)) == {}


def test_a_gpu_machine_needs_little_more_than_torch(tmp_path: Path) -> None:
    """Both parts run where nothing is installed that a bare GPU machine lacks."""
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "absent = {'dp_accounting', 'jsonargparse', 'wandb', 'opacus', 'numba', 'matplotlib',\n"
        "          'scipy', 'sklearn', 'pfl', 'hypothesis', 'pandas', 'torchmetrics', 'rich'}\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] not in absent:\n"
        "            return self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
        "import torch\n"
        "from bench import __main__, dp_step, kernels, steps\n"
        "cpu = torch.device('cpu')\n"
        "done = kernels.measure_job(kernels.Job('mlp_100', short=True), cpu, 1.0, True)\n"
        "assert any('seconds' in side for side in done['sides'].values())\n"
        "setup = steps.Setup.build('MLP', 8, cpu)\n"
        "sides = dp_step.measure_setup(setup, 1.0, True)['sides']\n"
        "assert 'opacus' in sides['Opacus, hooks, flat']['skipped']\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_gpu_contenders_pass_under_the_interpreter() -> None:
    """Another window gives the specification's numbers."""
    pytest.importorskip("triton")
    code = (
        "import torch\n"
        "from bench import cases, gpu\n"
        "from bench.contender import Contender, gate\n"
        "from bench.ours import specification\n"
        "from bench.problem import Problem\n"
        "case = cases.Case('small', lambda: {'a.weight': (30, 50), 'b.bias': (300,)}, clients=2)\n"
        "problem = Problem.build(case, torch.device('cpu'), p=1, mechanism='laplace')\n"
        "spec = specification('philox10', 'fast')\n"
        "side = Contender('x', 'peer', 'layer', gpu._window, form='fast', spec=spec)\n"
        "assert gate(side, gpu._window(problem, 8), problem, 10**6) == 'specification'\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_all_parts_run_on_a_gpu(tmp_path: Path) -> None:
    """Every contender of this package passes its gate, CUDA graphs and windows included."""
    command = ["bench", *report.PARTS, "--device", "cuda", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*_quick.json")
    for part in json.loads(path.read_text()).values():
        for case in part["results"].values():
            sides = case["sides"]
            assert not [n for n, s in sides.items() if s["kind"] == "ours" and "seconds" not in s]


def test_cases_whose_packages_are_missing_say_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr("bench.minilm.missing", lambda: "transformers")
    assert dp_step.run(CPU, quick=False, budget=1.0, only="MiniLM") == {}
    assert capsys.readouterr().out.count("skipped, transformers is not installed") == 3
