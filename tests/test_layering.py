"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "aadp_kernels").rglob("*.py"))
FEDERATED = sorted((ROOT / "fl_lightning").rglob("*.py"))
NOISE = {"sample_noise", "privatize_", "clip_sum_noise", "with_clipping", "clipped_linear"}
NOISE |= {
    f"clipped_{n}" for n in ("bias", "conv1d", "embedding", "group_norm", "layer_norm", "rms_norm")
}
NOISE |= {"clipped_conv2d", "noise_scales", "vote_noise", "poisson_mask"}
ALLOWED = {
    "privacy/mechanism.py": {"sample_noise", "privatize_", "clip_sum_noise"},
    "privacy/clipping.py": {"clip_sum_noise", "with_clipping"},
    "privacy/one_factor.py": {"with_clipping"},  # for its checks; it adds no noise
    "privacy/history.py": {"noise_scales", "vote_noise"},
    "ledger/line_checks.py": {"noise_scales", "vote_noise"},  # recomputes scales; adds no noise
    "privacy/noised_sum.py": {"clip_sum_noise", "sample_noise"},
    "privacy/noise_parts.py": {"sample_noise"},
    "privacy/noised_counts.py": {"sample_noise"},
    "local/batches.py": {"poisson_mask"},
    "release/summed.py": {"poisson_mask"},
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import anywhere in a file; name is "" for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).with_suffix("").parts)
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def top(module: str) -> str:
    return module.split(".")[0]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_sources_were_found() -> None:
    assert len(KERNELS) > 10
    assert len(FEDERATED) > 20


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_kernels_know_nothing_of_federated_learning(path: Path) -> None:
    forbidden = {"fl_lightning", "pytorch_lightning", "lightning", "wandb", "dp_accounting"}
    assert not forbidden & {top(module) for module, _ in imports(path)}


@pytest.mark.parametrize("path", FEDERATED, ids=short)
def test_only_callbacks_and_loggers_know_wandb(path: Path) -> None:
    knows = "wandb" in {top(module) for module, _ in imports(path)} or any(
        "Wandb" in name for _, name in imports(path)
    )
    assert knows == (path.name in ("callbacks.py", "loggers.py"))


@pytest.mark.parametrize("path", FEDERATED, ids=short)
def test_noise_comes_from_one_place(path: Path) -> None:
    used = {name for module, name in imports(path) if top(module) == "aadp_kernels"}
    own = path.relative_to(ROOT / "fl_lightning").as_posix()
    assert used & NOISE <= ALLOWED.get(own, set())
    assert not any(module == "aadp_kernels" and not name for module, name in imports(path)) or (
        own == "keys/digests.py"
    )


@pytest.mark.parametrize("path", FEDERATED, ids=short)
def test_no_private_part_of_the_kernels_is_used(path: Path) -> None:
    for module, name in imports(path):
        if top(module) == "aadp_kernels":
            assert module == "aadp_kernels", "import the public names only"
            assert not name.startswith("_")


@pytest.mark.parametrize("path", FEDERATED, ids=short)
def test_randomness_is_seeded(path: Path) -> None:
    """No global generator: noise from keys, public choices from default_rng(seed)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("get_state", "set_state", "getstate", "setstate")):
                continue  # put back what others drew
            if called in ("np.random.seed", "random.seed") and path.name == "transform.py":
                continue  # for a user's function; the caller's state is put back
            assert called not in ("torch.randn", "torch.rand", "torch.randperm", "torch.bernoulli")
            if called == "np.random.default_rng":
                assert node.args, "a generator needs its seed"
            elif not called.startswith("np.random.default_rng("):
                assert not called.startswith(("np.random.", "random."))


def test_importing_the_kernels_is_light() -> None:
    heavy = ("triton", "numba", "pytorch_lightning", "lightning", "wandb", "fl_lightning")
    code = f"import sys, aadp_kernels; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


# aadp_kernels: rooms from the ground up ---------------------------------------------------------

# A file or package imports from rooms below its own, and from nothing else in its own room.
KERNEL_ROOMS = [
    {"_validate", "_eager", "addresses", "layout", "threads"},
    {"_validate_tensors", "sampler_limits", "_late"},
    {"grid_law", "votes"},
    {"contract", "_seen"},
    {"certified", "grid", "_reuse"},
    {"_torch", "_cpu", "_triton"},
    {"_dispatch", "noise_key"},
    {"correlation", "factorization", "warm_up"},
    {"noise"},
    {"privatize", "scales"},
    {"clip_sum"},
    {"clip_in_backward"},
    {"integrations"},
    {"__init__"},
]
KERNEL_FLOOR = {room: floor for floor, rooms in enumerate(KERNEL_ROOMS) for room in rooms}


def kernel_room(path: Path) -> str:
    return path.relative_to(ROOT / "aadp_kernels").with_suffix("").parts[0]


def kernel_imports(path: Path) -> Iterator[str]:
    """Rooms that a file imports from; "__init__" for the public names of the package."""
    for module, name in imports(path):
        if top(module) == "aadp_kernels":
            inside = module.split(".")[1:]
            yield inside[0] if inside else (name if name in KERNEL_FLOOR else "__init__")


def test_every_file_of_the_kernels_has_a_room() -> None:
    assert {kernel_room(path) for path in KERNELS} == set(KERNEL_FLOOR)
    assert sum(map(len, KERNEL_ROOMS)) == len(KERNEL_FLOOR)


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_no_import_of_the_kernels_climbs(path: Path) -> None:
    own = kernel_room(path)
    for room in kernel_imports(path):
        assert room == own or KERNEL_FLOOR[room] < KERNEL_FLOOR[own], f"{own} imports {room}"


def test_the_kernels_have_no_circle_of_imports() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in KERNELS}
    needs = {
        name: {full for m, n in imports(path) for full in (m, f"{m}.{n}") if full in modules}
        for name, path in modules.items()
    }
    while needs:
        ground = {name for name, others in needs.items() if not others & set(needs)}
        assert ground, f"circles among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in ground}
