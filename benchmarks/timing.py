"""How it is timed: compiled ahead, interleaved, and blocked on inside the clock."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

SAMPLE_SECONDS = 2e-3
"""A sample that is shorter than this consists of several calls."""


@dataclasses.dataclass
class Program:
    """``call()`` returns the results, ``run(n)`` computes them n times and waits."""

    call: Callable
    run: Callable
    compile_s: float | None = None
    peak_bytes: int | None = None


def compiled(function, arguments):
    """A program of a jitted JAX function."""
    jitted = jax.jit(function)
    start = time.perf_counter()
    executable = jitted.lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    memory = executable.memory_analysis()
    peak = None
    if memory is not None:
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
        )

    def call():
        return jax.block_until_ready(jitted(*arguments))

    on_device = jax.tree.leaves(arguments)[0].device.platform != "cpu"
    run = repeated_on_device(function, arguments) if on_device else _one_by_one(call)
    return Program(call, run, compile_s, peak)


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


def interleaved(programs, seconds, min_rounds=5):
    """Seconds of a call of each program in each round: {name: array (rounds,)}.

    The rounds go on for about ``seconds`` per program. In each round every program is
    timed once, so that what slows the machine down for a while slows all of them; and
    each comes first in turn, because some leave threads behind that slow the next one.
    """
    times = {name: calls_per_sample(program) for name, program in programs.items()}
    samples = {name: [] for name in programs}
    end = time.perf_counter() + seconds * len(programs)
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        first = rounds % len(programs)
        for name in [*programs][first:] + [*programs][:first]:
            start = time.perf_counter()
            programs[name].run(times[name])
            samples[name].append((time.perf_counter() - start) / times[name])
        rounds += 1
    return {name: np.array(s) for name, s in samples.items()}


def calls_per_sample(program):
    program.run(1)  # Compiles, and warms up.
    start = time.perf_counter()
    program.run(1)
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
