"""The clock of accelerators, on traces of made-up runs with the layout of real ones.

The layout is what `cupti_collector.cc` and `xplane_schema.cc` of XLA write: a plane for
each device, a line for each stream, and a statistic that says what an event is.
"""

import itertools
import os
import tempfile
import types

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks import device_clock, pytorch, timing
from benchmarks.device_clock import (
    ATTEMPTS,
    LEAST_CALLS,
    busy_ns,
    plane_of,
    unequal,
    work,
)

# nanobind's types of JAX 0.12 do; as an error it would end the process.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

GPU, TPU = "/device:GPU:0", "/device:TPU:0"
STREAM = "Stream #13(Compute,MemcpyD2D)"
KERNEL, COPY, FILL = "kernel_details", "memcpy_details", "Memset_details"


def trace_of(planes):
    """A trace: {plane: {line: [(name, start, duration, statistic)]}}, in ns."""
    return ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace(
            "\n".join(plane_text(name, lines) for name, lines in planes.items())
        )
    )


def plane_text(name, lines):
    """In events and statistics, names are numbers, and the plane has what they mean."""
    events, statistics = {}, {"registers:32 block:128": 1}
    text = f'planes {{ name: "{name}"'
    for line, found in lines.items():
        text += f' lines {{ name: "{line}" timestamp_ns: 5000'
        for event, start, duration, statistic in found:
            number = events.setdefault(event, len(events) + 1)
            kind = statistics.setdefault(statistic, len(statistics) + 1)
            text += (
                f" events {{ metadata_id: {number} offset_ps: {1000 * start}"
                f" duration_ps: {1000 * duration}"
                f" stats {{ metadata_id: {kind} ref_value: 1 }} }}"
            )
        text += " }"
    for table, meanings in (("event", events), ("stat", statistics)):
        for meaning, number in meanings.items():
            value = f'value {{ id: {number} name: "{meaning}" }}'
            text += f" {table}_metadata {{ key: {number} {value} }}"
    return text + " }"


def call_at(start):
    """The kernels of one call: 8 µs, of which 1 µs is a gap."""
    return [
        ("gemm", start, 4000, KERNEL),
        ("MemcpyD2D", start + 4000, 1000, COPY),
        ("loop_add_fusion", start + 6000, 2000, KERNEL),
    ]


CALLS = 10
RUN = [event for k in range(CALLS) for event in call_at(50_000 * k)]


def seconds_of(planes, plane=GPU):
    return busy_ns(work(trace_of(planes), plane)) * 1e-9


def test_the_time_of_a_gpu_is_that_of_its_kernels_copies_and_fills():
    run = [*RUN, ("Memset 0", 700_000, 3000, FILL)]
    found = seconds_of({"/host:CPU": {}, GPU: {STREAM: run}})
    assert found == pytest.approx(CALLS * 7e-6 + 3e-6)


@pytest.mark.parametrize(
    ("start", "duration", "found"),
    # The gap is from 5000 to 6000 ns.
    [(1000, 2000, 7000), (3000, 2500, 7500), (1000, 6500, 8000), (9000, 500, 7500)],
    ids=["within", "into the gap", "over the gap", "after"],
)
def test_what_two_streams_do_at_once_counts_once(start, duration, found):
    other = [("MemcpyH2D", 50_000 * k + start, duration, COPY) for k in range(CALLS)]
    streams = {STREAM: RUN, "Stream #14(MemcpyH2D)": other}
    assert seconds_of({GPU: streams}) == pytest.approx(CALLS * found * 1e-9)


def test_a_stream_that_waited_for_the_profiler_counts_without_the_wait():
    run = [*RUN, ("BUFFER_FLUSH", 30_000, 9000, "context_id")]
    assert seconds_of({GPU: {"CUPTI overhead": run}}) == pytest.approx(CALLS * 7e-6)


def test_allocations_other_devices_and_derived_lines_do_not_count():
    lines = {
        STREAM: [*RUN, ("MemoryAlloc", 30_000, 9000, "memalloc_details")],
        "XLA Modules": [("jit_step", 0, 500_000, KERNEL)],
        "XLA Ops": [("dot.1", 0, 400_000, KERNEL)],
        "Steps": [("1", 0, 600_000, KERNEL)],
    }
    others = {
        "/device:GPU:1": {STREAM: [("gemm", 20_000, 9000, KERNEL)]},
        "/device:GPU:00": {STREAM: [("gemm", 20_000, 9000, KERNEL)]},
        "/host:CUPTI": {STREAM: [("cuLaunchKernel", 20_000, 9000, KERNEL)]},
    }
    assert seconds_of(others | {GPU: lines}) == pytest.approx(CALLS * 7e-6)


def test_the_time_of_a_tpu_is_that_of_its_programs():
    ops = [("fusion.1", 50_000 * k + 1000, 3000, "hlo_category") for k in range(CALLS)]
    modules = [("jit_step(7)", 50_000 * k, 6000, "run_id") for k in range(CALLS)]
    lines = {"XLA Modules": modules, "XLA Ops": ops, "Steps": modules}
    cores = {TPU: lines, f"{TPU} SparseCore 0": {"XLA Modules": modules * 2}}
    events = work(trace_of(cores), TPU)
    assert not unequal(events, CALLS)
    assert busy_ns(events) == pytest.approx(CALLS * 6000)


