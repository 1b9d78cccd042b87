"""The clock of accelerators: what the device itself says of its work.

Wall time has Python and the queue in it. A function that is repeated in one compiled
program is another program: XLA moves work between the repetitions. So some calls run
under JAX's profiler, and their time is that in which the device ran a kernel or copied.
Where two streams work at once, that time counts once. The gaps between kernels do not
count: in eager PyTorch they are Python's. The profiler records what any library of the
process runs, so PyTorch on a GPU has the same clock.
"""

import collections
import math
import pathlib
import tempfile
import typing

import jax

LEAST_CALLS = 10
"""In a sample: each costs a trace, and fewer calls would show lost events less well."""

ATTEMPTS = 3

TPU_LINE = "XLA Modules"
"""Has one event for each time that a program ran; other lines have its parts again."""

GPU_LINES = "Stream #", "CUPTI overhead"
"""How lines with kernels start: a stream has the second name once it waited for CUPTI.

Others, as "XLA Ops", are derived from them.
"""

GPU_WORK = {"kernel_details", "memcpy_details", "Memset_details"}
"""One of these statistics has an event that is work; allocations have others."""


class Event(typing.NamedTuple):
    name: str
    start_ns: float
    end_ns: float


def plane_of(device):
    """The name of the part of a trace that has the work of a device."""
    return f"/device:{device.platform.upper()}:{device.local_hardware_id}"


def device_clock(call, plane):
    """A clock: the seconds that the device of this plane works for some calls.

    ``call`` waits for its results. At least ``LEAST_CALLS`` are made, after one that is
    not counted: it may compile.
    """

    def seconds(times):
        calls = max(times, LEAST_CALLS)
        call()
        lost = {}
        for _ in range(ATTEMPTS):
            events = work(trace(call, calls), plane)
            lost = unequal(events, calls)
            if not lost:
                return busy_ns(events) * 1e-9 * times / calls
        raise RuntimeError(
            f"the profiler loses events, {ATTEMPTS} times in turn: of {calls} equal"
            f" calls {plane} has {lost}"
        )

    return seconds


def trace(call, calls):
    """What the profiler recorded of some calls."""
    options = jax.profiler.ProfileOptions()
    # Only the device: what is recorded of the host takes time there.
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                call()
        [file] = pathlib.Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_file(str(file))


def work(profile, plane):
    """The events in which the device of this plane is busy; RuntimeError without any.

    They are of all programs: the trace has no other calls than those that are timed.
    """
    is_tpu = plane.startswith("/device:TPU:")
    events = []
    for found in profile.planes:
        for line in found.lines if found.name == plane else []:
            if line.name.startswith(TPU_LINE if is_tpu else GPU_LINES):
                events += [event for event in line.events if is_tpu or is_work(event)]
    if not events:
        planes = [found.name for found in profile.planes]
        raise RuntimeError(f"no work on {plane} was recorded; the trace has {planes}")
    return [Event(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in events]


def is_work(event):
    return any(name in GPU_WORK for name, _ in event.stats)


def unequal(events, calls):
    """{name: count} of the events that not every call can have as often.

    The profiler drops events, when its buffers are full or a time stamp is wrong:
    without this check a program would be fast whose kernels were lost.
    """
    counts = collections.Counter(event.name for event in events)
    return {name: count for name, count in counts.items() if count % calls}


def busy_ns(events):
    """The length of the union of the events' intervals."""
    busy, until = 0.0, -math.inf
    for start, end in sorted((event.start_ns, event.end_ns) for event in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy
