"""Checks of a whole run before any work is done and any privacy is spent."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.func import functional_call

from fl_lightning.aggregate import WEIGHTINGS
from fl_lightning.client import input_dtype
from fl_lightning.data import FederatedDataModule
from fl_lightning.privacy.config import per_client
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.strategy import ClientParallelStrategy

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule


def check_training(module: FederatedModule) -> None:
    """Values of the module that contradict each other or are out of range.

    Raises:
        ValueError: naming the argument and its value.
    """
    rate, batch_size = module.sampling_rate, module.batch_size
    if (rate is None) == (batch_size is None):
        raise ValueError(
            f"sampling_rate={rate} and batch_size={batch_size}: give one of the two and set the "
            "other to null"
        )
    if module.privacy.unit == "record" and rate is None:
        raise ValueError(
            f"batch_size={batch_size} with setting='record+local': shuffled minibatches have no "
            "accounting here; use sampling_rate"
        )
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"sampling_rate={rate} must be in (0, 1]")
    if not 0 <= module.client_momentum < 1:
        raise ValueError(f"client_momentum={module.client_momentum} must be in [0, 1)")
    for name in ("batch_size", "local_steps", "clients_per_round", "planned_rounds"):
        value = getattr(module, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if module.local_epochs < 1:
        raise ValueError(f"local_epochs={module.local_epochs} must be at least 1")
    for name in ("client_lr", "memory_budget"):
        value = getattr(module, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite")
    for name, choices in (("weighting", WEIGHTINGS), ("execution", ("auto", "vmap", "loop"))):
        value = getattr(module, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
    if module.seed < 0:
        raise ValueError(f"seed={module.seed} must be at least 0")
    _check_denoise(module)


def _check_denoise(module: FederatedModule) -> None:
    """Whether the noise of a release is known to the server."""
    if not module.denoise:
        return
    privacy = module.privacy
    if not privacy.private or privacy.pooled:
        raise ValueError(
            f"denoise=True with setting={privacy.setting!r}: there is no noise of each client to "
            "take away; use record+local or client+local"
        )
    if privacy.unit == "record" and module.local_steps != 1:
        raise ValueError(
            f"denoise=True with local_steps={module.local_steps}: later steps start from noisy "
            "ones, so that the noise of a release is known for local_steps=1 alone"
        )


def check_network(network: nn.Module) -> None:
    """Refuse networks that mix records or have nothing to train.

    Raises:
        ValueError: naming the layer, with what to use instead.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"network: layer '{name}' is a {type(layer).__name__}, which mixes the records of "
                "a batch (no per-record clipping) and keeps unprotected statistics; use GroupNorm, "
                "LayerNorm or InstanceNorm without running statistics instead"
            )
        if isinstance(layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) and (
            layer.track_running_stats
        ):
            raise ValueError(
                f"network: layer '{name}' keeps unprotected running statistics; set "
                "track_running_stats=False or use GroupNorm"
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise ValueError(
                f"network: layer '{name}' has max_norm={layer.max_norm}, which rescales weights by "
                "the codes that records hold, without clipping or noise; leave max_norm out"
            )
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("network: it has no trainable parameters")


def check_trainer(module: FederatedModule, trainer: pl.Trainer) -> None:
    """What the Trainer is asked for.

    Raises:
        ValueError: naming the argument and its value.
    """
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs}: give the number of rounds; privacy is "
            "planned for it"
        )
    planned = module.planned_rounds or trainer.max_epochs
    if trainer.max_epochs > planned:
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs} is more than planned_rounds={planned}"
        )
    check_processes(trainer)
    if str(trainer.precision) not in ("32-true", "64-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision}: clipping is only proven for 32-true, 64-true"
        )
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            f"torch.set_float32_matmul_precision('{torch.get_float32_matmul_precision()}'): "
            "reduced precision breaks the bound of the clipping; set it to 'highest'"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1: a batch "
            "is a round"
        )


def check_processes(trainer: pl.Trainer) -> None:
    """Whether the processes of a Trainer can share cohorts.

    Raises:
        ValueError: naming the argument and its value.
    """
    strategy, size = trainer.strategy, trainer.world_size
    ours = isinstance(strategy, ClientParallelStrategy)
    if not ours and (size > 1 or not isinstance(strategy, SingleDeviceStrategy)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} with {size} process(es): clients are "
            "shared by ClientParallelStrategy alone, which is `--trainer.strategy ddp` on the "
            "command line and strategy=fl_lightning.ClientParallelStrategy() in Python"
        )
    if not ours:
        return
    connector = trainer._accelerator_connector
    if connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler=True would deal records twice to the processes, which "
            "share clients and validation records exactly: set it to False"
        )
    if strategy._layer_sync is not None:
        raise ValueError(
            "trainer.sync_batchnorm=True: statistics of batches are shared by clients without "
            "protection; set it to False"
        )


