"""Every strictness that JAX has, and eight devices, for all tests."""

import importlib.metadata
import os
import zlib

# The tests are of the package, and their eight devices are CPUs, also beside a GPU and
# in the processes that they start. `python -m jaxlinear` tests a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM takes a quarter of the time of the tests to optimise small programs. XLA's own
# passes, which choose the products and the collectives, are those of users.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)
# JAX 0.10 still has XLA's older emitters of fusions, which come after those passes and
# compile in about half the time. `.ci/run deep` also tests the forms for CPUs with the
# newer ones, which it asks for in ``XLA_FLAGS``: of two values the last counts.
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false " + os.environ["XLA_FLAGS"]
    )

import hypothesis
import jax
import pytest

from jaxlinear._op import cpu

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run: a failure is a change of the code, not of the seed.
# No deadline: an example compiles several programs.
hypothesis.settings.register_profile("jaxlinear", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jaxlinear")


def functions_of(form):
    """What chooses a form on CPU, as where ``form`` is that of bfloat16 products."""
    functions = {
        "bfloat16_form": lambda: form,
        "has_one_device": lambda: form in (cpu.READ, cpu.WIDENED),
    }
    if form in (cpu.READ, cpu.WIDENED):
        functions["_reads_bfloat16"] = lambda: form == cpu.READ
    return functions


# The form of bfloat16 products on CPU, where it is not to be that of this machine.
if form := os.environ.get("BFLOAT16_FORM"):
    vars(cpu).update(functions_of(form))

# The package as a mutant has it, for the test that must notice.
if mutant := os.environ.get("MUTANT"):
    from mutants import MUTANTS

    MUTANTS[mutant].breaks()


def pytest_collection_modifyitems(items):
    """Where ``HALF`` is 0 or 1, keep that half of the cases, and tests without any."""
    if half := os.environ.get("HALF"):
        items[:] = [
            item
            for item in items
            if "[" not in item.nodeid
            or zlib.crc32(item.nodeid.encode()) % 2 == int(half)
        ]


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """No file leaves its programs behind.

    Each has three mappings of memory on CPU, of which Linux gives a process 65,530: a
    process with some 20,000 programs dies.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def replace(monkeypatch):
    """A function that replaces a part of the package, of which JAX forgets programs."""

    def replace(place, name, value):
        monkeypatch.setattr(place, name, value)
        jax.clear_caches()

    yield replace
    jax.clear_caches()


@pytest.fixture
def use_form(replace):
    """A function that puts another form of bfloat16 products in force for the test."""

    def use(form):
        for name, function in functions_of(form).items():
            replace(cpu, name, function)

    return use
