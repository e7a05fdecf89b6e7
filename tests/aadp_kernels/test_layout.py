"""Grouping of tensors into layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from aadp_kernels import Layout


def test_default_groups_follow_modules():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    layout = Layout.build(dict(model.named_parameters()))
    assert layout.layer_names == ("0", "2")
    assert layout.layer_of == (0, 0, 1, 1)
    assert layout.sizes == (18, 2, 24, 3)
    assert layout.offsets == (0, 18, 0, 24)
    assert layout.dims == (20, 27)
    assert layout.members == ((0, 1), (2, 3))
    assert hash(layout) == hash(Layout.build(dict(model.named_parameters())))


def test_unnamed_names_without_dot_and_scalars():
    layout = Layout.build([torch.zeros(2, 3), torch.zeros(())])
    assert layout.num_layers == 2
    assert layout.dims == (6, 1)
    assert Layout.build({"scale": torch.zeros(4)}).layer_names == ("scale",)


def test_explicit_groups():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    layout = Layout.build(tensors, {"a": "x", "b": "y", "c": "x"})
    assert layout.layer_of == (0, 1, 0)
    assert layout.offsets == (0, 0, 2)
    assert Layout.build(list(tensors.values()), [1, 0, 1]).dims == (3, 6)


@pytest.mark.parametrize(
    ("tensors", "groups"),
    [
        ([], None),
        ({"a": torch.zeros(1)}, {}),
        ({"a": torch.zeros(1)}, {"a": "x", "b": "x"}),
        ([torch.zeros(1), torch.zeros(1)], [0]),
        ([torch.zeros(1), torch.zeros(1)], [0, 2]),
        ([torch.zeros(1)], [-1]),
    ],
)
def test_bad_groups(tensors, groups):
    with pytest.raises(ValueError, match=r"tensors|groups|layer_of"):
        Layout.build(tensors, groups)


def test_a_layout_finds_itself_after_a_journey():
    layout = Layout.build({"a.weight": torch.zeros(2), "b": torch.zeros(())})
    assert "_hash" not in vars(pickle.loads(pickle.dumps(layout)))
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert other == layout
        assert {layout: 1}[other] == 1


def test_complex_tensors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'rotate\.weight' is torch\.complex64"):
        Layout.build(
            {"fc.bias": torch.zeros(2), "rotate.weight": torch.zeros(3, dtype=torch.cfloat)}
        )
