"""How it is timed: compiled ahead, interleaved, and blocked on inside the clock."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

SAMPLE_SECONDS = 2e-3
"""A sample that is shorter than this consists of several calls."""

MIN_ROUNDS = 15
FAR = 4


@dataclasses.dataclass
class Program:
    """``call()`` returns the results, ``run(n)`` computes them n times and waits."""

    call: Callable
    run: Callable
    compile_s: float | None = None
    peak_bytes: int | None = None
    temporary_bytes: int | None = None
    kept_bytes: int | None = None
    loss: float | None = None


def compiled(function, arguments):
    """A program of a jitted JAX function."""
    jitted = jax.jit(function)
    start = time.perf_counter()
    executable = jitted.lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    memory = executable.memory_analysis()
    peak = temporaries = None
    if memory is not None:
        temporaries = memory.temp_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + temporaries

    def call():
        return jax.block_until_ready(jitted(*arguments))

    on_device = jax.tree.leaves(arguments)[0].device.platform != "cpu"
    run = repeated_on_device(function, arguments) if on_device else _one_by_one(call)
    return Program(call, run, compile_s, peak, temporaries)


def eager(call, wait=lambda: None):
    """A program that runs as it is called; ``wait`` blocks where ``call`` does not."""
    return Program(call, _one_by_one(call, wait))


def _one_by_one(call, wait=lambda: None):
    def run(times):
        for _ in range(times):
            call()
        wait()

    return run


def repeated_on_device(function, arguments):
    """Repeat the function in one program, where wall time would measure Python.

    The barrier makes every repetition wait for the one before, and keeps XLA from
    computing them all at once.
    """

    def repeat(times, arguments):
        def body(_, carry):
            arguments, _ = lax.optimization_barrier(carry)
            return arguments, function(*arguments)

        return lax.fori_loop(0, times - 1, body, (arguments, function(*arguments)))[1]

    repeated = jax.jit(repeat, static_argnums=0)
    return lambda times: jax.block_until_ready(repeated(times, arguments))


def interleaved(programs, seconds):
    """Seconds of a call of each program in each round: {name: array (rounds,)}.

    The rounds go on for about ``seconds`` per program, and on to ``MIN_ROUNDS`` where a
    sample takes no longer than that. In each round every program is timed once, so that
    what slows the machine down for a while slows all of them; and each comes first in
    turn, because some leave threads behind that slow the next one. A program that is
    ``FAR`` slower than the typical one, and takes longer than ``seconds``, is timed in
    the first round only: the others would wait for it.
    """
    spent = {name: warm_call(program, seconds) for name, program in programs.items()}
    times = {name: max(1, round(SAMPLE_SECONDS / s)) for name, s in spent.items()}
    far = max(seconds, FAR * float(np.median([*spent.values()])))
    samples = {name: [] for name in programs}
    names, rounds, total, budget = [*programs], 0, 0.0, seconds * len(programs)
    while not rounds or is_worth_a_round(rounds, total, budget):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            programs[name].run(times[name])
            elapsed = time.perf_counter() - start
            samples[name].append(elapsed / times[name])
            total += elapsed if spent[name] <= far else 0
        names = [name for name in names if spent[name] <= far]
        rounds += 1
    return {name: np.array(s) for name, s in samples.items()}


def is_worth_a_round(rounds, total, budget):
    next_total = total + total / rounds
    return total < budget or (rounds < MIN_ROUNDS and next_total <= MIN_ROUNDS * budget)


def warm_call(program, seconds):
    """The seconds of a call; a long one is not made twice for nothing."""
    spent = 0.0
    for _ in range(2):  # The first compiles on an accelerator, and warms up.
        start = time.perf_counter()
        program.run(1)
        spent = time.perf_counter() - start
        if spent > 10 * seconds:
            break
    return spent
