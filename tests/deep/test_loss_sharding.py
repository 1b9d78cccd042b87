"""The loss of rows, classes and features that are split over eight devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_oracle import problem, relative

from jaxlinear import linear_cross_entropy, linear_log_likelihood

CLASSES = 640
SPLITS = {  # How h (4, 24, in), the weight (classes, in) and labels (4, 24) are split.
    "data": (P("data"), P(), P("data")),
    "classes": (P(), P("model"), P()),
    "both": (P("data"), P("model"), P("data")),
    "sequences": (P("data", "model"), P(), P("data", "model")),
    "fully sharded": (P(None, ("data", "model")), P(("data", "model")), P()),
    "features": (P("data"), P(None, "data"), P("data")),
    "features elsewhere": (P("data", None, "model"), P(None, "model"), P("data")),
    "classes over rows": (P("data"), P(("model", "data")), P("data")),
    "tensor and fully sharded": (P("data"), P("model", "data"), P("data")),
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def arrays_on(mesh, split):
    h, weight, labels, bias, weights = problem(CLASSES, (4, 24))
    of_h, of_weight, of_rows = split
    of_bias = P(of_weight[0] if len(of_weight) else None)
    every = h, weight, labels, bias, weights
    specs = of_h, of_weight, of_rows, of_bias, of_rows
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(every, specs, strict=True)
    ]


def step(reduction):
    def loss(h, weight, labels, bias, weights):
        options = {"weights": weights, "reduction": reduction, "label_smoothing": 0.1}
        return linear_cross_entropy(h, weight, labels, bias, **options).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 3, 4)))


@functools.cache
def on_one_device(reduction):
    return step(reduction)(*problem(CLASSES, (4, 24)))


def check_equal(found, expected):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative(one, other) <= 1e-5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values_and_gradients_are_those_of_one_device(kind, split, reduction):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        arrays = arrays_on(mesh, SPLITS[split])
        found = step(reduction)(*arrays)
    check_equal(found, on_one_device(reduction))
    if kind is AxisType.Explicit:
        _, gradients = found
        h, weight, _, bias, weights = arrays
        for gradient, array in zip(gradients, (h, weight, bias, weights), strict=True):
            assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_shardings_are_found_where_no_mesh_is_set():
    arrays = arrays_on(mesh_of(AxisType.Auto), SPLITS["both"])
    found = step("mean")(*arrays)
    check_equal(found, on_one_device("mean"))


@pytest.mark.parametrize("placed", ["h", "weight", "labels", "bias", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_array_on_an_explicit_mesh_is_enough(placed, reduction):
    arrays = problem(CLASSES, (4, 24))
    k = ["h", "weight", "labels", "bias", "weights"].index(placed)
    expected = step(reduction)(*arrays)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        its_array = jax.device_put(arrays[k], P("data"))
        found = step(reduction)(*arrays[:k], its_array, *arrays[k + 1 :])
    check_equal(found, expected)


@pytest.mark.parametrize("constraint", [None, P("data")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mesh_may_be_set_where_no_array_is_on_it(constraint, reduction):
    arrays = problem(CLASSES, (4, 24))

    def constrained(h, *others):
        if constraint is not None:
            h = jax.lax.with_sharding_constraint(h, constraint)
        return step(reduction)(h, *others)

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        found = jax.jit(constrained)(*arrays)
    check_equal(found, step(reduction)(*arrays))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loop_sends_three_numbers_a_row_at_most(kind, reduction):
    n, d, v = 1024, 64, 4096
    mesh = mesh_of(kind)
    sharding = {name: NamedSharding(mesh, P(name)) for name in ("data", "model")}
    h = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding["data"])
    weight = jax.ShapeDtypeStruct((v, d), jnp.float32, sharding=sharding["model"])
    labels = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding["data"])

    def loss(h, weight, labels):
        return linear_cross_entropy(h, weight, labels, reduction=reduction).mean()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        program = gradient.lower(h, weight, labels).compile()
    of_device = {"h": 4 * n * d // 4, "weight": 4 * v * d // 2, "a row": 4 * n // 4}
    sent = [size for _, _, size in collectives(program)]
    assert sum(sent) <= of_device["h"] + of_device["weight"] + 4 * of_device["a row"]


def test_classes_that_are_split_inside_shard_map_are_named():
    h, weight, labels, bias, weights = problem(CLASSES, (4, 24))
    mesh = mesh_of(AxisType.Auto)
    rows, classes = P("data"), P("model")

    def part(h, weight, labels, bias, weights):
        options = {"weights": weights, "reduction": "sum", "label_smoothing": 0.1}
        total = linear_cross_entropy(
            h, weight, labels, bias, axis_name="model", **options
        )
        return jax.lax.psum(total, "data")

    specs = rows, classes, rows, classes, rows
    whole = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
    arrays = h, weight, labels, bias, weights
    gradients = jax.jit(jax.value_and_grad(whole, (0, 1, 3, 4)))
    check_equal(gradients(*arrays), step("sum")(*arrays))

    likelihood = jax.shard_map(
        lambda *a: linear_log_likelihood(*a, axis_name="model"),
        mesh=mesh,
        in_specs=specs[:4],
        out_specs=rows,
    )
    found = likelihood(h, weight, labels, bias)
    expected = linear_log_likelihood(h, weight, labels, bias)
    check_equal(found[:2], expected[:2])
    assert (found.prediction == expected.prediction).all()


def test_rows_inside_shard_map_are_a_devices_own():
    h, weight, labels, bias, weights = problem(CLASSES, (8, 24))
    mesh = mesh_of(AxisType.Auto)
    rows = P(("data", "model"))

    def part(h, weight, labels, bias, weights):
        options = {"weights": weights, "reduction": "sum", "label_smoothing": 0.1}
        total = linear_cross_entropy(h, weight, labels, bias, **options)
        return jax.lax.psum(total, ("data", "model"))

    specs = rows, P(), rows, P(), rows
    whole = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
    arrays = h, weight, labels, bias, weights
    found = jax.jit(jax.value_and_grad(whole, (0, 1, 3, 4)))(*arrays)
    check_equal(found, step("sum")(*arrays))


@pytest.mark.parametrize("rows", [P(), P("data")], ids=["copied", "split"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_may_be_manual_beside_one_that_is_not(rows, check_vma):
    arrays = problem(CLASSES, (4, 24))

    def part(*arrays):
        value, _ = step("sum")(*arrays)
        return value if rows == P() else jax.lax.psum(value, "data")

    whole = jax.shard_map(
        part,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(rows, P(), rows, P(), rows),
        out_specs=P(),
        axis_names={"data"},
        check_vma=check_vma,
    )
    value, _ = step("sum")(*arrays)
    check_equal(jax.jit(whole)(*arrays), value)


@pytest.mark.parametrize(
    ("axis_name", "check_vma", "message"),
    [
        ("model", False, "over which a `jax.shard_map` with `check_vma=True` splits"),
        ("data", True, "splits `weight`, got 'data'"),
        (("model", "model"), True, "`axis_name` must name each axis once"),
    ],
)
def test_axes_that_would_have_a_wrong_gradient_are_refused(
    axis_name, check_vma, message
):
    h, weight, labels, *_ = problem(CLASSES, (4, 24))
    whole = jax.shard_map(
        lambda *arrays: linear_cross_entropy(*arrays, axis_name=axis_name),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("model"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match=message):
        whole(h, weight, labels)


def test_an_axis_of_vmap_is_not_one_of_classes():
    h, weight, labels, *_ = problem(CLASSES, (4, 24))
    split = jax.vmap(
        lambda weight: linear_cross_entropy(h, weight, labels, axis_name="model"),
        axis_name="model",
    )
    with pytest.raises(ValueError, match="splits `weight`, got 'model'"):
        split(weight.reshape(2, -1, weight.shape[1]))
