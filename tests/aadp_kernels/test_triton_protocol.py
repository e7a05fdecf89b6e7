"""Programs that take the tickets of one launch, in every order and in random ones.

A model of what programs share is checked exhaustively; the kernel itself runs in Triton's
interpreter in threads of which one moves at a time, a drawn one, from one access of memory to the
next.
"""

import inspect
import os
import random
import threading
from types import FunctionType

import numpy as np
import pytest
import torch

from aadp_kernels import Layout, NoiseKey, privatize_

pytest.importorskip("triton")
from aadp_kernels._triton import launch_plan, privatize

# What a program does next.
START, AHEAD, NORM, COUNT, PUBLISH, APPLY, END = range(7)


class Model:
    """The protocol of `privatize_kernel` over the tables of a plan."""

    def __init__(self, tables):
        self.tickets = [(int(code) >> 2, int(code) & 3) for code in tables["tickets"]]
        self.unit_of = [int(unit) for unit in tables["chunks"][:, 6]]
        self.units = [set(range(begin, end)) for begin, end in tables["units"].tolist()]

    def first(self, programs):
        """Counter; chunks whose sums are stored; counts of units; factors; chunks applied."""
        nothing = frozenset()
        idle = ((START, -1, -1),) * programs
        return 0, nothing, (0,) * len(self.units), nothing, nothing, idle

    def begin(self, ticket):
        return (END, ticket, -1) if ticket >= len(self.tickets) else (AHEAD, ticket, -1)

    def moves(self, state):
        """States after one step of one program."""
        for i, (at, ticket, ahead) in enumerate(state[5]):
            if at != END:
                after = self.step(state, at, ticket, ahead)
                if after is not None:
                    shared, program = after
                    others = state[5][:i] + state[5][i + 1 :]
                    # Programs are alike: only how many are in which state counts.
                    yield *shared, tuple(sorted((*others, program)))

    def step(self, state, at, ticket, ahead):
        """What is shared and the program after its step; None if it has to wait."""
        counter, stored, counts, published, applied, _ = state
        if at == START:
            return (counter + 1, *state[1:5]), self.begin(counter)
        chunk, kind = self.tickets[ticket]
        unit, alone = self.unit_of[chunk], kind == 3
        if at == AHEAD:
            then = APPLY if kind == launch_plan.APPLY else NORM
            return (counter + 1, *state[1:5]), (then, ticket, counter)
        if at == NORM:
            assert chunk not in stored, "summed twice"
            assert chunk not in applied, "read after it was written"
            if alone:
                published = published | {unit}
            then = APPLY if alone else COUNT
            return (counter, stored | {chunk}, counts, published, applied), (then, ticket, ahead)
        if at == COUNT:
            counts = (*counts[:unit], counts[unit] + 1, *counts[unit + 1 :])
            last = counts[unit] == len(self.units[unit])
            after = (PUBLISH, ticket, ahead) if last else self.begin(ahead)
            return (counter, stored, counts, published, applied), after
        if at == PUBLISH:
            assert self.units[unit] <= stored, "a sum without all of its slots"
            assert unit not in published, "published twice"
            return (counter, stored, counts, published | {unit}, applied), self.begin(ahead)
        if unit not in published:
            return None
        assert chunk not in applied, "applied twice"
        return (counter, stored, counts, published, applied | {chunk}), self.begin(ahead)


def explore(tables, programs):
    """Every state that can be reached; each end has everything done."""
    model = Model(tables)
    waiting, seen = [model.first(programs)], set()
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        after = list(model.moves(state))
        waiting += after
        if not after:
            assert all(at == END for at, _, _ in state[5]), "deadlock"
            everything = set(range(len(model.unit_of)))
            assert state[1] == state[4] == everything
            assert state[3] == set(range(len(model.units)))
    return len(seen)


def tables_of(chunks, window, monkeypatch, rows=1):
    """A plan whose layers have so many chunks each."""
    monkeypatch.setattr(launch_plan, "CHUNK", 256)
    layout = Layout.build([torch.empty(n * 256, device="meta") for n in chunks])
    aligned = (True,) * len(chunks)
    return launch_plan.make(
        layout, rows, tile=256, itemsize=4, aligned=aligned, window=window * 1024
    )