def check_run(module: FederatedModule, data: FederatedDataModule, trainer: pl.Trainer) -> None:
    """What needs the data or the Trainer.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_trainer(module, trainer)
    module.configure_optimizers()  # its refusals, before the run folder exists
    sizes, k = data.client_sizes, data.num_clients
    small = (sizes < 2).nonzero()[:, 0].tolist()
    if small:
        raise ValueError(
            f"data: client {small[0]} has {int(sizes[small[0]])} record(s) (and {len(small) - 1} "
            "more have fewer than 2): every client needs at least 2; lower num_clients or raise "
            "alpha or min_client_size"
        )
    if module.clients_per_round is not None and module.clients_per_round > k:
        raise ValueError(
            f"clients_per_round={module.clients_per_round} is more than num_clients={k}"
        )
    _check_privacy(module, sizes)
    _check_pool(module, k)
    _check_forward(module, data)


def _check_privacy(module: FederatedModule, sizes: Tensor) -> None:
    privacy, k = module.privacy, len(sizes)
    if not privacy.private:
        return
    ReleasedHistory(privacy, 1, module.layout.dims)  # clip norms that do not fit the layers
    for name in ("epsilon", "delta", "noise_multiplier"):
        value = getattr(privacy, name)
        if isinstance(value, list) and len(value) > k:
            raise ValueError(f"{name}={value} has {len(value)} numbers for {k} clients")
    for client, delta in enumerate(per_client(privacy.delta, k)):
        units = int(sizes[client]) if privacy.unit == "record" else k
        what = "records of that client" if privacy.unit == "record" else "clients"
        if units * delta >= 1:
            raise ValueError(
                f"delta={delta} of client {client} is not below 1/{units} ({what}): such a δ "
                "allows to publish one of them outright"
            )


def _check_pool(module: FederatedModule, num_clients: int) -> None:
    """Whether enough clients stay for their shares to be the whole noise."""
    if module.privacy.setting != "client+secure_sum":
        return
    size, least = module.clients_per_round or num_clients, module.privacy.min_survivors
    if least is not None and least > size:
        raise ValueError(f"min_survivors={least} is more than the {size} clients of a round")
    faults = module.faults
    if least is None and (faults.dropout or faults.deadline is not None):
        raise ValueError(
            f"min_survivors=null needs the whole cohort, but dropout={faults.dropout} and deadline="
            f"{faults.deadline} make clients fail: give the number whose shares are to be enough"
        )


def _check_forward(module: FederatedModule, data: FederatedDataModule) -> None:
    """Apply the network to a few records: shapes, what it writes or keeps, records that it mixes.

    Raises:
        ValueError: saying which.
    """
    whole = data.x[:100]
    x, y = whole[:3].nan_to_num(), data.y[:3]
    # The first record that is not like the one at the beginning, if there is any.
    at = int((whole != whole[0]).reshape(len(whole), -1).any(1).int().argmax())
    network = module.network
    device = next(network.parameters()).device
    x, y = x.to(device, input_dtype(network, x)), y.to(device)
    beside = x.clone(), y.clone()
    beside[0][0], beside[1][0] = whole[at].nan_to_num().to(x), data.y[at].to(y)
    modes = {name: layer.training for name, layer in network.named_modules()}
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    before = {name: value.detach().clone() for name, value in state.items()}
    given, alone, again = x.clone(), True, True
    try:
        with torch.no_grad(), torch.random.fork_rng():
            network.train()(given)
            written = [n for n, v in state.items() if not torch.equal(v, before[n])]
            losses = module.loss(network.eval()(x.clone()), y)
            if losses.shape == (len(x),):
                alone, again = _depends_on_the_record_alone(module, (x, y), beside, modes)
    except Exception as error:
        raise ValueError(
            f"network: it cannot be applied to records of shape {tuple(x.shape[1:])} of "
            f"{data.dataset_name}: {error}"
        ) from error
    finally:
        for name, layer in network.named_modules():
            layer.training = modes[name]
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(before[name])
    if written:
        kind = "buffer" if written[0] in dict(network.named_buffers()) else "parameter"
        raise ValueError(
            f"network: applying it changes the {kind} '{written[0]}', which would leave a client "
            "without clipping or noise; keep no statistics in the network"
        )
    if not torch.equal(given, x):
        raise ValueError(
            "network: applying it changes the records that it is given; use no operation in place "
            "on them (x = x / 255, not x /= 255)"
        )
    if losses.shape != (len(x),):
        raise ValueError(
            f"loss: it gave shape {tuple(losses.shape)} for {len(x)} records; it must give one "
            "number a record (reduction='none')"
        )
    if module.privacy.private and not again:
        raise ValueError(
            "network or loss: equal records have other losses when it is applied again; it must "
            "keep nothing of the records that it has seen (neither clipped nor noised), and draw "
            "random numbers from torch alone (or no run can be repeated)"
        )
    if module.privacy.unit == "record" and not alone:
        raise ValueError(
            "network or loss: a record's loss changes with the records beside it, so no clipping "
            "of single records bounds what one of them does; compute every record by itself"
        )


def _depends_on_the_record_alone(
    module: FederatedModule,
    records: tuple[Tensor, Tensor],
    beside: tuple[Tensor, Tensor],
    modes: dict[str, bool],
) -> tuple[bool, bool]:
    """Whether losses change neither with the other records nor from one application to the next.

    The weights are moved a little: behind a layer of zeros nothing would be seen.

    Args:
        module: network, loss.
        records: inputs and labels of some records.
        beside: the same with another record in the first place.
        modes: what is in training mode when the network trains, by name.
    """
    network, generator, moved = module.network, torch.Generator().manual_seed(0), {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            size = 0.3 / (p[0].numel() if p.ndim > 1 else 10) ** 0.5
            by = torch.empty(p.shape).normal_(std=size, generator=generator)
            moved[name] = p.detach() + by.to(p)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(0)  # dropout and the like are the same each time
        return module.loss(functional_call(network, moved, (x.clone(),)), y)

    network.eval()
    single = [losses(x[None], y[None]) for x, y in zip(*records, strict=True)]
    alone = torch.allclose(
        losses(*records), torch.cat(single), rtol=1e-3, atol=1e-4, equal_nan=True
    )
    for name, layer in network.named_modules():
        layer.training = modes[name]
    first, other, again = (losses(*some) for some in (records, beside, records))
    close = partial(torch.allclose, rtol=1e-4, atol=1e-5, equal_nan=True)
    repeated = close(first, again)
    return alone and (not repeated or close(first[1:], other[1:])), repeated
