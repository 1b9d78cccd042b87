"""Train a network whose layers are split over devices: tensor and data parallelism.

    python examples/tensor_parallel.py

Eight devices form a mesh of 2 (data) x 4 (model); with fewer, the CPU acts as eight.
The first layer is column parallel: each device of ``model`` holds a quarter of its
outputs. The second is row parallel: each holds a quarter of its inputs, and their
partial sums are added. XLA splits the work as the parameters and the images are split;
``explain`` says what the devices send each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import jaxlinear
from jaxlinear.nnx import Linear

jax.config.update("jax_num_cpu_devices", 8)
HIDDEN, IMAGES, STEPS = 128, 512, 20


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        column, row = (None, "model"), ("model", None)  # The kernel's axes (in, out).
        self.column = Linear(
            64,
            HIDDEN,
            kernel_metadata={"out_sharding": column},
            bias_metadata={"out_sharding": ("model",)},
            rngs=rngs,
        )
        self.row = Linear(HIDDEN, 10, kernel_metadata={"out_sharding": row}, rngs=rngs)

    def __call__(self, x):
        return self.row(nnx.relu(self.column(x)))


def mean_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    value, gradients = nnx.value_and_grad(lambda m: mean_loss(m(images), labels))(model)
    optimizer.update(model, gradients)
    return value


def train(data):
    """The model, and the loss of each step."""
    # Jitted, so that each device creates only its own part of a parameter.
    model = nnx.jit(lambda: MLP(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)
    losses = [train_step(model, optimizer, *data) for _ in range(STEPS)]
    return model, jnp.stack(losses)


def main():
    scans, digits = load_digits(return_X_y=True)
    data = np.float32(scans[:IMAGES] / 16), np.int32(digits[:IMAGES])
    devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
    types = AxisType.Auto, AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), types, devices=devices[:8])
    with jax.set_mesh(mesh):
        split = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
        model, losses = train(split)
        for path, param in nnx.to_flat_state(nnx.state(model)):
            held = param[...].addressable_shards[0].data.shape
            print(".".join(map(str, path)), param.shape, "each device holds", held)
        print(jaxlinear.explain(model, split[0]))

    one = jax.make_mesh((1, 1), ("data", "model"), types, devices=devices[:1])
    with jax.set_mesh(one):
        _, alone = train(jax.device_put(data, devices[0]))
    difference = np.abs(np.asarray(losses) - np.asarray(alone)).max()
    print(f"loss {losses[0]:.4f}, after {STEPS} steps {losses[-1]:.4f};", end=" ")
    print(f"at most {difference:.1e} from that on one device")


if __name__ == "__main__":
    main()