class TestEveryOrder:
    @pytest.mark.parametrize("programs", [1, 2, 3])
    @pytest.mark.parametrize("window", [0, 1, 2, 100])
    @pytest.mark.parametrize("chunks", [(2,), (3, 1), (1, 2, 2), (4, 2), (0, 3, 1)])
    def test_nothing_waits_for_ever_and_all_is_done_once(
        self, chunks, window, programs, monkeypatch
    ):
        assert explore(tables_of(chunks, window, monkeypatch), programs) > 4

    def test_more_programs_than_tickets(self, monkeypatch):
        assert explore(tables_of((2, 1), 1, monkeypatch), 6) > 50

    def test_rows(self, monkeypatch):
        assert explore(tables_of((2, 1), 2, monkeypatch, rows=2), 2) > 50

    def test_the_model_finds_a_deadlock(self, monkeypatch):
        tables = tables_of((2,), 0, monkeypatch)
        tables["tickets"] = np.array([1, 2, 5, 6], dtype=np.int32)  # applied before the second norm
        with pytest.raises(AssertionError, match="deadlock"):
            explore(tables, 1)

    def test_the_model_finds_a_chunk_that_is_summed_twice(self, monkeypatch):
        tables = tables_of((2,), 0, monkeypatch)
        tables["tickets"] = np.array([1, 1, 2, 6], dtype=np.int32)
        with pytest.raises(AssertionError, match="twice"):
            explore(tables, 2)


class Baton:
    """Lets one of several threads move at a time, a drawn one."""

    MOST = 100_000

    def __init__(self, seed):
        self.draw, self.switches = random.Random(seed), 0
        self.turn: dict[int, threading.Event] = {}
        self.failure: BaseException | None = None

    def _pass_on(self):
        if self.turn:
            self.turn[self.draw.choice(sorted(self.turn))].set()

    def switch(self):
        """Someone else may move; called by the thread that moves."""
        own = self.turn.get(threading.get_ident())
        if own is None:
            return
        self.switches += 1
        if self.switches > self.MOST or self.failure is not None:
            raise RuntimeError("no end")
        own.clear()
        self._pass_on()
        own.wait()

    def run(self, count, work):
        ready = threading.Barrier(count + 1)

        def program():
            own = self.turn[threading.get_ident()] = threading.Event()
            ready.wait()
            own.wait()
            try:
                work()
            except BaseException as error:
                self.failure = self.failure or error
            finally:
                del self.turn[threading.get_ident()]
                self._pass_on()

        threads = [threading.Thread(target=program) for _ in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


class Interleaved:
    """A kernel whose programs run together in the interpreter."""

    def __init__(self, kernel, baton):
        self.kernel, self.baton = kernel, baton

    def __getitem__(self, grid):
        from triton.runtime.interpreter import GridExecutor

        original, baton, count = self.kernel.rewrite(), self.baton, grid[0]

        def together(**arguments):
            baton.run(count, lambda: original(**arguments))

        # The interpreter looks for the language in the globals of a kernel.
        programs = FunctionType(
            together.__code__, original.__globals__, "together", None, together.__closure__
        )
        programs.__signature__ = inspect.signature(original)
        programs.__annotations__ = original.__annotations__
        return GridExecutor(programs, self.kernel.arg_names, (1,), self.kernel.pre_run_hooks)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
class TestRandomOrders:
    SIZES = (1500, 7, 0, 512, 1200)
    ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw")

    def privatized(self, seed):
        layout = Layout.build([torch.empty(n) for n in self.SIZES], [0, 0, 1, 2, 3])
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(n, generator=generator) for n in self.SIZES]
        limits = torch.tensor([30.0, 1.0, 1e9, 50.0])
        stats = privatize_(
            values, layout=layout, clip=limits, scale=torch.ones(4), form="fast", impl="triton",
            key=NoiseKey.from_seed(1, "philox10"), step=2,
        )  # fmt: skip
        return values, stats

    @pytest.mark.parametrize("window", [0, pytest.param(1 << 20, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))]
    )
    def test_give_the_bits_of_one_program_after_another(self, seed, window, monkeypatch):
        from triton.runtime.interpreter import interpreter_builder

        monkeypatch.setattr(launch_plan, "CHUNK", 512)
        monkeypatch.setattr(launch_plan, "WINDOW", window)
        monkeypatch.setattr(privatize, "TILES", dict.fromkeys(privatize.TILES, 512))
        monkeypatch.setattr(privatize, "_PROGRAMS_PER_SM", 4)
        baton, builder = Baton(seed), type(interpreter_builder)
        empty = torch.empty

        def poisoned(*arguments, **options):
            made = empty(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        # Sums that are not written yet would have the values of the launch before.
        monkeypatch.setattr(torch, "empty", poisoned)
        with monkeypatch.context() as patched:
            for name in self.ACCESSES:
                original = getattr(builder, name)

                def access(self, *arguments, original=original):
                    baton.switch()
                    return original(self, *arguments)

                patched.setattr(builder, name, access)
            kernel = Interleaved(privatize.privatize_kernel, baton)
            patched.setattr(privatize, "privatize_kernel", kernel)
            found, stats = self.privatized(seed + window)
        expected, wanted = self.privatized(seed + window)
        assert baton.switches > 300
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stats, wanted, strict=True))
