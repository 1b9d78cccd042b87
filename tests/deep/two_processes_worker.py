"""One of two processes that train a linear layer together, half of the rows each.

    python tests/two_processes_worker.py ADDRESS RANK DTYPE FILES

``FILES`` has the problem in ``problem.npz``; the parameters after two steps of gradient
descent on the mean square error are written there, in ``parameters-RANK.npz``.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlinear import linear

STEPS, RATE = 2, 0.25


def loss(parameters, x, target, dtype):
    y = linear(x, *parameters, dtype=dtype)
    return jnp.mean((y.astype(target.dtype) - target) ** 2)


def main(address, rank, dtype, files):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, num_processes=2, process_id=int(rank), initialization_timeout=60
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    problem = np.load(files / "problem.npz")
    mine = np.split(np.arange(len(problem["x"])), 2)[jax.process_index()]
    data = [
        jax.make_array_from_process_local_data(rows, problem[name][mine])
        for name in ("x", "target")
    ]
    parameters = [
        jax.make_array_from_process_local_data(everywhere, problem[name])
        for name in ("weight", "bias")
    ]

    @jax.jit
    def step(parameters, x, target):
        gradients = jax.grad(loss)(parameters, x, target, dtype)
        return jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients)

    for _ in range(STEPS):
        parameters = step(parameters, *data)
    weight, bias = map(np.asarray, parameters)
    np.savez(files / f"parameters-{rank}.npz", weight=weight, bias=bias)


if __name__ == "__main__":
    *arguments, folder = sys.argv[1:]
    main(*arguments, Path(folder))
