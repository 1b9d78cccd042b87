"""Rows: derivatives in forward mode, and of several modes."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.jet import jet as taylor_series
from transformations.losses import EVERY, directions, loss

import jaxlinear


def _small(x, weight, bias):
    """Few enough elements for the derivatives of each by each."""
    return x[0, :2, :3], weight[:2, :3], bias[:2]


def _curved(layer):
    return lambda *arrays: jnp.sin(layer(*arrays).astype("float32"))


def jvp(layer, *arrays):
    return jax.jvp(layer, arrays, directions(*arrays))


def jvp_in_any_of_the_arguments(layer, *arrays):
    def derivative(moving):
        def of_some(*some):
            every = dict(enumerate(arrays)) | dict(zip(moving, some, strict=True))
            return layer(*(every[k] for k in EVERY))

        some = tuple(arrays[k] for k in moving)
        return jax.jvp(of_some, some, directions(*some))

    return [
        derivative(moving)
        for count in EVERY
        for moving in itertools.combinations(EVERY, count + 1)
    ]


def jvp_of_jit(layer, *arrays):
    return jax.jit(lambda *a: jax.jvp(jax.jit(layer), a, directions(*a)))(*arrays)


def jvp_without_a_bias(layer, x, weight, bias):
    return jax.jvp(layer, (x, weight), directions(x, weight))


def jvp_of_one_axis(layer, x, weight, bias):
    arrays = x[0, 0], weight, bias
    return jax.jvp(layer, arrays, directions(*arrays))


def jvp_of_integers(layer, x, weight, bias):
    def of_weight(x, weight):
        return layer(x, weight, dtype=weight.dtype)

    integers = jnp.round(4 * x).astype("int8")
    zeros = jnp.zeros(x.shape, jax.dtypes.float0)
    return jax.jvp(of_weight, (integers, weight), (zeros, *directions(weight)))


def linearize(layer, *arrays):
    Y, push_forward = jax.linearize(layer, *arrays)
    return Y, push_forward(*directions(*arrays))


def transpose_of_linearize(layer, *arrays):
    Y, push_forward = jax.linearize(layer, *arrays)
    return jax.linear_transpose(push_forward, *arrays)(jnp.cos(Y))


def jacfwd(layer, *arrays):
    return jax.jacfwd(layer, EVERY)(*arrays)


def hessian_vector_product_reverse_over_forward(layer, *arrays):
    def derivative(*arrays_):
        return jax.jvp(loss(layer), arrays_, directions(*arrays))[1]

    return jax.grad(derivative, EVERY)(*arrays)


def hessian_vector_product_forward_over_forward(layer, *arrays):
    """One number, vᵀHv."""

    def derivative(*arrays_):
        return jax.jvp(loss(layer), arrays_, directions(*arrays))[1]

    return jax.jvp(derivative, arrays, directions(*arrays))


def jvp_of_vmap(layer, *arrays):
    return jax.jvp(jax.vmap(layer, (0, None, None)), arrays, directions(*arrays))


def jvp_of_while_loop(layer, x, weight, bias):
    def repeated(x):
        def step(state):
            i, x = state
            return i + 1, jnp.sin(layer(x, weight[:, :8] / 4, bias)).astype(x.dtype)

        return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    x = x[..., :8]
    return jax.jvp(repeated, (x,), directions(x))


def linear_transpose(layer, x, weight, bias):
    def of_x(x):
        return layer(x, weight)

    Y = of_x(x)
    return jax.linear_transpose(of_x, x)(jnp.cos(Y))


def jacfwd_of_jacfwd(layer, *arrays):
    return jax.jacfwd(jax.jacfwd(_curved(layer), EVERY), EVERY)(*_small(*arrays))


def jacrev_of_jacfwd(layer, *arrays):
    return jax.jacrev(jax.jacfwd(_curved(layer), EVERY), EVERY)(*_small(*arrays))


def hessian_of_a_loss(layer, *arrays):
    return jax.hessian(loss(layer), EVERY)(*_small(*arrays))


def third_derivative_in_three_modes(layer, *arrays):
    def first(*a):
        return jax.jvp(loss(_curved(layer)), a, directions(*a))[1]

    return jax.jvp(jax.grad(first, EVERY), arrays, directions(*arrays))[1]


def jet(layer, *arrays):
    series = [[a, a / 2, a * 0] for a in directions(*arrays)]
    return taylor_series(_curved(layer), arrays, series)


def jvp_of_vmap_over_every_argument(layer, *arrays):
    def derivative(axes, out_axis):
        stacked = tuple(
            a if axis is None else jnp.stack([a, -a], axis)
            for a, axis in zip(arrays, axes, strict=True)
        )
        mapped = jax.vmap(layer, axes, out_axis)
        return jax.jvp(mapped, stacked, directions(*stacked))

    axes = [(2, None, None), (None, 1, None), (None, None, 0), (3, 2, 1), (1, None, 0)]
    return [derivative(a, out_axis) for a in axes for out_axis in (0, -1)]


def vmap_of_jvp(layer, *arrays):
    def derivative(*tangents):
        return jax.jvp(layer, arrays, tangents)

    tangents = [jnp.stack([a, -a, 2 * a]) for a in directions(*arrays)]
    return jax.vmap(derivative)(*tangents)


def vmap_of_jvp_with_spmd_axis_name(layer, x, weight, bias):
    def derivative(x):
        return jax.jvp(layer, (x, weight, bias), directions(x, weight, bias))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        return jax.jit(jax.vmap(derivative, spmd_axis_name="data"))(x)


def jvp_of_scan(layer, x, weight, bias):
    def repeated(x, weight, bias):
        def step(x, _):
            return jnp.sin(layer(x, weight[:, :8] / 4, bias)).astype(x.dtype), None

        return lax.scan(step, x[..., :8], length=3)[0]

    return jax.jvp(repeated, (x, weight, bias), directions(x, weight, bias))


def jvp_of_cond(layer, x, weight, bias):
    def either(x, weight, bias):
        chosen = jnp.sum(x) > jnp.inf
        return lax.cond(
            chosen, lambda *_: layer(-x, weight, bias), layer, x, weight, bias
        )

    return jax.jvp(either, (x, weight, bias), directions(x, weight, bias))


def jvp_under_each_checkpoint_policy(layer, *arrays):
    policies = jax.checkpoint_policies
    every = (
        policies.nothing_saveable,
        policies.everything_saveable,
        policies.dots_saveable,
        policies.dots_with_no_batch_dims_saveable,
        jaxlinear.save_linear_outputs,
    )

    def derivatives(policy):
        apply = jax.checkpoint(_curved(layer), policy=policy)
        of_loss = loss(apply)
        tangent = jax.jvp(apply, arrays, directions(*arrays))
        return tangent, jax.grad(
            lambda *a: jax.jvp(of_loss, a, directions(*arrays))[1], EVERY
        )(*arrays)

    return [derivatives(policy) for policy in every]


def _jvp_on_a_mesh(layer, axis_type, *arrays):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = jax.P("data"), jax.P("model"), jax.P("model")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip(arrays, specs, strict=True)]
        derivative = jax.jit(lambda *a: jax.jvp(layer, a, directions(*a)))
        return jax.device_put(derivative(*placed), jax.devices()[0])


def jvp_on_an_automatic_mesh(layer, *arrays):
    return _jvp_on_a_mesh(layer, jax.sharding.AxisType.Auto, *arrays)


def jvp_on_an_explicit_mesh(layer, *arrays):
    return _jvp_on_a_mesh(layer, jax.sharding.AxisType.Explicit, *arrays)


def _jvp_in_shard_map(layer, checked, *arrays):
    def derivative(*arrays):
        return jax.jvp(layer, arrays, directions(*arrays))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.P("data"), jax.P()
    return jax.shard_map(
        derivative,
        mesh=mesh,
        in_specs=(data, whole, whole),
        out_specs=data,
        check_vma=checked,
    )(*arrays)


def jvp_in_shard_map(layer, *arrays):
    return _jvp_in_shard_map(layer, True, *arrays)


def jvp_in_shard_map_unchecked(layer, *arrays):
    return _jvp_in_shard_map(layer, False, *arrays)
