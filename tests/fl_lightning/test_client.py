"""Local training of a cohort: batches, masks, gradients, momentum, idle clients."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from aadp_kernels import NoiseKey
from fl_lightning.local.batches import Batch, gather, poisson_rows, shuffled_rows
from fl_lightning.local.execution import bytes_per_example, faster_execution
from fl_lightning.local.gradient import CohortGradient, plain_gradient
from fl_lightning.local.rows import own
from fl_lightning.local.training import train_cohort
from fl_lightning.models import CNN, MLP
from fl_lightning.module import cross_entropy

KEY = NoiseKey.from_seed(5)
CPU = torch.device("cpu")


def params_of(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def records(n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10


def test_poisson_batches_have_the_rate_and_fresh_coins():
    sizes, rate, steps = [4000, 1000], 0.3, 3
    drawn = list(poisson_rows(sizes, rate, steps, key=KEY, clients=[7, 2]))
    assert len(drawn) == steps
    for step in drawn:
        for n, rows in zip(sizes, step, strict=True):
            assert abs(len(rows) - rate * n) < 5 * (n * rate * (1 - rate)) ** 0.5
            assert len(set(rows.tolist())) == len(rows)
            assert 0 <= rows.min() <= rows.max() < n
    both = np.intersect1d(drawn[0][0], drawn[1][0])
    assert abs(len(both) - rate**2 * 4000) < 5 * (4000 * rate**2) ** 0.5
    clients = [set(rows[rows < 1000].tolist()) for rows in drawn[0]]
    assert len(clients[0] & clients[1]) < 150


def test_poisson_coins_are_a_function_of_key_step_and_client():
    (first,), (second,) = (next(poisson_rows([50], 0.5, 1, key=KEY, clients=[c])) for c in (3, 4))
    (again,) = next(poisson_rows([50], 0.5, 1, key=KEY, clients=[3]))
    (other,) = next(poisson_rows([50], 0.5, 1, key=KEY.derive("x"), clients=[3]))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_poisson_rate_one_takes_every_record():
    (rows,) = next(poisson_rows([9], 1.0, 1, key=KEY, clients=[0]))
    assert rows.tolist() == list(range(9))


def test_shuffled_epochs_cover_every_record_once_with_unequal_sizes():
    sizes, batch_size, epochs = [10, 3, 7], 4, 2
    steps = list(shuffled_rows(sizes, batch_size, None, epochs, seeds=[[0, 1], [0, 2], [0, 3]]))
    assert len(steps) == 6
    for client, n in enumerate(sizes):
        a_pass = -(-n // batch_size)
        for epoch in range(epochs):
            part = [steps[epoch * a_pass + i][client] for i in range(a_pass)]
            assert sorted(np.concatenate(part).tolist()) == list(range(n))
            assert max(map(len, part)) <= batch_size
        assert all(len(step[client]) == 0 for step in steps[epochs * a_pass :])


def test_shuffled_steps_are_as_many_as_asked_and_depend_on_the_seed():
    steps = list(shuffled_rows([3, 10], 4, 5, 1, seeds=[[1], [1]]))
    assert [[len(rows) for rows in step] for step in steps] == [
        [3, 4],
        [3, 4],
        [3, 2],
        [3, 4],
        [3, 4],
    ]
    orders = [
        np.concatenate([s[0] for s in shuffled_rows([30], 4, None, 1, seeds=[seed])])
        for seed in ([0, 0, 1], [0, 0, 1], [0, 1, 1])
    ]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_gather_pads_with_zeros_and_keeps_nans_of_record_zero_away():
    x, y = records(6)
    x[0] = torch.nan
    batch = gather(
        x, y, [np.array([3, 5, 1]), np.array([2]), np.array([], int)], divisor=None, device=CPU
    )
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert torch.equal(batch.x[0], x[[3, 5, 1]])
    assert not batch.x[batch.mask == 0].any()
    assert batch.divisor.tolist() == [3, 1, 1]
    assert batch.active.tolist() == [True, True, False]
    assert batch.y[0].tolist() == y[[3, 5, 1]].tolist()


def test_gather_divides_by_the_public_batch_under_poisson_sampling():
    x, y = records(6)
    empty = np.array([], int)
    batch = gather(x, y, [empty, empty], divisor=torch.tensor([2.5, 4.0]), device=CPU)
    assert batch.divisor.tolist() == [2.5, 4.0]
    assert batch.active.all()
    assert batch.x.shape == (2, 1, 1, 8, 8)
    assert not batch.mask.any()


def batch_of(counts, network_seed=0):
    x, y = records(40, seed=network_seed)
    rows, start = [], 1
    for n in counts:
        rows.append(np.arange(start, start + n))
        start += n
    return gather(x, y, rows, divisor=None, device=CPU), rows, x, y


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("max_examples", [2**40, 7, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_cohort_gradients_equal_autograd_of_each_client(vectorize, max_examples, shared):
    torch.manual_seed(0)
    network = CNN(channels=(4,))
    batch, rows, x, y = batch_of([5, 1, 8])
    own = params_of(network)
    if not shared:
        own = {n: torch.stack([v, 1.1 * v, 0.9 * v]) for n, v in own.items()}
    gradient = CohortGradient(
        network, cross_entropy, vectorize=vectorize, max_examples=max_examples
    )
    got, probes = gradient(own, batch, shared=shared)
    assert probes == {}
    for k, r in enumerate(rows):
        leaves = {n: (v if shared else v[k]).clone().requires_grad_() for n, v in own.items()}
        loss = cross_entropy(functional_call(network, leaves, (x[r],)), y[r]).sum()
        for name, want in zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True):
            torch.testing.assert_close(got[name][k], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectorize", [True, False])
def test_what_stands_in_padding_does_not_matter(vectorize):
    torch.manual_seed(0)
    network = MLP(hidden=(5,))
    batch, *_ = batch_of([4, 2])
    filled = batch.x.clone()
    filled[1, 2:] = 1e3
    gradient = CohortGradient(network, cross_entropy, vectorize=vectorize)
    want, _ = gradient(params_of(network), batch, shared=True)
    other = Batch(filled, batch.y, batch.mask, batch.divisor, batch.active)
    got, _ = gradient(params_of(network), other, shared=True)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_parameter_without_use_has_a_zero_gradient(vectorize):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 10), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x.flatten(1))

    network = Idle()
    batch, *_ = batch_of([2, 2])
    grads, _ = CohortGradient(network, cross_entropy, vectorize=vectorize)(
        params_of(network), batch, shared=True
    )
    assert not grads["idle.weight"].any()
    assert grads["used.weight"].any()


@pytest.mark.parametrize(("momentum", "proximal"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.7), (0.9, 0.7)])
def test_local_training_equals_torch_sgd_and_idle_clients_stay(momentum, proximal):
    torch.manual_seed(1)
    network = MLP(hidden=(6,))
    x, y = records(30)
    sizes, lr = [10, 3, 6], 0.2
    plan = list(shuffled_rows(sizes, 4, None, 2, seeds=[[k] for k in range(3)]))
    starts = np.cumsum([0, *sizes[:-1]])
    batches = (
        gather(x, y, [s + r for s, r in zip(starts, step, strict=True)], divisor=None, device=CPU)
        for step in plan
    )
    start = params_of(network)
    hook = plain_gradient(CohortGradient(network, cross_entropy, vectorize=True))
    got = train_cohort(start, batches, hook, lr=lr, momentum=momentum, proximal=proximal)
    for k, offset in enumerate(starts):
        local = MLP(hidden=(6,))
        local.load_state_dict(start)
        optimizer = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
        for step in plan:
            if len(step[k]):
                rows = offset + step[k]
                optimizer.zero_grad()
                loss = cross_entropy(local(x[rows]), y[rows]).mean()
                away = sum((p - start[n]).square().sum() for n, p in local.named_parameters())
                (loss + proximal / 2 * away).backward()
                optimizer.step()
        for name, value in local.named_parameters():
            torch.testing.assert_close(
                got[name][k], value.detach() - start[name], rtol=1e-4, atol=1e-6
            )


def test_momentum_does_not_move_a_client_without_records():
    network = nn.Linear(64, 10)
    start = params_of(network)
    full = torch.ones(2, 3)
    idle = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    x, y = (
        torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, 3).long(),
    )
    divisor = torch.ones(2)
    both = Batch(x, y, full, divisor, torch.tensor([True, True]))
    one = Batch(x, y, idle, divisor, torch.tensor([True, False]))
    hook = plain_gradient(CohortGradient(network, cross_entropy, vectorize=True))
    short = train_cohort(start, iter([both]), hook, lr=0.1, momentum=0.9)
    long = train_cohort(start, iter([both, one, one]), hook, lr=0.1, momentum=0.9)
    resumed = train_cohort(start, iter([both, one, both]), hook, lr=0.1, momentum=0.9)
    again = train_cohort(start, iter([both, both]), hook, lr=0.1, momentum=0.9)
    assert torch.equal(short["weight"][1], long["weight"][1])
    assert not torch.equal(short["weight"][0], long["weight"][0])
    torch.testing.assert_close(resumed["weight"][1], again["weight"][1])


def test_memory_estimate_grows_with_the_network():
    x = torch.zeros(1, 8, 8)
    small, large = (bytes_per_example(CNN(channels=(c,)), x) for c in (4, 64))
    assert 4 * 64 < small < large


def test_networks_that_cannot_be_vmapped_are_looped_and_the_reason_is_told():
    def run(vectorize):
        if vectorize:
            raise RuntimeError("vmap: no batching rule\nmore")

    chosen, reason = faster_execution(run)
    assert chosen is False
    assert "vmap: no batching rule" in reason
    assert "more" not in reason


def test_faster_execution_takes_the_faster_of_the_two():
    def slow_if(slow):
        def run(vectorize):
            if vectorize is slow:
                torch.randn(300, 300) @ torch.randn(300, 300)
                torch.linalg.svd(torch.randn(60, 60))

        return run

    assert faster_execution(slow_if(slow=True))[0] is False
    assert faster_execution(slow_if(slow=False))[0] is True


def test_a_step_is_rounded_as_written():
    """As by torch.sub with a factor, whatever memory it is computed in."""
    network = MLP(in_features=64, hidden=(5,))
    params, (x, y) = params_of(network), records(40)
    batch = gather(x, y, [np.arange(10), np.arange(7)], divisor=None, device=CPU)
    gradient = plain_gradient(CohortGradient(network, cross_entropy, vectorize=True))
    update = train_cohort(params, iter([batch, batch]), gradient, lr=0.3)
    once = {
        n: torch.sub(p, g, alpha=0.3)
        for (n, p), g in zip(params.items(), gradient(0, params, True, batch).values(), strict=True)
    }
    twice = {
        n: torch.sub(p, g, alpha=0.3)
        for (n, p), g in zip(once.items(), gradient(1, once, False, batch).values(), strict=True)
    }
    for name, value in update.items():
        assert torch.equal(value, twice[name] - params[name])


def test_training_leaves_its_inputs_alone():
    network = MLP(in_features=64, hidden=(5,))
    params, (x, y) = params_of(network), records(40)
    before = {name: p.clone() for name, p in params.items()}
    batch = gather(x, y, [np.arange(10), np.arange(7)], divisor=None, device=CPU)
    kept = []

    def hook(step, params, shared, batch):
        kept.append({name: p.clone() for name, p in params.items()})
        return {name: torch.ones(2, *p.shape[0 if shared else 1 :]) for name, p in params.items()}

    update = train_cohort(params, iter([batch] * 3), hook, lr=0.5, momentum=0.5)
    assert all(torch.equal(params[name], before[name]) for name in params)
    # Velocities 1, 1.5, 1.75.
    for name, value in update.items():
        torch.testing.assert_close(value, torch.full_like(value, -0.5 * 4.25))
        torch.testing.assert_close(kept[2][name] - before[name], torch.full_like(value, -1.25))


@pytest.mark.parametrize("vectorize", [True, False])
def test_parameters_with_one_gradient_are_stepped_each_by_itself(vectorize):
    """The derivatives of a + b are one tensor, and steps are taken in its memory."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.ones(10))

        def forward(self, x):
            return x.flatten(1)[:, :10] + (self.a + self.b)

    network = Sum()
    batch, *_ = batch_of([5, 3])
    hook = plain_gradient(CohortGradient(network, cross_entropy, vectorize=vectorize))
    with torch.no_grad():
        update = train_cohort(params_of(network), iter([batch, batch]), hook, lr=0.3)
    torch.testing.assert_close(update["a"], update["b"], rtol=1e-4, atol=1e-6)
    assert update["a"].abs().max() > 0.01


def test_only_tensors_with_shared_memory_or_gaps_are_copied():
    whole = torch.arange(24.0).view(2, 3, 4)
    for kept in (whole, whole.permute(2, 0, 1), whole[:1], whole[:, :1].squeeze(1)[:1]):
        assert own(kept) is kept
    for copied in (torch.ones(3, 1).expand(3, 4), whole[..., :2], whole[:, 1:], whole[:, :1]):
        assert own(copied) is not copied
        assert own(copied).is_contiguous()
        assert torch.equal(own(copied), copied)


@torch.no_grad()
def test_updates_of_convolutions_are_in_the_usual_order():
    network = CNN(channels=(4, 6), kernel_sizes=(4, 4), strides=(2, 2))
    batch, *_ = batch_of([5, 3])
    hook = plain_gradient(CohortGradient(network, cross_entropy, vectorize=True))
    update = train_cohort(params_of(network), iter([batch] * 3), hook, lr=0.1)
    assert all(value.is_contiguous() for value in update.values())
    assert update["conv2.weight"].shape == (2, 6, 4, 4, 4)
