"""What importing the package costs and brings in."""

import subprocess
import sys

import aadp_kernels


def test_import_is_light():
    code = (
        "import torch, sys, time; start = time.perf_counter(); import aadp_kernels; "
        "assert time.perf_counter() - start < 2; "
        "loaded = {'triton', 'numba', 'fl_lightning', 'scipy'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_noise_costs_is_told_without_torch():
    code = (
        "import sys; from aadp_kernels import MECHANISMS, max_elements, tail_cutoff, vote_noise; "
        "from aadp_kernels.grid_law import inexactness; "
        "assert tail_cutoff('gaussian') > 9; "
        "assert inexactness('laplace', 9)[0] > 0; "
        "import aadp_kernels; assert {'privatize_', 'sample_noise'} < set(dir(aadp_kernels)); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    assert sorted(aadp_kernels.__all__) == sorted(set(aadp_kernels.__all__))
    assert sorted(aadp_kernels.__all__) == sorted(aadp_kernels._HOMES)
    for name in aadp_kernels.__all__:
        assert getattr(aadp_kernels, name).__doc__


def test_import_without_triton_and_numba():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['numba'] = None; "
        "import torch, time; start = time.perf_counter(); import aadp_kernels as k; "
        "assert time.perf_counter() - start < 2; "
        "key = k.NoiseKey.from_seed(0); "
        "noise = k.sample_noise((200,), mechanism='gaussian', scale=1.0, key=key, step=0); "
        "assert 0.5 < noise.std() < 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
