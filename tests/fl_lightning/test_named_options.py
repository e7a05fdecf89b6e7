"""The text that noise of a public seed is bound to: it must never change."""

from dataclasses import fields, replace

import pytest

from fl_lightning import PrivacyConfig
from fl_lightning.privacy.comparators import Comparator
from fl_lightning.privacy.named_options import flat_options, named_options

BEFORE = (
    "PrivacyConfig(setting='record+local', mechanism='gaussian', adjacency='default', epsilon=8.0, "
    "delta=1e-05, noise_multiplier=None, clip_order=None, clip_norm=1.0, thresholds='default', "
    "quantile=0.5, quantile_lr=0.2, vote_share=0.05, clip_factor=1.0, history=10, "
    "allocation='default', share_floor=0.1, seed=None, rng='chacha20')"
)
PUBLISHED = (
    "PrivacyConfig(setting='abstract', mechanism='gaussian', adjacency='default', epsilon=8.0, "
    "delta=1e-05, noise_multiplier=None, clip_order=None, clip_norm=1.0, thresholds='raw', "
    "quantile=0.5, quantile_lr=0.2, vote_share=0.05, clip_factor=1.0, clipping='flat', history=10, "
    "history_rule='median', history_cosine=True, allocation='default', share_floor=0.1, "
    "cohort_sampling='fixed', nominal_sensitivity='records', seed=7, noise_form='fast', "
    "rng='chacha20')"
)
OTHER = {
    "clipping": "flat", "clip_function": "automatic", "votes_on": "clipped", "history_rule": "ema",
    "history_cosine": True, "nominal_sensitivity": "records",
}  # fmt: skip


def test_known_texts():
    assert named_options(PrivacyConfig()) == BEFORE
    config = PrivacyConfig(
        setting="abstract", thresholds="raw", clipping="flat", cohort_sampling="fixed", seed=7,
        noise_form="fast", comparator=Comparator(
            history_rule="median", history_cosine=True, nominal_sensitivity="records"
        ),
    )  # fmt: skip
    assert named_options(config) == PUBLISHED


@pytest.mark.parametrize("name", flat_options(PrivacyConfig()))
def test_every_option_is_bound(name):
    config = replace(PrivacyConfig())  # a copy; its checks are none of this test's matter
    target = config.comparator if name in {f.name for f in fields(Comparator)} else config
    target = replace(target)
    object.__setattr__(target, name, OTHER.get(name, "another"))
    if isinstance(target, Comparator):
        object.__setattr__(config, "comparator", target)
    else:
        config = target
    assert named_options(config) != BEFORE
    assert f"{name}={OTHER.get(name, 'another')!r}" in named_options(config)
