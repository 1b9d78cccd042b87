"""What the benchmarks' clock does, and what they say of a bad run."""

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from benchmarks import machine, pytorch, timing
from benchmarks.ceilings import copy_speed
from benchmarks.results_file import AGAIN, NAIVE, OURS, Row, doubts, figures
from benchmarks.timing import Program, interleaved, wall_clock
from benchmarks.workloads import MODES, WORKLOADS, answers, problem

HAS_PYTORCH = importlib.util.find_spec("torch") is not None
needs_pytorch = pytest.mark.skipif(not HAS_PYTORCH, reason="PyTorch is not installed")
CPU = jax.devices("cpu")[0]
MLP = next(w for w in WORKLOADS if w.name.startswith("MLP"))


class Clock:
    """In place of the machine's, and the order in which programs were timed."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def program(self, name, seconds):
        """What takes each of ``seconds`` in turn, again and again."""
        each = itertools.cycle(seconds)

        def spent(times):
            self.order.append(name)
            elapsed = next(each) * times
            self.now += elapsed
            return elapsed

        return Program(call=lambda: None, seconds=spent)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_program_that_is_far_slower_is_timed_once(clock):
    times = {OURS: 0.02, "other": 0.01, "slow": 5.0}
    programs = {name: clock.program(name, [s]) for name, s in times.items()}
    samples = interleaved(programs, 0.75)
    assert {name: len(s) for name, s in samples.items()} == {
        OURS: 15,
        "other": 15,
        "slow": 1,
    }
    long = {OURS: clock.program(OURS, [100.0]), "other": clock.program("", [101.0])}
    assert {len(s) for s in interleaved(long, 0.75).values()} == {1}


def test_the_rounds_are_shuffled(clock, monkeypatch):
    monkeypatch.setattr(timing, "PRECISION", -1.0)  # They go on to the last second.
    names = "abcd"
    programs = {name: clock.program(name, [0.01]) for name in names}
    assert len(interleaved(programs, 2.0)["a"]) == 200
    rounds = [tuple(clock.order[k : k + 4]) for k in range(8, len(clock.order), 4)]
    assert all(sorted(order) == [*names] for order in rounds)
    assert len(set(rounds)) == 24
    # Each comes about equally often behind each other one.
    pairs = [pair for order in rounds for pair in itertools.pairwise(order)]
    counts = [pairs.count(pair) for pair in itertools.permutations(names, 2)]
    assert max(counts) < 2 * min(counts)


def test_rounds_go_on_until_the_ratios_are_known(clock):
    def rounds_of(spread):
        ours = clock.program(OURS, [0.01])
        other = clock.program("other", [0.01, 0.01 * spread, 0.01 / spread])
        return len(interleaved({OURS: ours, "other": other}, 3.0)[OURS])

    assert rounds_of(1.0) == 15
    assert 15 < rounds_of(1.05) < rounds_of(1.1) < 300
    # Not for more than the seconds.
    assert rounds_of(2.0) * 0.02 == pytest.approx(2 * 3.0, rel=0.2)


def test_a_quarter_as_many_calls_come_before_those_that_are_timed():
    calls = []

    def call():
        calls.append(time.sleep(0.02 if len(calls) < 2 else 0.005))

    assert 0.04 < wall_clock(call)(8) < 0.08
    assert len(calls) == 10


def test_the_naive_formula_is_compared_with_itself():
    samples = {OURS: np.array([1.0, 1.0]), NAIVE: np.array([2.0, 2.0])}
    samples[AGAIN] = np.array([2.2, 2.2])
    assert figures(samples, AGAIN)["ratio"] == pytest.approx(1.1)
    assert figures(samples, NAIVE)["ratio"] == pytest.approx(2.0)


def row(**fields):
    numbers = {field.name: 1 for field in dataclasses.fields(Row)}
    good = {"library": AGAIN, "ratio": 1.01, "others_cores": 0.01}
    return Row(**(numbers | good | {"share_of_limit": 0.9} | fields))


def test_a_good_run_has_no_doubts_nor_has_one_that_measured_no_load():
    assert doubts([row(), row(others_cores=None), row(library=OURS, ratio=2.0)]) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"others_cores": 0.5}, "other processes used up to 0.5 cores in 1 of 2 rows"),
        ({"share_of_limit": 1.5}, "1 of 2 rows reach more than 100 %, up to 150% of"),
        ({"ratio": 0.9}, "takes 0.90 to 0.90 of its own time in 1 of 2 cells"),
    ],
    ids=["load", "limit", "itself"],
)
def test_a_bad_run_says_why(fields, said):
    [doubt] = doubts([row(), row(**fields)])
    assert said in doubt


def test_the_load_is_what_others_use(clock, monkeypatch):
    """Not what this process and its children use, nor what is idle or counted twice."""
    cores = {"user": 10.0, "steal": 1.0, "idle": 7.0, "guest": 10.0}
    used = {"ours": 3.0, "a child's": 1.0}

    def process(name, children=()):
        times = types.SimpleNamespace(user=used[name], system=0.0)
        return types.SimpleNamespace(
            cpu_times=lambda: times, children=lambda recursive: [*children]
        )

    monkeypatch.setattr(
        machine,
        "psutil",
        types.SimpleNamespace(
            cpu_times=lambda: types.SimpleNamespace(_asdict=lambda: dict(cores)),
            Process=lambda: process("ours", [process("a child's")]),
        ),
    )
    load = machine.Load()
    clock.now += 10
    cores |= {"user": 24.0, "steal": 2.0, "idle": 12.0, "guest": 15.0}
    used |= {"ours": 8.0, "a child's": 6.0}
    # 15 s busy, of which 10 are ours, in 10 s.
    assert load.of_others() == pytest.approx(0.5)


def test_a_small_array_is_copied_as_fast_as_the_cache_allows():
    limits = {"copy": {"bytes": [2**10, 2**20], "bytes_per_s": [100.0, 10.0]}}
    assert copy_speed(limits, 2**11) == 100
    assert copy_speed(limits, 2**19) == copy_speed(limits, 2**30) == 10


@needs_pytorch
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_the_layer_of_pytorch_is_right_and_timed_in_another_process(dtype):
    arrays = problem(MLP, dtype)
    compute_dtype = "float32" if dtype == "float32" else "bfloat16"
    programs = pytorch.layer(arrays, compute_dtype, CPU)
    exact = answers(arrays, dtype)
    assert [*programs] == [*MODES]
    for mode, program in programs.items():
        for name, result in zip(MODES[mode], program.call(), strict=True):
            np.testing.assert_allclose(
                result, exact[name][0], atol=0.1 * abs(exact[name][0]).max()
            )
        assert program.seconds(2) > 0
    pids = {pytorch._process().submit(time.process_time).result() for _ in range(2)}
    # It answers when its threads sleep.
    assert max(pids) - min(pids) < 0.01


@needs_pytorch
def test_pytorch_says_its_threads_and_its_instructions():
    found = pytorch.described()
    assert int(found["threads"]) >= 1
    assert set(found) == {"threads", "float32", "bfloat16"}


def test_a_restricted_processor_is_one_without_bfloat16_instructions():
    program = (
        "import jax\n"
        "from benchmarks.machine import describe, place\n"
        "print(place(describe(jax.devices()[0])))"
    )
    flags = "--xla_cpu_max_isa=AVX2"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("CPU without bfloat16 instructions")
    assert f"restricted by `XLA_FLAGS={flags}`" in run.stdout
