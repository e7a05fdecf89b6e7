"""The order of a plan in a model of the L2 cache: what is read twice comes from the cache."""

from __future__ import annotations

import pytest
import torch

from aadp_kernels import Layout

pytest.importorskip("triton")
from aadp_kernels._triton import launch_plan
from bench.cache_model import (
    CAPACITIES,
    FIRST,
    LAST,
    NORMAL,
    PIECE,
    Cache,
    forward,
    least,
    tables_of,
    traffic,
)
from bench.cases import CASES

MB = 1 << 20
LARGE = ("gpt2", "bert_base", "llama_slice")


def modelled(name, megabytes, share=launch_plan.WINDOWS_IN_L2, **options):
    layout = CASES[name].layout()
    return layout, traffic(tables_of(layout, megabytes * MB // share), megabytes * MB, **options)


@pytest.mark.parametrize("megabytes", CAPACITIES)
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "bert_base", "llama_slice")),
    ],
)
def test_nothing_is_read_twice_that_the_cache_could_hold(name, megabytes):
    for in_place in (True, False):
        layout, found = modelled(name, megabytes, in_place=in_place)
        assert found.bytes_per_element <= least(layout, megabytes * MB) + 0.01
        assert found.waiting == 0


@pytest.mark.parametrize("name", ["resnet50", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("megabytes", CAPACITIES)
def test_nor_by_a_cache_that_takes_no_hints(name, megabytes):
    layout, found = modelled(name, megabytes, hints=False)
    assert found.bytes_per_element <= least(layout, megabytes * MB) + 0.02


def test_gpt2_moves_less_than_nine_bytes_an_element():
    layout, found = modelled("gpt2", 50)
    assert found.bytes_per_element < 8.83
    # A window of two thirds of the cache, applied from the beginning, is as bad as two launches.
    wide = forward(tables_of(layout, 32 * MB))
    assert traffic(wide, 50 * MB, hints=False).bytes_per_element > 11.8
    # Half a cache that holds everything twice still does most of it.
    narrow = tables_of(layout, 50 * MB // launch_plan.WINDOWS_IN_L2)
    assert traffic(narrow, 25 * MB).bytes_per_element <= least(layout, 25 * MB) + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("programs", [528, 1056])
def test_many_programs_at_once_seldom_wait(programs):
    _, found = modelled("gpt2", 50, programs=programs, piece=PIECE)
    assert found.bytes_per_element < 8.85
    assert found.waiting < 0.05


def test_all_programs_hold_less_than_a_window():
    """Of a GPU with 50 MB of cache, 132 multiprocessors and 8 programs on each, in float32."""
    assert 2 * 50 * MB // launch_plan.WINDOWS_IN_L2 > 132 * 8 * launch_plan.CHUNK * 4


def test_units_larger_than_the_window_are_applied_from_their_end():
    layout = Layout.build([torch.empty(n * launch_plan.CHUNK, device="meta") for n in (9, 2, 5)])
    tables = tables_of(layout, 4 * launch_plan.CHUNK * 4)
    applied = [c >> 2 for c in tables["tickets"].tolist() if c & 3 == launch_plan.APPLY]
    assert [c for c in applied if c < 9] == [*range(8, -1, -1)]
    assert [c for c in applied if 9 <= c < 11] == [9, 10]
    assert [c for c in applied if c >= 11] == [15, 14, 13, 12, 11]
    codes = forward(tables)["tickets"].tolist()
    assert [c >> 2 for c in codes if c & 3 == launch_plan.APPLY][:9] == [*range(9)]


def test_the_window_is_a_share_of_the_cache_of_the_device(monkeypatch):
    class Properties:
        L2_cache_size = 50 * MB

    device = torch.device("cuda", 63)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert launch_plan.window_of(device) == 50 * MB // 4
    assert launch_plan.window_of(torch.device("cpu")) == launch_plan.WINDOW


def test_the_model_of_the_cache():
    cache = Cache(3)
    assert [cache.touch(name, 1, NORMAL) for name in "abcab"] == [False, False, False, True, True]
    assert not cache.touch("d", 1, NORMAL)  # c was used longest ago
    assert [cache.touch(name, 1, NORMAL) for name in "abd"] == [True, True, True]
    cache.touch("d", 1, FIRST)
    cache.touch("a", 1, LAST)
    assert not cache.touch("e", 1, NORMAL)  # d goes, though it was used after b
    assert not cache.touch("f", 1, NORMAL)  # then b, and a stays
    assert [cache.touch(name, 1, NORMAL) for name in "aef"] == [True, True, True]
