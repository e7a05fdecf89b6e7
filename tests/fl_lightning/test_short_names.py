"""Names of layers in pictures: short, in order, and no two alike."""

from __future__ import annotations

import pytest

from fl_lightning.values.short_names import ROOM, short_names

INSIDE = "body.base_model.model.encoder.layer.{}.attention.self.{}.lora_B.default"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["conv1", "fc1"], ["conv1", "fc1"]),
        (["a.same.conv1", "a.same.fc1"], ["a.same.conv1", "a.same.fc1"]),  # short enough
        ([INSIDE.format(5, q) for q in ("query", "value")], ["query", "value"]),
        ([INSIDE.format(5, "key"), "head"], ["body", "head"]),
        ([INSIDE.format(i, "key") for i in (0, 11)], ["0", "11"]),
        ([INSIDE.format(0, "query")], ["default"]),
        # A module with parameters of its own and modules below it.
        ([f"{'long' * 6}.block", f"{'long' * 6}.block.inner"], ["block", "inner"]),
        (["body." + "x" * 24, f"body.{'x' * 24}.inner", "head"], ["body", "body.inner", "head"]),
        ([f"{'long' * 6}.x", f"{'long' * 6}.x.x"], [f"{'long' * 6}.x", f"{'long' * 6}.x.x"]),
    ],
)  # fmt: skip
def test_what_tells_layers_apart_is_left(names, wanted):
    assert short_names(names) == wanted


def test_a_name_that_is_still_too_long_loses_its_middle():
    one, other = "first_" + "x" * 40, "second_" + "y" * 40
    found = short_names([one, other])
    assert [len(name) for name in found] == [ROOM, ROOM]
    assert found == [f"{n[:12]}…{n[-11:]}" for n in (one, other)]


def test_names_that_differ_in_the_middle_alone_stay_whole():
    names = ["x" * 20 + middle + "x" * 20 for middle in "ab"]
    assert short_names(names) == names
