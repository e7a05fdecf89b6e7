"""Every method of the comparison passes the dry round of today."""

from __future__ import annotations

import pytest

from bench.accuracy import METHODS
from bench.accuracy_runs import build, compose, records


@pytest.mark.parametrize("name", METHODS.values())
def test_the_dry_round_takes_it(name, tmp_path):
    files = ["configs/comparators/digits.yaml", f"configs/comparators/{name}.yaml"]
    private = name != "fedavg"
    config = compose(files, {"privacy.epsilon": 8.0} if private else {})
    module, data, trainer = build(config, records()(config), 0, str(tmp_path))
    module.check(data, trainer)
