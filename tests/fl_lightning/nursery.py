"""A process that has imported everything, and forks runs of several processes to be stopped.

Reads orders from stdin, one JSON object a line: `cwd`, `args` of the command line, `processes`,
`environment`, and, if the run is to be stopped, `place`, the `signal` and the ranks it goes `to`.
Every process that comes to the place says so and stays there: for `stay` seconds, or for good,
`deaf`, where no Python runs. When all that come there are there, the signal is sent. Answers with
the exit statuses, and the seconds from the signal until the last process had ended.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401

import aadp_kernels._dispatch
from fl_lightning import fit, module, plots
from fl_lightning.accounting import budget
from fl_lightning.ledger import Ledger
from fl_lightning.output import callbacks, checkpoint
from fl_lightning.release.clients import Clients

TOO_LONG = 60.0  # seconds; a run that has not ended by then is killed, and fails its test
PLACES = {
    "preflight": (module.FederatedModule, "check"),
    "calibration": (budget.Budget, "calibrate"),
    "training": (Clients, "train"),
    "writing": (Ledger, "append"),
    "evaluation": (module.FederatedModule, "validation_step"),
    "checkpointing": (checkpoint.AtomicCheckpointIO, "save_checkpoint"),
    "testing": (module.FederatedModule, "test_step"),
    "pictures": (plots, "draw_all"),
}
ALONE = ("preflight", "calibration", "writing", "checkpointing", "pictures")  # rank 0 alone


def stay_at(order: dict, rank: int) -> None:
    """Make this process stay at a `call` of the place: the third, or the first of what comes once.

    The dry round trains once before.
    """
    home, name = PLACES[order["place"]]
    original, calls = getattr(home, name), []
    once = order["place"] in ("preflight", "calibration", "testing", "pictures")
    wanted = order.get("call", 1 if once else 3) + (order["place"] == "training")

    def slow(*arguments, **options):
        calls.append(name)
        if len(calls) == wanted and rank in order.get("slow", [0, 1]):
            Path(f"there.{rank}").touch()
            if order.get("deaf"):
                libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
                libc.pthread_mutex_lock(mutex)
                libc.pthread_mutex_lock(mutex)
            until = time.monotonic() + order.get("stay", 600)
            while time.monotonic() < until:
                time.sleep(0.05)
        return original(*arguments, **options)

    setattr(home, name, slow)


def srun(rank: int, processes: int, port: int) -> dict[str, str]:
    """What SLURM tells a task of `srun --ntasks-per-node=N`."""
    facts = {"NTASKS": processes, "NTASKS_PER_NODE": processes, "NNODES": 1, "NODEID": 0}
    facts |= {"PROCID": rank, "LOCALID": rank, "NODELIST": "127.0.0.1", "JOB_NAME": "train"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return place | {f"SLURM_{name}": str(value) for name, value in facts.items()}


def run(order: dict, rank: int, port: int) -> None:
    """The command line, in a child; never returns."""
    os.chdir(order["cwd"])
    output = os.open(f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= order.get("environment", {})
    sys.argv = ["fit", *order["args"]]
    if order.get("slurm"):
        os.environ |= srun(rank, order["processes"], port)
        sys.argv += ["--trainer.devices", str(order["processes"])]
    elif order["processes"] > 1:
        sys.argv += ["--trainer.strategy", "ddp", "--trainer.devices", str(order["processes"])]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"])}
    if "place" in order:
        stay_at(order, rank)
    code = 1
    try:
        fit.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stopped(order: dict, children: list[int]) -> float:
    """Send the signal when all that are asked to are there; when that was."""
    ranks = range(order["processes"])
    there = [0] if order["place"] in ALONE else [r for r in order.get("slow", ranks) if r in ranks]
    until = time.monotonic() + 4 * TOO_LONG
    while not all((Path(order["cwd"]) / f"there.{rank}").exists() for rank in there):
        if time.monotonic() > until:
            break
        time.sleep(0.005)
    time.sleep(0.2)
    now = time.monotonic()
    for rank in order["to"]:
        os.kill(children[rank], order["signal"])
    return now


def serve(order: dict) -> dict:
    """Run, stop, wait for all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for mark in Path(order["cwd"]).glob("there.*"):
        mark.unlink()
    children = []
    for rank in range(order["processes"]):
        child = os.fork()
        if child == 0:
            run(order, rank, port)
        children.append(child)
    start = stopped(order, children) if "place" in order else time.monotonic()
    limit = TOO_LONG if "place" in order else 8 * TOO_LONG
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > start + limit:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return {
        "statuses": [statuses[child] for child in children],
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    """Serve orders until stdin ends."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    # No threads may exist before a fork; the wide form has the same bits in plain torch.
    aadp_kernels._dispatch.AUTO_ELEMENTS = 2**62
    plots.draw_all = lambda path: []
    assert callbacks.plots is plots
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
