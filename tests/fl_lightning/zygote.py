"""A process that has imported everything and forks training runs, to be killed where one likes.

Reads orders from stdin, one JSON object a line: `cwd`, `args` of the command line, and where to
die, if anywhere: `after` so many seconds of its processor, or at the `call`-th system call that
changes files, after the `part` of a write that has been done; `limit` is the largest file that the
disk has room for. Answers with the exit status, the seconds of its processor and the number of such
calls. For Linux, as the tests that kill runs are.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401

import aadp_kernels._dispatch
from fl_lightning import fit, plots
from fl_lightning.output import callbacks

CALLS = ("write", "fsync", "replace", "ftruncate", "link", "unlink")


def count_calls(order: dict) -> list[int]:
    """Count what this process does to files, and die where the order says."""
    seen = [0]

    def counted(name: str, original):
        def call(*arguments, **options):
            seen[0] += 1
            if seen[0] == order.get("call"):
                if name == "write":
                    original(arguments[0], arguments[1][: int(order["part"] * len(arguments[1]))])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    return seen


def run(order: dict) -> None:
    """The command line, in a child; never returns."""
    os.chdir(order["cwd"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen, code = count_calls(order), 1
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    try:
        fit.main(order["args"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    Path("calls.txt").write_text(str(seen[0]))
    os._exit(code)


def seconds_used(child: int) -> float:
    """Of the processor, by all threads of a process that was not waited for yet."""
    user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait(child: int, after: float | None) -> tuple[int, float]:
    """Exit status (negative: signal) and seconds; kills the child after a time.

    Seconds are its processor's, so that a place is the same one on a machine with other work.
    """
    while True:
        used = seconds_used(child)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used
        if after is not None and used >= after:
            os.kill(child, signal.SIGKILL)
            after = None
        time.sleep(0.0005)


def main() -> None:
    """Serve orders until stdin ends."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    # No threads may exist before a fork; the wide form has the same bits in plain torch.
    aadp_kernels._dispatch.AUTO_ELEMENTS = 2**62
    callbacks.plots.draw_all = plots.draw_all = lambda path: []
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            run(order)
        status, seconds = wait(child, order.get("after"))
        calls = Path(order["cwd"]) / "calls.txt"
        count = int(calls.read_text()) if status == 0 else 0
        print(json.dumps({"status": status, "seconds": seconds, "calls": count}), flush=True)


if __name__ == "__main__":
    main()
