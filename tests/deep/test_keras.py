"""Keras keeps the float32 weight gradient under `mixed_bfloat16`, as the guide says."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_documentation import ROOT, run, sections

import jaxlinear

keras = pytest.importorskip("keras", reason="Keras is not installed")
if keras.backend.backend() != "jax":
    pytest.skip("Keras has another backend", allow_module_level=True)


@pytest.fixture(autouse=True)
def _policy():
    yield
    keras.config.set_dtype_policy("float32")


class Casting(keras.layers.Layer):
    """As one would write it, with weights that Keras has rounded to bfloat16."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, shape):
        self.w = self.add_weight(shape=(self.units, shape[-1]))
        self.b = self.add_weight(shape=(self.units,), initializer="zeros")

    def call(self, x):
        return jaxlinear.linear(x, self.w, self.b)


def layer_of_the_guide():
    [section] = (
        blocks
        for name, blocks in sections(ROOT / "docs" / "porting.md").items()
        if name.endswith("From Keras")
    )
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for title, code in section:
            run(title, code, names)
    return names["Linear"]


def error_of_the_weight_gradient(layer, x, G):
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    values = [v.value for v in model.trainable_variables]

    def loss(values):
        Y, _ = model.stateless_call(values, [], x)
        return jnp.sum(Y.astype("float32") * G.astype("float32"))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gradient = jax.jit(jax.grad(loss))(values)[0]
    assert gradient.dtype == "float32"
    exact = np.asarray(G, np.float64).T @ np.asarray(x, np.float64)
    return np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact)


def test_the_weight_gradient_is_float32_only_without_autocast():
    Linear = layer_of_the_guide()
    keras.config.set_dtype_policy("mixed_bfloat16")
    draws = np.random.default_rng(0)
    x, G = (jnp.asarray(draws.normal(size=(256, 64)), "bfloat16") for _ in range(2))
    assert error_of_the_weight_gradient(Linear(64), x, G) < 1e-6
    assert error_of_the_weight_gradient(Casting(64), x, G) > 1e-3


@pytest.mark.parametrize("is_jitted", [True, False])
def test_the_layer_of_the_guide_trains(is_jitted):
    Linear = layer_of_the_guide()
    keras.config.set_dtype_policy("mixed_bfloat16")
    draws = np.random.default_rng(0)
    x = draws.normal(size=(256, 8)).astype("float32")
    y = x @ draws.normal(size=(8, 3)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), Linear(32), keras.layers.ReLU()])
    model.add(Linear(3))
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "mse", jit_compile=is_jitted)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        history = model.fit(x, y, epochs=10, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
