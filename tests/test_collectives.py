"""Compiled for eight devices: the collectives of the naive formula, no more.

On CPU XLA sends low precision as float32, so the bytes are the same whatever the dtype
of a sum. On accelerators they follow the dtype in which a product leaves its
accumulator, its `preferred_element_type`: tests/deep/targets/test_reduction.py, where
the compiler for TPUs is installed.
"""

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import naive

from jaxlinear import linear

BATCH, LENGTH, IN, OUT = 16, 32, 64, 128

# name: specs of x, weight, bias and the output
LAYOUTS = {
    "replicated": (P(), P(), P(), P()),
    "data": (P("data"), P(), P(), P("data")),
    "column": (P("data"), P("model"), P("model"), P("data", None, "model")),
    "row": (P("data", None, "model"), P(None, "model"), P(), P("data")),
    "fsdp over the input features": (P("data"), P(None, "data"), P(), P("data")),
    "fsdp over the output features": (P("data"), P("data"), P(), P("data")),
    "fsdp and column": (
        P("data"),
        P("model", "data"),
        P("model"),
        P("data", None, "model"),
    ),
    "sequence": (P("data", "model"), P("model"), P("model"), P("data", None, "model")),
}
# name: dtype of x, dtype of the parameters, compute dtype
DTYPES = {
    "float32": ("float32", "float32", None),
    "bfloat16": ("bfloat16", "bfloat16", None),
    "mixed": ("float32", "float32", "bfloat16"),
    "mixed with bfloat16 input": ("bfloat16", "float32", "bfloat16"),
}


def compiled_gradients(layer, axis_type, layout, dtypes, has_bias):
    *specs, out_spec = layout
    x_dtype, parameter_dtype, compute_dtype = dtypes
    axes = (axis_type,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axes)
    explicit = axis_type == AxisType.Explicit
    options = {"out_sharding": NamedSharding(mesh, out_spec)} if explicit else {}

    def loss(*arrays):
        Y = layer(*arrays, dtype=compute_dtype, **options)
        return jnp.sum(Y.astype("float32") ** 2)

    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(
            [(BATCH, LENGTH, IN), (OUT, IN), (OUT,)],
            [x_dtype, parameter_dtype, parameter_dtype],
            specs,
            strict=True,
        )
    ][: 3 if has_bias else 2]
    gradients = jax.value_and_grad(loss, range(len(arguments)))
    # Each gradient where its argument is, as an optimizer needs it.
    placed = [argument.sharding for argument in arguments]
    out_shardings = None if explicit else (NamedSharding(mesh, P()), tuple(placed))
    return jax.jit(gradients, out_shardings=out_shardings).lower(*arguments).compile()


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=str
)


def assert_collectives_of_naive(*case):
    ours = collectives(compiled_gradients(linear, *case))
    assert ours == collectives(compiled_gradients(naive, *case))


# The other dtypes, and layers without a bias, are in `deep/test_collectives.py`.
@pytest.mark.parametrize("dtypes", [DTYPES["mixed"]], ids=["mixed"])
@each_layout
@each_axis_type
def test_collectives_are_those_of_the_naive_formula(axis_type, layout, dtypes):
    assert_collectives_of_naive(axis_type, layout, dtypes, True)


def test_collectives_are_found_in_the_program():
    """What the tests above compare is there: the sum of the gradients, for one."""
    program = compiled_gradients(
        linear, AxisType.Auto, LAYOUTS["data"], DTYPES["float32"], has_bias=True
    )
    found = collectives(program)
    assert ("all-reduce", "f32", OUT * IN * 4) in found
    assert ("all-reduce", "f32", OUT * 4) in found
