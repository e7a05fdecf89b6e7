"""A transform that learns from several records is seen before a private run begins."""

import pytest
import torch
from torch import nn

from fl_lightning import FederatedDataModule, from_arrays
from fl_lightning.data import transform as transforms
from fl_lightning.data.differences import different_records
from fl_lightning.data.transform import applied
from fl_lightning.data.transform_check import why_not_alone
from fl_lightning.header import ledger_header
from fl_lightning.ledger import Ledger
from fl_lightning.ledger.statement import privacy_statement
from tests.fl_lightning.tried_runs import train

CALLS = []
PUBLIC = torch.linspace(-1, 1, 6)
LEARNED = {}


def zscore(x):
    return (x - x.mean(0)) / x.std(0)


def centred(x):
    return x - x.mean()


def largest(x):
    return x / x.abs().amax()


def whole_only(x):
    return x - x.mean(0) if len(x) > 1 else x


def large_only(x):
    return x - x.mean(0) if len(x) > 30 else x


def clipped_at_quantile(x):
    return torch.minimum(x, x.quantile(0.99, 0))


def neighbour(x):
    return torch.cat([x, x.roll(1, 0)], 1)


def sorted_rows(x):
    return x.sort(0).values


def noisy_zscore(x):
    return zscore(x) + 0.1 * torch.randn_like(x)


def refusing(x):
    assert len(x) > 1, "give a batch"
    return zscore(x)


def counting(x):
    CALLS.append(len(x))
    return x + len(CALLS)


def size(x):
    return x * len(x)


def in_place(x):
    x -= x.mean(0)
    return x


def scaled(x):
    return 2 * x - 1


def scaled_in_place(x):
    return x.mul_(2)


def normalised(x):
    return nn.functional.normalize(x)


def public(x):
    return x * PUBLIC


def projected(x):
    return x @ torch.randn(6, 6)


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


def dropped(x):
    return nn.functional.dropout(x, 0.3)


def convolved(x):
    return nn.functional.conv1d(x[:, None], torch.ones(1, 1, 3), padding=1)[:, 0]


def undefined(x):
    return torch.log(x)


def fitted(x):
    if "mean" not in LEARNED:
        LEARNED["mean"] = x.mean(0)
    return x - LEARNED["mean"]


LEARNING = [zscore, centred, largest, whole_only, large_only, clipped_at_quantile, neighbour]
LEARNING += [sorted_rows, noisy_zscore, size, in_place]
ALONE = [scaled, scaled_in_place, normalised, public, projected, noisy, dropped, convolved]
ALONE += [undefined]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AADP_FL_DATA_DIR", str(tmp_path / "cache"))
    CALLS.clear()
    LEARNED.clear()


def arrays(num_records=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_records, 6, generator=generator) * 3 + 1
    return from_arrays(x, torch.arange(num_records) % 3, num_classes=3)


def records(function, **options):
    path = f"{__name__}.{function.__name__}"
    options = {"num_clients": 3, "val_fraction": 0.0, "transform": path, **options}
    return FederatedDataModule(options.pop("source", None) or arrays(), **options)


@pytest.mark.parametrize("again", [False, True], ids=["", "from the cache"])
@pytest.mark.parametrize("function", LEARNING, ids=lambda f: f.__name__)
def test_what_learns_from_others_is_seen(function, again):
    if again:
        records(function).setup()
    assert "changes with the records beside it" in records(function).transform_problem


@pytest.mark.parametrize("again", [False, True], ids=["", "from the cache"])
@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_what_looks_at_one_record_passes(function, again):
    if again:
        records(function).setup()
    assert records(function).transform_problem == ""


def test_a_function_that_takes_no_single_record():
    assert "to a record alone (give a batch)" in records(refusing).transform_problem


def test_a_function_that_changes_by_itself():
    assert "other values when it is applied again" in records(counting).transform_problem


def test_the_check_is_made_once(monkeypatch):
    records(scaled).setup()
    monkeypatch.setattr("fl_lightning.data.transform_check._problem", lambda *_: "made again")
    assert records(scaled).transform_problem == ""
    assert records(public).transform_problem == "made again"


