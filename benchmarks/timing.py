"""How it is timed: compiled ahead, in shuffled rounds, blocked on inside the clock."""

import dataclasses
import random
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.device_clock import device_clock, plane_of

SAMPLE_SECONDS = 2e-3
"""A sample that is shorter than this consists of several calls."""

MIN_ROUNDS = 15
PRECISION = 0.006
"""The standard error of the median ratios that ends the rounds."""

FAR = 4


@dataclasses.dataclass
class Program:
    """``call()`` returns the results, ``seconds(n)`` what n calls take by its clock."""

    call: Callable
    seconds: Callable[[int], float]
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

    device = jax.tree.leaves(arguments)[0].device
    is_cpu = device.platform == "cpu"
    seconds = wall_clock(call) if is_cpu else device_clock(call, plane_of(device))
    return Program(call, seconds, compile_s, peak, temporaries)


def eager(call):
    """A program that runs as it is called."""
    return Program(call, wall_clock(call))


def wall_clock(call):
    """The seconds of some calls, after a quarter as many that are not counted.

    Those bring the arguments into the caches, and wake the threads.
    """

    def seconds(times):
        for _ in range(times // 4):
            call()
        start = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - start

    return seconds


def interleaved(programs, seconds):
    """Seconds of a call of each program in each round: {name: array (rounds,)}.

    In each round every program is timed once, so that what slows the machine down for a
    while slows all of them, and in an order that is drawn anew, because some slow the
    one that follows. The rounds go on until the median ratios to the first program are
    known to ``PRECISION``, and there are ``MIN_ROUNDS``; at most for ``seconds`` per
    program. A program that is ``FAR`` slower than the typical one, and takes more than
    a ``MIN_ROUNDS``th of its time, is timed in the first round only: the others would
    wait for it.
    """
    spent = {name: warm_call(program, seconds) for name, program in programs.items()}
    times = {name: max(1, round(SAMPLE_SECONDS / s)) for name, s in spent.items()}
    far = max(seconds / MIN_ROUNDS, FAR * float(np.median([*spent.values()])))
    samples = {name: [] for name in programs}
    names, total, budget = [*programs], 0.0, seconds * len(programs)
    order = random.Random(0)
    while not total or is_worth_a_round([samples[n] for n in names], total, budget):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            samples[name].append(programs[name].seconds(times[name]) / times[name])
            total += time.perf_counter() - start if spent[name] <= far else 0
        names = [name for name in names if spent[name] <= far]
    return {name: np.array(s) for name, s in samples.items()}


def ratios(seconds, base):
    """In the rounds that both have: a slow program has one only."""
    shared = min(len(seconds), len(base))
    return seconds[:shared] / base[:shared]


def is_worth_a_round(samples, total, budget):
    """Whether the rounds go on, after the ``samples`` of each program in ``total`` s.

    The next one must fit into the ``budget`` of seconds.
    """
    rounds = len(samples[0])
    if total * (1 + 1 / rounds) > budget:
        return False
    return rounds < MIN_ROUNDS or standard_error(samples) > PRECISION


def standard_error(samples):
    """The largest, relative, of the median ratios to the first program."""
    logarithms = np.log(samples)
    ratios = logarithms[1:] - logarithms[0]
    low, high = np.quantile(ratios, [0.25, 0.75], axis=-1)
    # Of a normal distribution, by its quartiles.
    deviations = (high - low) / 1.349
    return float(np.max(1.2533 * deviations / ratios.shape[1] ** 0.5, initial=0.0))


def warm_call(program, seconds):
    """The seconds of a call; a long one is not made twice for nothing."""
    spent = 0.0
    for _ in range(2):  # The first warms up.
        spent = program.seconds(1)
        if spent > seconds:
            break
    return spent
