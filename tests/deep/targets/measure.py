"""What a program costs on a GPU or a TPU, as its compiler says without the device.

    python tests/deep/targets/measure.py TARGET [CASE ...]

compiles our layer, the naive formula and Flax's for TARGET (h100, b200, v5e, v6e or
tpu7x) and prints a line of JSON for each: its kernels, the MiB that they read and
write, and the MiB of temporary memory. Without cases all of them: `layer`, `mlp` or
`stack`, then `float32`, `bfloat16` or `mixed`, then `bias` or `plain`, as in
`layer-mixed-bias`. For GPUs each is compiled twice, with products by Triton and by
cuBLAS: on a device XLA chooses between them by timing.

A process of its own, since the compiler may abort the one that it runs in.
"""

import itertools
import json
import os
import pathlib
import sys

from without_tpu import SETTINGS

os.environ |= SETTINGS

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from kernels import kernels

import jaxlinear

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
TOPOLOGIES |= {"v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
B200 = {"{ major: 9 }": "{ major: 10 }", "132": "148", "H100 80GB HBM3": "B200"}
B200 |= {"12.8.0": "13.0.0"}
BACKENDS = {"triton": None, "cublas": {"xla_gpu_enable_triton_gemm": False}}
PROGRAMS = ["layer", "mlp", "stack"]
# name: dtype of x, of the parameters and of the computation
DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
}
BIASES = ["bias", "plain"]
CASES = ["-".join(case) for case in itertools.product(PROGRAMS, DTYPES, BIASES)]
ROWS, WIDTH, HIDDEN = 4096, 2048, 8192
LAYERS, STACK_WIDTH, STACK_HIDDEN = 24, 1024, 4096


def naive(parameters, x, dtype):
    weight, *bias = parameters
    y = x.astype(dtype) @ weight.astype(dtype).T
    return y + bias[0].astype(dtype) if bias else y


def ours(parameters, x, dtype):
    return jaxlinear.linear(x, *parameters, dtype=dtype)


def formula(apply):
    """``apply`` and its parameters, as ``flax_linear`` gives its own."""

    def layer(in_features, out_features, dtype, param_dtype, has_bias):
        shapes = [(out_features, in_features), (out_features,)][: 1 + has_bias]
        parameters = [jax.ShapeDtypeStruct(shape, param_dtype) for shape in shapes]
        return (lambda parameters, x: apply(parameters, x, dtype)), parameters

    return layer


def flax_linear(in_features, out_features, dtype, param_dtype, has_bias):
    module = nnx.eval_shape(
        lambda: nnx.Linear(
            in_features,
            out_features,
            use_bias=has_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )
    )
    definition, parameters = nnx.split(module)
    return (lambda parameters, x: nnx.merge(definition, parameters)(x)), parameters


CONTENDERS = {"ours": formula(ours), "naive": formula(naive), "flax": flax_linear}


def layer_program(layer, x_dtype, *options):
    """Y and every gradient of one layer."""
    apply, parameters = layer(WIDTH, HIDDEN, x_dtype, *options)

    def program(parameters, x, G):
        y, gradients = jax.vjp(apply, parameters, x)
        return y, gradients(G)

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), x_dtype)
    return program, (parameters, x, jax.ShapeDtypeStruct((ROWS, HIDDEN), x_dtype))


def block(layer, width, hidden, dtype, *options):
    """Two layers with GELU between them, and their parameters."""
    up, up_parameters = layer(width, hidden, dtype, *options)
    down, down_parameters = layer(hidden, width, dtype, *options)

    def apply(parameters, x):
        return down(parameters[1], jax.nn.gelu(up(parameters[0], x)))

    return apply, (up_parameters, down_parameters)


def mlp_program(layer, x_dtype, *options):
    """A loss of two layers and its gradient."""
    apply, parameters = block(layer, WIDTH, HIDDEN, x_dtype, *options)

    def loss(parameters, x):
        return jnp.mean(jnp.square(apply(parameters, x).astype("float32")))

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), x_dtype)
    return jax.value_and_grad(loss), (parameters, x)


def stack_program(layer, x_dtype, *options):
    """The same for a scanned stack of residual blocks, recomputed in the backward."""
    apply, parameters = block(layer, STACK_WIDTH, STACK_HIDDEN, x_dtype, *options)

    @jax.checkpoint
    def step(x, parameters):
        return x + apply(parameters, x), None

    def loss(parameters, x):
        y, _ = jax.lax.scan(step, x, parameters)
        return jnp.mean(jnp.square(y.astype("float32")))

    parameters = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((LAYERS, *a.shape), a.dtype), parameters
    )
    x = jax.ShapeDtypeStruct((ROWS, STACK_WIDTH), x_dtype)
    return jax.value_and_grad(loss), (parameters, x)


def device(target):
    if target in TOPOLOGIES:
        name = TOPOLOGIES[target]
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    config = (pathlib.Path(__file__).parent / "h100.txtpb").read_text()
    if target == "b200":
        for old, new in B200.items():
            config = config.replace(old, new)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=config,
    )


def compiled(target, topology, case, contender, options):
    program, dtypes, bias = case.split("-")
    make = globals()[f"{program}_program"]
    function, arguments = make(CONTENDERS[contender], *DTYPES[dtypes], bias == "bias")
    sharding = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    platform = "tpu" if target in TOPOLOGIES else "cuda"
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return lowered.compile(compiler_options=options)


def main(target, *cases):
    topology = device(target)
    for case in cases or CASES:
        for backend in ["tpu"] if target in TOPOLOGIES else BACKENDS:
            for contender in CONTENDERS:
                options = BACKENDS.get(backend)
                program = compiled(target, topology, case, contender, options)
                count, size = kernels(program.as_text())
                memory = program.memory_analysis().temp_size_in_bytes
                row = {"case": case, "backend": backend, "contender": contender}
                row |= {"kernels": count, "MiB": size / 2**20}
                print(json.dumps(row | {"temporary MiB": memory / 2**20}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
