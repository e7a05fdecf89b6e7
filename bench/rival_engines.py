"""Other packages' simulations of the same rounds; run in the peers' environment.

Each is given its favour: records in memory, batches prepared the cheapest way it allows, no
evaluation, no checkpoints, no logging.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from bench import federation
from bench.turns import Turnstile


def flower(problem: dict[str, Any]) -> None:
    """Flower's simulation: Ray actors, a core each; messages name the client and the round."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")
    import logging

    import ray
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    path = os.path.abspath(sys.argv[2])
    client_app, server_app = ClientApp(), ServerApp()

    # Of its surroundings it keeps the path alone: it travels with every message.
    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        local = flower_client(path)
        config = message.content["config"]
        local.load(message.content["arrays"].to_torch_state_dict())
        local.train(int(config["client"]), int(config["round"]))
        owned = len(local.problem["owners"][int(config["client"])])
        content = {
            "arrays": ArrayRecord(local.model.state_dict()),
            "metrics": MetricRecord({"num-examples": owned}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    turn = Turnstile(version("flwr"), end=ray.shutdown)

    class Cohorts(FedAvg):
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            turn(arrays.to_torch_state_dict)
            nodes = sorted(grid.get_node_ids())
            return [
                Message(
                    content=RecordDict({
                        "arrays": arrays,
                        "config": ConfigRecord({"client": client, "round": server_round - 1}),
                    }),
                    message_type="train", dst_node_id=nodes[client],
                )
                for client in problem["schedule"][server_round - 1].tolist()
            ]  # fmt: skip

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < len(problem["owners"]):
            pass
        Cohorts(fraction_evaluate=0.0).start(
            grid=grid, initial_arrays=ArrayRecord(federation.start(problem)),
            num_rounds=len(problem["schedule"]),
        )  # fmt: skip

    run_simulation(
        server_app, client_app, num_supernodes=len(problem["owners"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": problem["options"]["processes"], "include_dashboard": False},
        },
    )  # fmt: skip


_CLIENTS: dict[str, federation.Local] = {}


def flower_client(path: str) -> federation.Local:
    """Records and model of an actor, read once."""
    if path not in _CLIENTS:
        _CLIENTS[path] = federation.Local(torch.load(path))
    return _CLIENTS[path]


def pfl(problem: dict[str, Any]) -> None:
    """pfl's simulation, in one process or in several that hear of each other as under torchrun."""
    join_processes(problem["options"]["processes"])
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.internal.ops import pytorch_ops
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    network = federation.network(problem["network"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.network(x), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
            return {"loss": Weighted(float(self.loss(x, y)) * len(x), len(x))}

    rounds, cohort = problem["schedule"].shape
    order = iter([(r, k) for r in range(rounds) for k in problem["schedule"][r].tolist()])

    def user(key: tuple[int, int]) -> Dataset:
        round, client = key
        return Dataset(federation.records(problem, client, round), user_id=str(client))

    data = FederatedDataset(user, lambda: next(order))
    distributed = pytorch_ops.distributed
    share = None
    if distributed.world_size > 1:

        def share(command: Any) -> Any:
            box = [command]
            torch.distributed.broadcast_object_list(box)
            return box[0]

    turn = Turnstile(version("pfl"), share)

    class Turn(TrainingProcessCallback):
        def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
            turn(network.state_dict)
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            turn(network.state_dict)
            return False, Metrics()

    module = Model()
    # Without evaluation of clients there is nothing to reset between them.
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds + 1,
            train_cohort_size=cohort, val_cohort_size=0,
        ),
        SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
        ),
        PyTorchModel(
            module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)
        ),
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=problem["lr"],
            local_batch_size=problem["batch"],
        ),
        callbacks=[Turn()], send_metrics_to_platform=False,
    )  # fmt: skip


def join_processes(count: int) -> None:
    """Start the other processes of an engine, and tell this one what torchrun would."""
    if count == 1:
        return
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "bench", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0",
        }  # fmt: skip
        for rank in range(1, count):
            own = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "bench.engine", *sys.argv[1:]]
            subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL)
