"""Train a network whose layers are split over devices: tensor and data parallelism.

    python examples/tensor_parallel.py

Eight devices form a mesh of 2 (data) x 4 (model); where there are fewer, the CPU plays
eight. The first layer is column parallel: each device of ``model`` holds a quarter of
its outputs. The second is row parallel: each holds a quarter of its inputs, and their
partial sums are added. XLA splits the work as the parameters and the images are split.

The program checks itself: what each device holds, what the devices send each other,
and the losses and parameters against those of x @ W.T + b on one device.
"""

import re
import sys
from collections import Counter

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from jaxlinear.nnx import Linear

DATA, MODEL = 2, 4
PIXELS, HIDDEN, CLASSES = 64, 128, 10
IMAGES, STEPS = 512, 10
OPTIMIZER = optax.sgd(0.5, momentum=0.9)
COLUMN, ROW = (None, "model"), ("model", None)  # How the axes (in, out) are split.

SHARDS = {  # What each device holds of each parameter.
    "column.weight": (HIDDEN // MODEL, PIXELS),
    "column.bias": (HIDDEN // MODEL,),
    "row.weight": (CLASSES, HIDDEN // MODEL),
    "row.bias": (CLASSES,),
}
SENT = {  # What the devices add up in a step, and over which axis of the mesh.
    (
        "all-reduce",
        (IMAGES // DATA, CLASSES),
    ): "model: output of the row-parallel layer",
    ("all-reduce", ()): "data: loss",
    **{("all-reduce", s): f"data: gradient of {name}" for name, s in SHARDS.items()},
}


class MLP(nnx.Module):
    def __init__(self, rngs):
        kernel, bias = {"out_sharding": COLUMN}, {"out_sharding": COLUMN[1:]}
        self.column = Linear(
            PIXELS, HIDDEN, kernel_metadata=kernel, bias_metadata=bias, rngs=rngs
        )
        kernel = {"out_sharding": ROW}
        self.row = Linear(HIDDEN, CLASSES, kernel_metadata=kernel, rngs=rngs)

    def __call__(self, x):
        return self.row(jax.nn.relu(self.column(x)))


def apply(params, x):
    graph = nnx.graphdef(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))))
    return nnx.merge(graph, params)(x)


def plain_apply(params, x):
    """The same without jaxlinear; the parameters have the names of ``SHARDS``."""
    x = jax.nn.relu(x @ params["column.weight"].T + params["column.bias"])
    return x @ params["row.weight"].T + params["row.bias"]


def create_state():
    params = nnx.state(MLP(nnx.Rngs(0)))
    return params, OPTIMIZER.init(params)


def make_train_step(apply):
    def loss(params, images, labels):
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train_step(state, images, labels):
        params, optimizer = state
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, optimizer = OPTIMIZER.update(grads, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), value

    return train_step


def train(train_step, state, data):
    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state, *data)
        losses.append(loss)
    return state, np.array(losses)


def load_data():
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:IMAGES] / 16, labels[:IMAGES]
    return images.astype(np.float32), labels.astype(np.int32)


def make_mesh():
    devices = jax.devices()
    if len(devices) < DATA * MODEL:
        devices = jax.devices("cpu")
    types, devices = (AxisType.Auto, AxisType.Auto), devices[: DATA * MODEL]
    return jax.make_mesh((DATA, MODEL), ("data", "model"), types, devices=devices)


def train_on_mesh(mesh, data):
    """The states before and after, the losses, and the two programs that made them."""
    with jax.set_mesh(mesh):
        shardings = nnx.get_named_sharding(nnx.eval_shape(create_state), mesh)
        create = jax.jit(create_state, out_shardings=shardings).lower().compile()
        initial = create()
        data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
        step = jax.jit(make_train_step(apply), out_shardings=(shardings, None))
        step = step.lower(initial, *data).compile()
        return initial, *train(step, initial, data), create, step


def train_on_one_device(device, params, data):
    """What the plain network learns from the same initial parameters."""
    params, data = jax.device_put((params, data), device)
    step = jax.jit(make_train_step(plain_apply))
    (params, _), losses = train(step, (params, OPTIMIZER.init(params)), data)
    return params, losses


# The checks


def check(condition, message):
    if not condition:
        sys.exit(f"tensor_parallel.py: check failed: {message}")


def named(params):
    return {
        ".".join(map(str, path)): param[...]
        for path, param in nnx.to_flat_state(params)
    }


def check_shards(state):
    """Each device holds its share of every parameter and of its momentum, no more."""
    params, (momentum, _) = state
    for name, array in [*named(params).items(), *named(momentum.trace).items()]:
        held = [shard.data.shape for shard in array.addressable_shards]
        right = held == [SHARDS[name]] * (DATA * MODEL)
        check(right, f"the devices hold {held} of {name}, expected {SHARDS[name]}")


def arrays_sent(program):
    """How often devices send an array: Counter of (kind, shape on each device)."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" = (.*) ({kinds})(?:-start)?\(", program.as_text())
    return Counter(
        (kind, tuple(int(n) for n in shape.split(",") if n))
        for types, kind in found
        for shape in re.findall(r"\w\[([\d,]*)\]", types)
    )


def check_programs(create, step):
    """No device ever makes a whole weight; a step sends what it must, and no more."""
    for whole in (f"[{HIDDEN},{PIXELS}]", f"[{CLASSES},{HIDDEN}]"):
        found = whole in create.as_text() + step.as_text()
        check(not found, f"a device makes a whole weight, of shape {whole}")
    sent, expected = arrays_sent(step), Counter(SENT.keys())
    check(sent == expected, f"the devices send {dict(sent)}, expected {dict(expected)}")


def check_error(name, actual, expected):
    """The relative error in the Frobenius norm, which must be one of rounding."""
    # Each step adds sums of at most IMAGES terms in another order. A float32 sum of n
    # terms is off by up to about n eps / 2 (Higham, Accuracy and Stability of Numerical
    # Algorithms, §4.2), on the mesh and on one device.
    tolerance = STEPS * IMAGES * np.finfo(np.float32).eps
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    check(error <= tolerance, f"{name} off by {error:.1e}, allowed {tolerance:.1e}")
    return f"{error:.1e}"


def main():
    jax.config.update("jax_num_cpu_devices", DATA * MODEL)
    # Accelerators may multiply in less than float32 where nobody forbids it.
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh, data = make_mesh(), load_data()
    initial, final, losses, create, step = train_on_mesh(mesh, data)
    start, end = (jax.device_get(named(state[0])) for state in (initial, final))
    plain_end, plain_losses = train_on_one_device(mesh.devices.flat[0], start, data)

    check_shards(initial)
    check_shards(final)
    check_programs(create, step)
    check(losses[-1] < losses[0] / 2, f"nothing is learnt, the losses are {losses}")
    error = check_error("loss", losses, plain_losses)
    learnt = Table("parameter", "on each device", "learnt, relative error")
    for name, shape in SHARDS.items():
        changes = end[name] - start[name], plain_end[name] - start[name]
        learnt.add_row(name, str(shape), check_error(name, *changes))
    sent = Table("sent", "array on each device", "over which axis")
    for (kind, shape), purpose in SENT.items():
        sent.add_row(kind, str(shape), purpose)

    print(f"loss {losses[0]:.4f}, after {STEPS} steps {losses[-1]:.4f}")
    print(f"relative error of the losses: {error}")
    Console().print(learnt, sent)


if __name__ == "__main__":
    main()