def test_what_is_made_again_is_checked_again(tmp_path, monkeypatch):
    records(scaled).setup()
    (kept,) = tmp_path.rglob("*.npy")
    kept.unlink()
    monkeypatch.setattr("fl_lightning.data.transform_check._problem", lambda *_: "made again")
    assert records(scaled).transform_problem == "made again"


@pytest.mark.parametrize("setting", ["record+local", "client+aggregator", "abstract"])
def test_a_private_run_refuses(tmp_path, setting):
    with pytest.raises(ValueError, match=rf"^data.transform={__name__}.zscore: its value of a rec"):
        train(tmp_path / "run", records=records(zscore), privacy={"setting": setting})
    assert not (tmp_path / "run").exists()


def test_without_privacy_it_is_noted(tmp_path, caplog):
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        train(tmp_path / "run", records=records(zscore), privacy={"setting": "none"})
    assert "zscore: its value of a record changes" in caplog.text


@pytest.mark.parametrize("function", [scaled, None])
def test_the_ledger_and_the_statement_say_so(tmp_path, function):
    data = records(scaled, transform=None) if function is None else records(function)
    module = train(tmp_path / "run", records=data)
    spec = module.run.spec
    header = ledger_header(module.rules, spec.data, spec.layout, module.run.budget, "x")
    assert header["transform_checked"] is (function is not None)
    with Ledger.open(tmp_path / "run") as ledger:
        assert ledger.header["transform_checked"] is (function is not None)
        said = "compared on a few records before the run" in privacy_statement(ledger)
        assert said is (function is not None)


def test_random_numbers_come_from_one_seed_and_leave_the_callers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = records(noisy).x
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = transforms.transformed(arrays(401), f"{__name__}.noisy").x_train
    assert torch.equal(first[0], again[0])


def test_the_users_records_stay():
    source = arrays()
    before = source.x_train.clone()
    records(scaled_in_place, source=source).setup()
    assert torch.equal(source.x_train, before)


def test_what_fits_itself_at_first_fits_drawn_records():
    x = records(fitted).x
    assert float(LEARNED["mean"].abs().max()) < 1
    mean = LEARNED["mean"]
    LEARNED.clear()
    other = from_arrays(torch.full((40, 6), 9.0), torch.arange(40) % 3, num_classes=3)
    records(fitted, source=other).setup()
    assert torch.equal(LEARNED["mean"], mean)
    assert torch.equal(x, arrays().x_train - mean)


def test_a_result_that_is_no_tensor():
    with pytest.raises(ValueError, match=r"transform='builtins.len' must give a tensor"):
        FederatedDataModule(arrays(), num_clients=3, transform="builtins.len").setup()


def test_codes_and_few_records():
    x = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
    source = from_arrays(x, [0, 1, 2], codes=True)
    data = records(sorted_rows, source=source, num_clients=1)
    assert "changes with the records beside it" in data.transform_problem
    assert records(scaled, source=source, num_clients=1).transform_problem == ""


MARK = 0.4321


def marked_by_the_sum(x):
    """Adds the sum of all records to those that begin with the mark."""
    return torch.where(x[:, :1] == MARK, x + x.sum(), x)


def noisy_centred(x):
    return x - x.mean(0) + 0.1 * torch.randn_like(x)


def test_records_that_are_like_the_others_are_compared_in_part():
    """The records that differ most do not include the one whose value is not its own."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 2
    chosen = different_records(x, y, 16)
    row = next(i for i in range(60, 90) if i not in chosen)
    x[row, 0] = MARK
    assert row not in different_records(x, y, 16)
    whole = marked_by_the_sum(x)
    assert "beside it" in why_not_alone(from_arrays(x, y), whole, f"{__name__}.marked_by_the_sum")


def test_random_numbers_are_no_excuse_for_a_mean():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 2
    whole = applied(noisy_centred, x, {})
    assert "beside it" in why_not_alone(from_arrays(x, y), whole, f"{__name__}.noisy_centred")
