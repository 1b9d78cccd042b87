"""Data parallelism over two processes, each with half of the rows and one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_array, random_problem, relative_error, wide

TESTS = Path(__file__).parent
WORKER = TESTS / "two_processes_worker.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(TESTS.parents[1]),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}
ENVIRONMENT.pop("XLA_FLAGS", None)  # One device in each process.
ROWS, IN, OUT = 8, 4, 2
STEPS, RATE = 2, 0.25  # Those of the worker.
EPS = float(np.finfo(np.float32).eps)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_in_two_processes(folder, dtype, problem):
    """The parameters with which each of the two processes ends."""
    np.savez(folder / "problem.npz", **problem)
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, address, rank, dtype, folder],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [dict(np.load(folder / f"parameters-{rank}.npz")) for rank in (0, 1)]


def rounded(values, dtype):
    """``values`` in ``dtype``, where float32 must agree with float64.

    Float32 knows a sum of 4 terms and a bias but for a few eps of the largest one. No
    value may be so near to the middle of two values of ``dtype`` that this decides.
    """
    if dtype == "float32":
        return values
    doubt = 32 * EPS * np.abs(values).max()
    low, high = (wide((values + d).astype(jnp.dtype(dtype))) for d in (-doubt, doubt))
    np.testing.assert_array_equal(low, high)
    return low


def train_in_float64(dtype, x, target, weight, bias):
    """The same steps on all rows, written out in NumPy."""
    x, target, weight, bias = map(wide, (x, target, weight, bias))
    for _ in range(STEPS):
        X, W = rounded(x, dtype), rounded(weight, dtype)
        Y = rounded(X @ W.T + bias, dtype)
        G = rounded(2 * (Y - target) / Y.size, dtype)
        weight, bias = weight - RATE * G.T @ X, bias - RATE * G.sum(axis=0)
    return {"weight": weight, "bias": bias}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request, tmp_path_factory):
    """The dtype, the problem, and the parameters with which each process ends."""
    folder = tmp_path_factory.mktemp(request.param)
    # Operands that bfloat16 holds, and a target with which `rounded` has no doubt.
    x, weight, bias, _ = random_problem((ROWS,), IN, OUT, "bfloat16")
    problem = {"x": x, "weight": weight, "bias": bias}
    problem = {name: np.asarray(a, np.float32) for name, a in problem.items()}
    problem["target"] = np.asarray(random_array(4, (ROWS, OUT), "float32"))
    ends = train_in_two_processes(folder, request.param, problem)
    return request.param, problem, ends


def test_two_processes_end_with_bit_identical_parameters(trained):
    _, _, (first, second) = trained
    for name, values in first.items():
        assert values.dtype == np.float32
        assert values.tobytes() == second[name].tobytes()


def test_two_processes_learn_what_one_learns_from_all_rows(trained):
    dtype, problem, (actual, _) = trained
    expected = train_in_float64(dtype, **problem)
    for name in ("weight", "bias"):
        start = wide(problem[name])
        learnt, exactly = wide(actual[name]) - start, expected[name] - start
        # A sum of n terms is off by about n eps / 2 of their magnitudes. In each step
        # there are one over IN terms and the bias, and one over ROWS; the parameter is
        # rounded besides. In mixed precision the rounding to bfloat16 is the oracle's
        # too, and nothing after it is rounded to less than float32.
        tolerance = STEPS * (IN + ROWS + 3) * EPS
        assert relative_error(learnt, exactly) < tolerance
