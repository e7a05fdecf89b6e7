"""Targets that are no classes: numbers, several labels a record, tokens; and metrics of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC, MulticlassF1Score
from torchmetrics.regression import MeanSquaredError

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.networks.metrics import computed, named_metrics, update_metrics
from fl_lightning.networks.outputs import record_loss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=GENERATOR)


def run(tmp_path, network, arrays, loss=None, metrics=None, **options):
    data = FederatedDataModule(arrays, num_clients=3, val_fraction=0.2, **options)
    module = FederatedModule(
        network,
        PrivacyConfig(epsilon=8.0, delta=1e-2),
        sampling_rate=0.5,
        client_lr=0.5,
        execution="loop",
        loss=loss,
        metrics=metrics,
        run_dir=str(tmp_path),
    )
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    with torch.no_grad():
        return found, module.network(data._prepared.arrays.x_test)


def test_regression(tmp_path):
    y = X.sum(1)
    arrays = from_arrays(X, y, X, y, targets="values")
    loss = nn.MSELoss(reduction="none")
    found, outputs = run(tmp_path, nn.Linear(4, 1), arrays, loss, MeanAbsoluteError())
    assert set(found) == {"test/loss", "test/MeanAbsoluteError"}
    assert found["test/loss"] == pytest.approx(float((outputs[:, 0] - y).square().mean()), rel=1e-5)
    want = float((outputs[:, 0] - y).abs().mean())
    assert found["test/MeanAbsoluteError"] == pytest.approx(want, rel=1e-5)


def test_several_labels_a_record(tmp_path):
    y = (X[:, :3] > 0).numpy()
    arrays = from_arrays(X, y, X, y, targets="values")
    loss = nn.BCEWithLogitsLoss(reduction="none")
    found, outputs = run(tmp_path, nn.Linear(4, 3), arrays, loss)
    want = nn.functional.binary_cross_entropy_with_logits(outputs, arrays.y_test)
    assert found["test/loss"] == pytest.approx(float(want), rel=1e-5)


class NextWord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, x):
        return self.head(self.words(x))


def test_a_record_is_a_sequence_of_tokens(tmp_path):
    ids = torch.randint(0, 9, (60, 5), generator=GENERATOR)
    y = ids.roll(-1, 1)
    y[:, -1] = -100
    y[3] = -100  # nothing of this record counts
    arrays = from_arrays(ids, y, ids, y, codes=True, targets="values")
    metric = MulticlassF1Score(9, ignore_index=-100)
    loss = nn.CrossEntropyLoss(reduction="none")
    found, outputs = run(tmp_path, NextWord(), arrays, loss, {"f1": metric})
    assert set(found) == {"test/loss", "test/f1"}
    each = nn.functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="none")
    want = each.sum(1) / (y != -100).sum(1).clamp(min=1)
    assert found["test/loss"] == pytest.approx(float(want.mean()), rel=1e-5)


def test_metrics_of_classes_beside_the_accuracy(tmp_path):
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
    metrics = MetricCollection({"f1": MulticlassF1Score(3), "auroc": MulticlassAUROC(3)})
    found, outputs = run(tmp_path, nn.Linear(4, 3), from_arrays(X, y, X, y), None, metrics)
    assert set(found) == {"test/loss", "test/accuracy", "test/f1", "test/auroc"}
    assert found["test/f1"] == pytest.approx(float(MulticlassF1Score(3)(outputs, y)), rel=1e-5)


def test_logits_between_0_and_1_are_logits():
    """torchmetrics alone would take them for probabilities in this batch, and not in the next."""
    loss = record_loss(nn.BCEWithLogitsLoss(reduction="none"))
    metrics = named_metrics(BinaryAUROC())
    y = torch.tensor([0, 1])
    batches = [torch.tensor([0.05, 0.1]), torch.tensor([-1.0, 2.0])]
    for logits in batches:
        update_metrics(metrics, logits[:, None], y, loss)
    want = BinaryAUROC()(torch.cat(batches).sigmoid(), torch.cat([y, y]))
    assert computed(metrics)["BinaryAUROC"] == want
    alone = BinaryAUROC()
    for logits in batches:
        alone.update(logits, y)
    assert alone.compute() != want


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (MulticlassF1Score(5), "metrics=MulticlassF1Score: they cannot take"),
        (MulticlassF1Score(3, average=None), "MulticlassF1Score gives 3 numbers; a run logs one"),
        ({"loss": MeanSquaredError()}, "'loss' is what a run logs itself"),
        ("f1", "metrics='f1'"),
    ],
)
def test_metrics_that_do_not_fit_are_refused_before_anything_is_charged(tmp_path, metrics, words):
    y = torch.arange(60) % 3
    arrays = from_arrays(X, y, X, y)
    if "5" in str(getattr(metrics, "num_classes", "")):
        metrics = MulticlassF1Score(2)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, nn.Linear(4, 3), arrays, None, metrics)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("y", "options", "words"),
    [
        (np.array([1.0, math.nan, *[0.0] * 58]), {}, "1 of 60 records have NaN"),
        (torch.zeros(60, dtype=torch.complex64), {}, "y_train must be float32 or int64"),
        ([["a"]] * 60, {}, "y_train must hold numbers"),
        (np.zeros(60), {"num_classes": 3}, "num_classes=3 has no meaning"),
    ],
)
def test_values_that_are_none_are_refused(y, options, words):
    with pytest.raises(ValueError, match=words):
        from_arrays(X, y, targets="values", **options)


def test_a_partition_by_class_needs_classes():
    arrays = from_arrays(X, X, targets="values")
    data = FederatedDataModule(arrays, num_clients=2, partition="dirichlet")
    with pytest.raises(ValueError, match=r"targets of shape \[4\] are no classes"):
        data.setup()


def test_a_loss_that_cannot_take_the_targets_says_their_shape(tmp_path):
    arrays = from_arrays(X, X, X, X, targets="values")
    with pytest.raises(ValueError, match=r"loss=PerRecord.*float32 targets of shape \(4,\)"):
        run(tmp_path, nn.Linear(4, 3), arrays, nn.MSELoss(reduction="none"))
