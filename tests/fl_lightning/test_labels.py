"""Labels that are not class numbers from 0: what is wrong and what to do, in one line."""

import numpy as np
import pytest
import torch

from fl_lightning import FederatedDataModule, from_arrays
from fl_lightning.models import MLP
from tests.fl_lightning.tried_runs import train

EYE = np.eye(3)[np.arange(12) % 3]


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (np.arange(12) % 3 + 1, 3, r"=3\): labels go from 1 to 3; number classes from 0 "),
        (np.arange(12) % 3 + 5, 3, r"labels go from 5 to 7; .*take 5 from each label"),
        (np.arange(12) % 2 * 2 - 1, None, r"labels go from -1 to 1; .*\(y \+ 1\) // 2"),
        (np.arange(12) % 5 - 2, None, r"labels go from -2 to 2; number classes from 0$"),
        (np.arange(12) % 4, 3, r"labels go from 0 to 3; give num_classes=4"),
        (np.arange(12.0) % 3, 3, r"torch.float64; they are whole numbers: give y.astype\(int\)"),
        (np.arange(12) / 3, 4, r"give targets=.values. for targets that are no classes"),
        (np.array([0.0, np.nan, *range(10)]), 10, r"1 of 12 are NaN"),
        (np.arange(12) % 2 == 0, 2, r"torch.bool; give y.astype\(int\)"),
        (EYE, 3, r"\[12, 3\]; .*one-hot, give y_train.argmax\(1\)"),
        (EYE.astype(int), 3, r"one-hot"),
        (np.full((12, 2), 2), 3, r"\[12, 2\]; give one label a record$"),
        (np.zeros((12, 1), int), 2, r"give y_train.reshape\(-1\)"),
        (np.array([0, None] * 6, object), 2, r"y_train must hold integers, .*array of object"),
        (3, 4, r"y_train must be \[N\]"),
    ],
)  # fmt: skip
def test_labels_that_are_refused(labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(np.zeros((12, 2)), labels, num_classes=num_classes)


def test_labels_from_1_with_as_many_outputs_as_classes(tmp_path):
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 10 + 1
    records = FederatedDataModule(from_arrays(x, y), num_clients=3, val_fraction=0.0)
    message = "10 outputs a record, .*num_classes=11.*labels go from 1 to 10: number classes from 0"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", network=MLP(6, 10), records=records)
    assert not (tmp_path / "run").exists()