@pytest.mark.parametrize(
    "planes",
    [{"/host:CPU": {}}, {GPU: {}}, {GPU: {"XLA Ops": RUN}}, {TPU: {STREAM: RUN}}],
    ids=["only the host", "no line", "derived lines", "another device"],
)
def test_a_trace_without_work_of_the_device_is_refused(planes):
    with pytest.raises(RuntimeError, match=f"no work on {GPU} was recorded"):
        work(trace_of(planes), GPU)


def test_a_lost_event_is_noticed_and_a_kernel_may_run_twice_in_a_call():
    twice = [*RUN, *((name, s + 20_000, d, k) for name, s, d, k in RUN[::3])]
    assert unequal(work(trace_of({GPU: {STREAM: twice}}), GPU), CALLS) == {}
    for k in range(len(RUN)):
        events = work(trace_of({GPU: {STREAM: RUN[:k] + RUN[k + 1 :]}}), GPU)
        assert unequal(events, CALLS) == {RUN[k][0]: CALLS - 1}
    tail = work(trace_of({GPU: {STREAM: RUN[: len(RUN) // 2]}}), GPU)
    assert set(unequal(tail, CALLS)) == {name for name, *_ in RUN}


@pytest.fixture
def recorded(monkeypatch):
    """Puts the given traces in place of those that the profiler writes, in turn."""

    def instead(*traces):
        in_turn = itertools.cycle(traces)
        profiles = types.SimpleNamespace(from_file=lambda path: next(in_turn))
        monkeypatch.setattr(jax.profiler, "ProfileData", profiles)

    return instead


GOOD = trace_of({GPU: {STREAM: RUN}})
BAD = trace_of({GPU: {STREAM: RUN[1:]}})


@pytest.mark.parametrize("times", [1, 10])
def test_a_clock_gives_the_time_of_as_many_calls_as_it_is_asked_for(times, recorded):
    assert CALLS == LEAST_CALLS
    recorded(GOOD)
    calls = []
    seconds = device_clock.device_clock(lambda: calls.append(1), GPU)
    assert seconds(times) == pytest.approx(times * 7e-6)
    assert len(calls) == 1 + LEAST_CALLS


def test_a_trace_that_lost_events_is_recorded_again_and_not_for_ever(recorded):
    seconds = device_clock.device_clock(lambda: None, GPU)
    recorded(BAD, GOOD)
    assert seconds(10) == pytest.approx(7e-5)
    recorded(*[BAD] * ATTEMPTS, GOOD)
    with pytest.raises(RuntimeError, match=r"of 10 equal calls .* \{'gemm': 9\}"):
        seconds(10)


def test_a_trace_is_written_and_read_and_its_folder_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    call, x, results = jax.jit(lambda x: x @ x), jnp.ones((8, 8)), []
    profile = device_clock.trace(lambda: results.append(call(x)), 5)
    assert len(results) == 5
    # Of the host nothing is recorded, not to slow it, and of the programs only times.
    planes = {plane.name: [*plane.lines] for plane in profile.planes}
    assert not any(planes.values())
    assert "/host:metadata" not in planes
    assert [*tmp_path.iterdir()] == []
    # The next one can start.
    with pytest.raises(RuntimeError, match=r"no work on /device:CPU:0 .*'/host:CPU'"):
        device_clock.device_clock(lambda: None, plane_of(jax.devices("cpu")[0]))(1)
    assert [*tmp_path.iterdir()] == []


def test_a_trace_that_a_call_breaks_off_is_ended_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        device_clock.trace(lambda: 1 / 0, 1)
    device_clock.trace(lambda: None, 1)
    assert [*tmp_path.iterdir()] == []


class OnGPU:
    """An argument that says it is on a GPU, and is on this CPU."""

    device = types.SimpleNamespace(platform="gpu", local_hardware_id=0)


def test_a_program_on_a_device_has_its_clock_and_compiles_once(recorded, monkeypatch):
    recorded(GOOD)
    x, events = jnp.ones((8, 8)), []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, *_, **__: events.append(event))
    with monkeypatch.context() as patch:
        patch.setattr(jax.tree, "leaves", lambda tree: [OnGPU])
        program = timing.compiled(lambda x: jnp.tanh(x) @ x, (x,))
    assert program.seconds(10) == pytest.approx(7e-5)
    assert program.call().shape == (8, 8)
    assert sum("backend_compile" in event for event in events) == 1


def test_pytorch_on_a_gpu_has_the_same_clock(recorded, monkeypatch):
    recorded(GOOD)
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, "true")
    assert pytorch._clock(lambda: None, "cpu")(1) < 1
    assert os.environ[name] == "true"
    assert pytorch._clock(lambda: None, "cuda")(10) == pytest.approx(7e-5)
    assert os.environ[name] == "false"
