"""What is kept for the backward pass: what the perturbed arguments need, no more."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from oracle import naive, random_problem

from jaxlinear import linear

ROWS, IN, OUT, STEPS = 6, 8, 8, 3
ARGUMENTS = ("x", "weight", "bias")
SUBSETS = [
    ("x",),
    ("weight",),
    ("bias",),
    ("x", "weight"),
    ("x", "bias"),
    ("weight", "bias"),
    ("x", "weight", "bias"),
]
DTYPES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "mixed": ("float32", "bfloat16"),
    "widened": ("bfloat16", "float32"),
}


def applied(layer, dtype):
    return functools.partial(layer, dtype=dtype)


def jitted(layer, dtype):
    return jax.jit(applied(layer, dtype))


def scanned(layer, dtype):
    def apply(x, weight, bias):
        def step(x, _):
            return layer(x, weight, bias, dtype=dtype).astype(x.dtype), None

        return lax.scan(step, x, length=STEPS)[0]

    return apply


def kept_bytes(function, differentiated, dtype):
    """The bytes that ``jax.vjp`` keeps when only some arguments are differentiated."""
    arguments = dict(
        zip(ARGUMENTS, random_problem((ROWS,), IN, OUT, dtype), strict=False)
    )

    def kept(arguments):
        def of_differentiated(some):
            return function(**(arguments | some))

        some = {name: arguments[name] for name in differentiated}
        return jax.vjp(of_differentiated, some)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, arguments))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("wrapped", [jitted, scanned])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("differentiated", SUBSETS, ids="-".join)
def test_never_more_bytes_are_kept_than_by_the_naive_formula(
    differentiated, dtypes, wrapped
):
    dtype, compute_dtype = dtypes
    ours = kept_bytes(wrapped(linear, compute_dtype), differentiated, dtype)
    assert ours <= kept_bytes(wrapped(naive, compute_dtype), differentiated, dtype)


@pytest.mark.parametrize("wrapped", [applied, jitted])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("differentiated", SUBSETS, ids="-".join)
def test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated(
    differentiated, compute_dtype, wrapped
):
    x, weight = (
        ROWS * IN * ("weight" in differentiated),
        OUT * IN * ("x" in differentiated),
    )
    expected = (x + weight) * jnp.dtype(compute_dtype).itemsize
    kept = kept_bytes(wrapped(linear, compute_dtype), differentiated, "float32")
    assert kept == expected


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_frozen_layer_in_a_scan_keeps_its_weight_once(dtypes):
    dtype, compute_dtype = dtypes
    kept = kept_bytes(scanned(linear, compute_dtype), ("x",), dtype)
    assert kept == OUT * IN * jnp.dtype(compute_dtype or dtype).itemsize


SAVED_X = jax.checkpoint_policies.save_only_these_names("linear_x", "linear_scale")


@pytest.mark.parametrize("wrapped", [applied, jitted])
@pytest.mark.parametrize(
    ("policy", "itemsize_of_x"), [(None, 4), (SAVED_X, 2)], ids=["none", "x"]
)
def test_a_layer_in_checkpoint_keeps_its_weight_as_it_came(
    policy, itemsize_of_x, wrapped
):
    layer = jax.checkpoint(wrapped(linear, "bfloat16"), policy=policy)
    x, weight, *_ = random_problem((ROWS,), IN, OUT, "float32")
    _, vjp = jax.vjp(layer, x, weight)
    kept = {a.shape: a for a in jax.tree.leaves(vjp) if a.size}
    assert kept.keys() == {x.shape, weight.shape}
    assert kept[x.shape].dtype.itemsize == itemsize_of_x
    assert kept[weight.shape].unsafe_buffer_pointer() == weight.unsafe_buffer_pointer()
