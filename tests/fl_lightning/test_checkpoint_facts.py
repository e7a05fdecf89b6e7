"""The facts of a checkpoint, read without torch, beside what torch reads."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_lightning.ledger.checkpoint_facts import PRIVACY, StoredTensor, privacy_facts


def saved(path: Path, facts: Any, **others: Any) -> Path:
    torch.save({"epoch": 1, PRIVACY: facts, **others}, path)
    return path


def test_tensors_are_those_that_torch_reads(tmp_path: Path) -> None:
    base = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    tensors = {
        "whole": base,
        "turned": base.transpose(0, 2),
        "part of it": base[1, :, 1::2],
        "one row for all": base[0, 0].expand(5, 4),
        "a number": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
        "few bits": torch.arange(3, dtype=torch.float32),
        "integers": torch.arange(3, dtype=torch.int32),
        "coins": torch.tensor([True, False]),
    }
    path = saved(tmp_path / "last.ckpt", {"deep": {"er": [tensors]}})
    (found,) = (privacy_facts(path) or {})["deep"]["er"]
    for name, value in tensors.items():
        have, want = found[name].numpy(), value.numpy()
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        assert np.array_equal(have, want), name


def test_what_is_no_fact_is_neither_read_nor_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LSTM(2, 2))
    optimizer = torch.optim.Adam(network.parameters())
    others = {
        "network": network,
        "state": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trap": Trap(),
        "rest": [torch.float16, torch.Size([2]), torch.device("cpu"), {1, 2}, np.arange(3), 1j],
    }
    facts = {"name": "é", "numbers": [1, 2.5, None, True], "half": torch.zeros(2).bfloat16()}
    found = privacy_facts(saved(tmp_path / "last.ckpt", facts, **others))
    assert found is not None
    assert not (tmp_path / "run").exists()
    half = found.pop("half")
    assert found == {"name": "é", "numbers": [1, 2.5, None, True]}
    assert isinstance(half, StoredTensor)
    with pytest.raises(ValueError, match="BFloat16Storage"):
        half.numpy()
    assert privacy_facts(saved(tmp_path / "none.ckpt", None)) is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole = saved(path, {"a": torch.ones(9)}).read_bytes()
    errors = (OSError, ValueError)
    for wrong in (b"", b"torn", whole[:200], pickle.dumps({PRIVACY: {}})):
        path.write_bytes(wrong)
        with pytest.raises(errors):
            privacy_facts(path)
    with pytest.raises(errors):
        privacy_facts(tmp_path / "missing.ckpt")
    for text in (b"", b"no pickle", pickle.dumps([1]), b"\x80\x02Q."):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", text)
        with pytest.raises(errors):
            privacy_facts(path)
    with pytest.raises(ValueError, match="aadp_fl is a"):
        privacy_facts(saved(path, torch.float16))
    with pytest.raises(ValueError, match="has 2 numbers"):
        StoredTensor(_Memory([1.0, 2.0]), 0, (1 << 20, 1 << 20), (0, 0)).numpy()
    short = StoredTensor(_Memory([1.0, 2.0]), 0, (3,), (1,))
    with pytest.raises(ValueError, match="has 2 numbers"):
        short.numpy()


class _Memory:
    def __init__(self, values: list[float]) -> None:
        self.values = np.array(values)

    def read(self) -> np.ndarray:
        return self.values
