"""The studies of attacks: cases that differ in their privacy alone, and pages of what was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import inversion, membership, pages
from fl_lightning.attacks import intervals
from fl_lightning.attacks import membership as attack
from fl_lightning.attacks.inversion import ANALYTIC, SEARCH


def test_the_page_shows_the_committed_inversions() -> None:
    found = inversion.results()
    text = pages.written(inversion.PAGE, "inversion")
    assert inversion.image_table(found) in text
    assert inversion.text_table(found) in text
    assert set(found["cases"]) == set(inversion.CASES)


def test_an_image_is_recognised_without_privacy_and_at_no_proven_epsilon() -> None:
    cases = inversion.results()["cases"]
    for case, own in cases.items():
        dense, convolution = own["dense"]["attacks"], own["convolution"]["attacks"]
        found = [a["ssim"] for a in (dense[ANALYTIC], dense[SEARCH], convolution[SEARCH])]
        if case == "without privacy":
            assert min(one["low"] for one in found) >= 0.7
        else:
            assert max(one["high"] for one in found) < 0.2


@pytest.mark.parametrize("case", inversion.CASES)
def test_a_whole_epsilon_is_spent_in_one_release(case: str) -> None:
    module, z = inversion.module_of(inversion.made("dense"), inversion.CASES[case])
    assert (z is None) == (case == "without privacy")
    if z is not None:
        # exp(ε) and δ of one Gaussian need about this much noise; Laplace's is 1/ε.
        epsilon = module.privacy.epsilon
        known = {8.0: (0.5, 0.8), 3.0: (1.2, 1.7), 1.0: (3.0, 4.5)}
        low, high = (0.1, 0.2) if module.privacy.mechanism == "laplace" else known[epsilon]
        assert low < z < high


@pytest.mark.parametrize("case", membership.CASES)
def test_targets_differ_in_privacy_alone(case: str, tmp_path: Path) -> None:
    records = 2 * membership.RECORDS
    x = torch.rand(records, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(records) % 10
    module, data, order = membership.target(case, 3, (x, y), str(tmp_path))
    assert sorted(order) == list(range(records))
    inside = torch.from_numpy(order[: membership.RECORDS])
    assert torch.equal(data.x, x[inside])
    other, _, elsewhere = membership.target(case, 4, (x, y), str(tmp_path))
    assert not np.array_equal(order, elsewhere)
    same = zip(module.network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert (module.rules.sampling_rate, data.num_clients) == (1.0, membership.CLIENTS)
    assert module.privacy.setting == membership.CASES[case].get("privacy.setting", "record+local")


def test_the_page_shows_the_committed_memberships() -> None:
    found = membership.results()
    text = pages.written(membership.PAGE, "membership")
    assert list(found) == list(membership.CASES)
    assert text == f"{membership.membership_table(found)}\n\n{membership.notes(found)}"


def test_members_are_found_without_privacy_and_never_more_than_is_proven() -> None:
    found = membership.results()
    for name in (attack.ONLINE, attack.PASSIVE):
        plain = attack.attack_figures(*membership.pooled(found["without privacy"], name))
        assert plain["auc"]["low"] > 0.7
        assert plain["tpr_at_0.01"]["low"] > 0.1
    for case in found.values():
        for target in case["targets"]:
            if target["ceiling"] is None:
                continue
            for name in membership.NAMES:
                scores = np.array(target["scores"][name])
                half = len(scores) // 2
                for rate in (0.01, 0.1):
                    power = intervals.power(scores[:half], scores[half:], rate)
                    assert power.low <= np.interp(rate, attack.RATES, target["ceiling"][1])
