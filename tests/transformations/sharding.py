"""Rows: several devices, eight here, as four of `data` by two of `model`."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations.losses import EVERY, loss


def _mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def pmap(layer, x, weight, bias):
    def replica(x):
        gradients = jax.grad(loss(layer), (1, 2))(x, weight, bias)
        return layer(x, weight, bias), lax.psum(gradients, "batch")

    return jax.pmap(replica, axis_name="batch")(x)


# shard_map: gradients outside of the mapped function and inside.


def _mapped(function, in_specs, out_specs, **options):
    return jax.shard_map(
        function,
        mesh=_mesh(AxisType.Auto),
        in_specs=in_specs,
        out_specs=out_specs,
        **options,
    )


def _outside_and_inside(layer, in_specs, out_specs, *arrays):
    outside = _mapped(layer, in_specs, out_specs)
    inside = _mapped(jax.grad(loss(layer), EVERY), in_specs, in_specs)
    gradients = jax.grad(loss(outside), EVERY)
    return jax.jit(gradients)(*arrays), jax.jit(inside)(*arrays)


def shard_map_data_parallel(layer, *arrays):
    return _outside_and_inside(layer, (P("data"), P(), P()), P("data"), *arrays)


def shard_map_column_parallel(layer, *arrays):
    in_specs = P(), P("model"), P("model")
    return _outside_and_inside(layer, in_specs, P(None, None, "model"), *arrays)


def shard_map_data_and_column_parallel(layer, *arrays):
    in_specs = P("data"), P("model"), P("model")
    return _outside_and_inside(layer, in_specs, P("data", None, "model"), *arrays)


def shard_map_row_parallel(layer, *arrays):
    def summed(x, weight, bias):
        Y = lax.psum(layer(x, weight).astype(x.dtype), "model")
        return Y + jnp.expand_dims(bias, (0, 1))

    in_specs = P("data", None, "model"), P(None, "model"), P()
    return _outside_and_inside(summed, in_specs, P("data"), *arrays)


def shard_map_gathered_weight(layer, *arrays):
    def gathered(x, weight, bias):
        whole = lax.all_gather(weight, "data", axis=1, tiled=True)
        return layer(x, whole, bias)

    in_specs = P("data"), P(None, "data"), P()
    return _outside_and_inside(gathered, in_specs, P("data"), *arrays)


def shard_map_unchecked(layer, *arrays):
    """Gradients of each device by itself: JAX sums nothing that nobody asked for."""

    def of_each_device(x, weight, bias):
        gradients = jax.grad(loss(layer), EVERY)(x, weight, bias)
        return jax.tree.map(lambda a: a[None], gradients)

    in_specs = P("data"), P(), P()
    inside = _mapped(of_each_device, in_specs, P("data"), check_vma=False)
    outside = _mapped(layer, in_specs, P("data"), check_vma=False)
    gradients = jax.grad(loss(outside), EVERY)
    return jax.jit(gradients)(*arrays), jax.jit(inside)(*arrays)


def shard_map_over_one_axis_of_two(layer, x, weight, bias):
    """The other is left to XLA."""
    mesh = _mesh(AxisType.Auto)
    in_specs = P("data"), P(), P()
    mapped = jax.shard_map(
        layer, mesh=mesh, in_specs=in_specs, out_specs=P("data"), axis_names={"data"}
    )
    parameters = jax.device_put((weight, bias), NamedSharding(mesh, P("model")))
    return jax.jit(jax.grad(loss(mapped), EVERY))(x, *parameters)


# Automatic and explicit sharding, by the layout of x, weight and bias, and of Y.

REPLICATED = P(), P(), P(), None
DATA = P("data"), P(), P(), None
COLUMN = P("data"), P("model"), P("model"), None
ROW = P("data", None, "model"), P(None, "model"), P(), P("data", None, None)
FSDP = P("data"), P(None, "data"), P(), P("data", None, None)
OUTPUT = P("data"), P(), P(), P("data", None, "model")


def _automatic(layer, layout, *arrays):
    mesh = _mesh(AxisType.Auto)
    *specs, _ = layout
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(arrays, specs, strict=True)
    ]
    return jax.jit(layer)(*placed), jax.jit(jax.grad(loss(layer), EVERY))(*placed)


def automatic_sharding_replicated(layer, *arrays):
    return _automatic(layer, REPLICATED, *arrays)


def automatic_sharding_data_parallel(layer, *arrays):
    return _automatic(layer, DATA, *arrays)


def automatic_sharding_column_parallel(layer, *arrays):
    return _automatic(layer, COLUMN, *arrays)


def automatic_sharding_row_parallel(layer, *arrays):
    return _automatic(layer, ROW, *arrays)


def automatic_sharding_fsdp(layer, *arrays):
    return _automatic(layer, FSDP, *arrays)


def _explicit(layer, layout, *arrays):
    """The result also has the sharding that autodiff gives: that of the argument."""
    *specs, out_sharding = layout
    options = {} if out_sharding is None else {"out_sharding": out_sharding}
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        placed = list(map(jax.device_put, arrays, specs))
        gradients = jax.jit(jax.grad(loss(layer, **options), EVERY))(*placed)
        for a, gradient in zip(placed, gradients, strict=True):
            assert jax.typeof(a).sharding == jax.typeof(gradient).sharding
        return jax.jit(lambda *a: layer(*a, **options))(*placed), gradients


def explicit_sharding_replicated(layer, *arrays):
    return _explicit(layer, REPLICATED, *arrays)


def explicit_sharding_data_parallel(layer, *arrays):
    return _explicit(layer, DATA, *arrays)


def explicit_sharding_column_parallel(layer, *arrays):
    return _explicit(layer, COLUMN, *arrays)


def explicit_sharding_row_parallel(layer, *arrays):
    return _explicit(layer, ROW, *arrays)


def explicit_sharding_fsdp(layer, *arrays):
    return _explicit(layer, FSDP, *arrays)


def explicit_sharding_of_the_output(layer, *arrays):
    return _explicit(layer, OUTPUT, *arrays)


def explicit_sharding_under_vmap(layer, x, weight, bias):
    """Over an axis that is sharded, and over one that is not."""
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        x = jax.device_put(x, P("data"))
        weight, bias = jax.device_put((weight, bias), P())
        gradients = jax.vmap(jax.grad(loss(layer), EVERY), (0, None, None))
        rows = jax.vmap(layer, (1, None, None), 1)
        return jax.jit(gradients)(x, weight, bias), jax.jit(rows)(x, weight, bias)


def explicit_sharding_of_a_reduced_weight(layer, x, weight, bias):
    """Its gradient is left unreduced over the axes that it is reduced over."""
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        x = jax.device_put(x, P("data"))
        weight, bias = jax.device_put((weight, bias), P())

        def gradients(x, weight, bias):
            marked = jax.reshard(weight, P(reduced={"data"}))
            of_x, of_weight, of_bias = jax.grad(loss(layer), EVERY)(x, marked, bias)
            assert jax.typeof(of_weight).sharding.spec.unreduced == {"data"}
            return of_x, jax.reshard(of_weight, P()), of_bias

        return jax.jit(gradients)(x, weight, bias)


def explicit_sharding_of_an_unreduced_output(layer, x, weight, bias):
    """Partial sums of a row-parallel layer, added when the program asks for it."""
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        x = jax.device_put(x, P("data", None, "model"))
        weight = jax.device_put(weight, P(None, "model"))
        partial_sums = P("data", None, None, unreduced={"model"})

        def added(x, weight):
            Y = layer(x, weight, out_sharding=partial_sums)
            return jnp.sum(jax.reshard(Y, P("data")).astype(x.dtype) ** 2)

        return jax.jit(jax.value_and_grad(added, (0, 1)))(x, weight)
