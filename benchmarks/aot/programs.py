"""What is compiled: a case, and its programs on one device.

A case has a name, ``mlp-mixed-bias``: the program, its dtypes, and whether there are
biases. Its layers are ours, the naive formula or Flax's; over several devices they are
also ours with the gradients reduced in the compute dtype, as the others reduce them.
There may be `jax.checkpoint` around each layer.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import jaxlinear
from benchmarks import peers
from benchmarks.workloads import WORKLOADS, Workload

DTYPES = {  # dtype of x and of the computation, dtype of the parameters
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
}
BIASES = {"bias": True, "plain": False}
ROWS, WIDTH, HIDDEN = 4096, 2048, 8192
STACK = {"layers": 24, "width": 1024, "hidden": 4096}
LAYERS = {workload.name.replace(" ", "_"): workload for workload in WORKLOADS}
LAYERS["layer"] = Workload("layer", (ROWS,), WIDTH, HIDDEN)
PROGRAMS = ["layer", "mlp", "stack", *(name for name in LAYERS if name != "layer")]
CASES = ["-".join(case) for case in itertools.product(PROGRAMS, DTYPES, BIASES)]


def reduced(parameters, x, dtype, out_sharding=None):
    """Ours, rounding to the compute dtype before devices sum."""
    product = jaxlinear.Product(preferred_element_type=dtype)
    products = jaxlinear.Products(product, product, product)
    return peers.ours(parameters, x, dtype, out_sharding, products)


CONTENDERS = {
    "ours": peers.ours,
    "ours, reduced": reduced,
    "naive": peers.naive,
    "Flax": peers.flax_nnx,
}
EIGHT_BITS = {
    name: functools.partial(peers.ours, products=getattr(jaxlinear, name))
    for name in ("FLOAT8", "INT8")
}
LINES = {
    "fenced": {},
    "unfenced": {"prevent_cse": False},
    "with the policy": {
        "prevent_cse": False,
        "policy": jax.checkpoint_policies.save_only_these_names(
            "linear_x", "linear_scale"
        ),
    },
}
"""`jax.checkpoint` around a layer."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the layers of which it is made."""

    program: str
    dtype: str
    param_dtype: str
    has_bias: bool
    contender: str
    line: str | None = None

    @classmethod
    def named(cls, name, contender, line=None):
        program, dtypes, bias = name.split("-")
        return cls(program, *DTYPES[dtypes], BIASES[bias], contender, line)

    @property
    def is_transposed(self):
        """Whether a weight is (in, out)."""
        return self.contender == "Flax"

    def layer(self, parameters, x, out_sharding=None):
        def apply(parameters, x):
            layer = (CONTENDERS | EIGHT_BITS)[self.contender]
            return layer(parameters, x, self.dtype, out_sharding)

        if self.line:
            apply = jax.checkpoint(apply, **LINES[self.line])
        return apply(parameters, x)

    def parameters(self, in_features, out_features, layers=None):
        """Those of one layer, or of a stack of them."""
        weight = out_features, in_features
        shapes = [weight[::-1] if self.is_transposed else weight, (out_features,)]
        stack = () if layers is None else (layers,)
        return [
            jax.ShapeDtypeStruct((*stack, *shape), self.param_dtype)
            for shape in shapes[: 1 + self.has_bias]
        ]


def mean_square(y):
    """A loss."""
    return jnp.mean(jnp.square(y.astype("float32")))


def on_one(case, device):
    """The function of a case and its arguments, on ``device``."""
    make = {"mlp": _mlp, "stack": _stack}.get(case.program, _layer)
    function, arguments = make(case)
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda a: a.update(sharding=sharding), arguments)
    return jax.jit(function), arguments


def _layer(case):
    """Y and every gradient of one layer."""

    def step(parameters, x, G):
        y, gradients = jax.vjp(case.layer, parameters, x)
        return y, gradients(G)

    layer = LAYERS[case.program]
    x, G = (
        jax.ShapeDtypeStruct((*layer.leading, features), case.dtype)
        for features in (layer.in_features, layer.out_features)
    )
    return step, (case.parameters(layer.in_features, layer.out_features), x, G)


def _mlp(case):
    """A loss of two layers and its gradient."""

    def loss(parameters, x):
        return mean_square(_block(case, parameters, x))

    parameters = case.parameters(WIDTH, HIDDEN), case.parameters(HIDDEN, WIDTH)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), case.dtype)
    return jax.value_and_grad(loss), (parameters, x)


def _stack(case):
    """The same for a scanned stack of residual blocks, recomputed in the backward."""

    @jax.checkpoint
    def step(x, parameters):
        return x + _block(case, parameters, x), None

    def loss(parameters, x):
        return mean_square(jax.lax.scan(step, x, parameters)[0])

    layers, width, hidden = STACK["layers"], STACK["width"], STACK["hidden"]
    up = case.parameters(width, hidden, layers)
    down = case.parameters(hidden, width, layers)
    x = jax.ShapeDtypeStruct((ROWS, width), case.dtype)
    return jax.value_and_grad(loss), ((up, down), x)


def _block(case, parameters, x):
    """Two layers with GELU between them."""
    up, down = parameters
    return case.layer(down, jax.nn.gelu(case.layer(up, x)))
