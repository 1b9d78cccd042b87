"""Rows: solvers, and what is differentiated through them.

Each needs the layer's derivative in forward mode, or its transpose.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse import linalg


def _operator(layer, weight):
    """A linear map near twice the identity, of the layer without its bias."""

    def apply(v):
        return 2 * v + layer(v, weight).astype(v.dtype)

    return apply


def _problem(x, weight, bias):
    """An operator's weight (8, 8), which is small, and a vector."""
    return weight[:, :8] / 8, x[0, 0, :8] + bias


def _solved(solve, layer, *arrays):
    """The solution for a vector, and the gradient of its squares."""

    def squares(weight, vector):
        solution = solve(_operator(layer, weight), vector)
        return jnp.sum(solution**2), solution

    return jax.value_and_grad(squares, (0, 1), has_aux=True)(*_problem(*arrays))


def gmres(layer, *arrays):
    return _solved(lambda *a: linalg.gmres(*a, tol=1e-6)[0], layer, *arrays)


def gmres_in_batches(layer, *arrays):
    def solve(operator, vector):
        return linalg.gmres(operator, vector, tol=1e-6, solve_method="batched")[0]

    return _solved(solve, layer, *arrays)


def bicgstab(layer, *arrays):
    return _solved(lambda *a: linalg.bicgstab(*a, tol=1e-6)[0], layer, *arrays)


def cg(layer, *arrays):
    weight, vector = _problem(*arrays)
    symmetric = weight + weight.T
    return _solved(
        lambda *a: linalg.cg(*a, tol=1e-6)[0],
        layer,
        jnp.broadcast_to(vector, (1, 1, 8)),
        4 * jnp.concatenate([symmetric, symmetric], 1),
        jnp.zeros_like(vector),
    )


def _solve_densely(operator, vector):
    return jnp.linalg.solve(jax.jacfwd(operator)(jnp.zeros_like(vector)), vector)


def custom_linear_solve(layer, *arrays):
    def solve(operator, vector):
        return lax.custom_linear_solve(
            operator, vector, _solve_densely, transpose_solve=_solve_densely
        )

    return _solved(solve, layer, *arrays)


def _fixed_point(layer, weight, vector):
    """The v with v = sin(layer(v) + vector), by iteration."""

    def excess(v):
        return v - jnp.sin(layer(v, weight, vector).astype(v.dtype))

    def iterate(function, v):
        return lax.fori_loop(0, 30, lambda _, v: v - function(v), v)

    return lax.custom_root(excess, jnp.zeros_like(vector), iterate, _solve_densely)


def custom_root(layer, *arrays):
    def squares(*a):
        return jnp.sum(_fixed_point(layer, *a) ** 2)

    return jax.grad(squares, (0, 1))(*_problem(*arrays))


def custom_root_in_forward_mode(layer, *arrays):
    problem = _problem(*arrays)
    return jax.jvp(lambda *a: _fixed_point(layer, *a), problem, problem)


def newton_step(layer, *arrays):
    weight, vector = _problem(*arrays)

    def excess(v):
        return v - jnp.sin(layer(v, weight, vector).astype(v.dtype))

    return vector - jnp.linalg.solve(jax.jacfwd(excess)(vector), excess(vector))


def levenberg_marquardt_step(layer, x, weight, bias):
    def residual(bias):
        return jnp.sin(layer(x[0], weight, bias).astype(bias.dtype)).ravel()

    jacobian = jax.jacfwd(residual)(bias)
    _, pull_back = jax.vjp(residual, bias)
    damped = jacobian.T @ jacobian + jnp.eye(bias.size)
    return bias - jnp.linalg.solve(damped, pull_back(residual(bias))[0])


def gauss_newton_product(layer, x, weight, bias):
    def residual(weight):
        return jnp.sin(layer(x[0], weight, bias).astype(weight.dtype))

    _, push_forward = jax.linearize(residual, weight)
    (product,) = jax.linear_transpose(push_forward, weight)(push_forward(weight))
    return product


def implicit_euler(layer, *arrays):
    """Two steps of dv/dt = sin(layer(v)) - v, and the gradient through them."""

    def squares(weight, v):
        def step(v, _):
            def excess(next_):
                slope = jnp.sin(layer(next_, weight).astype(v.dtype)) - next_
                return next_ - v - slope / 4

            def newton(function, v):
                def iteration(_, v):
                    return v - jnp.linalg.solve(jax.jacfwd(function)(v), function(v))

                return lax.fori_loop(0, 6, iteration, v)

            return lax.custom_root(excess, v, newton, _solve_densely), None

        return jnp.sum(lax.scan(step, v, length=2)[0] ** 2)

    return jax.grad(squares, (0, 1))(*_problem(*arrays))
