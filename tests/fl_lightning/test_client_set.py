"""Sets of client ids as text."""

import numpy as np
import pytest

from fl_lightning.values.client_set import decode, encode


def test_every_set_comes_back_in_its_shorter_spelling() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 8, 9, 64, 2000):
        for part in (0.01, 0.2, 0.5, 0.95, 1.0):
            ids = np.flatnonzero(generator.random(size) < part)
            if len(ids):
                text = encode(ids)
                assert decode(text).tolist() == ids.tolist()
                assert len(text) <= 5 + 4 * (size // 24 + 1)
    assert encode(np.arange(2000)) == "0-1999"
    assert encode(np.array([0, 1, 2, 5])) == "0-2,5"
    assert encode(np.arange(0, 2000, 2)).startswith("bits:VVVV")


@pytest.mark.parametrize(
    "text",
    ["", "1,0", "0,0", "0-0", "0,1", "3-1", "a", "-1", "0-2,3", "bits:", "bits:AA==", "bits:AQ==",
     "bits:!", "0-99999999999999", "00", " 1", "0-1-2"],
)  # fmt: skip
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="clients must be a set of ids as text"):
        decode(text)


@pytest.mark.parametrize("ids", [[], [1, 1], [2, 1], [-1, 0]])
def test_what_is_no_ascending_set_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending ids"):
        encode(np.array(ids, dtype=np.int64))
