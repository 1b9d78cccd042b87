"""The squared norm of a gradient from its factors, without the gradient.

The gradient of one example with respect to a matrix that multiplies its tokens is
Gᵀ X = Σ_t g_t x_tᵀ; with respect to a table it is Σ_t e_t g_tᵀ, where the unit vector
e_t has its one at the row that token t looks up. For any such sum

    ‖Σ_t a_t b_tᵀ‖² = Σ_ts (a_t · a_s) (b_t · b_s)

which for one token is ‖a‖² ‖b‖² (Goodfellow, 2015, https://arxiv.org/abs/1510.01799).
For more it takes T × T products of tokens (Li et al., 2022,
https://arxiv.org/abs/2110.05679), or else the matrix: whichever are fewer operations.
A parameter that is used several times has the tokens of all its uses.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear._product import accumulator_dtype


class Factors(NamedTuple):
    """The rows a_t (T, rows) and the columns b_t (T, columns) of Σ_t a_t b_tᵀ.

    For a table ``rows`` are integers (T,), and one outside ``size`` is of no row. For a
    bias ``columns`` is None: the gradient is Σ_t a_t.
    """

    rows: jax.Array
    columns: jax.Array | None
    size: int
    precision: Any = "highest"

    @property
    def is_lookup(self):
        return self.rows.ndim == 1

    @property
    def dtype(self):
        of = self.rows if self.columns is None else self.columns
        return accumulator_dtype(of.dtype)

    def matrix(self):
        if self.columns is None:
            return jnp.sum(self.rows, 0, dtype=self.dtype)
        if self.is_lookup:
            zeros = jnp.zeros((self.size, self.columns.shape[1]), self.dtype)
            places = jnp.where(self.rows < 0, self.size, self.rows)
            return zeros.at[places].add(self.columns.astype(self.dtype), mode="drop")
        return self._product("tr,tc->rc", self.rows, self.columns)

    def products_with(self, other):
        """(a_t · a'_s) (b_t · b'_s), for the tokens of two uses."""
        columns = self._product("tc,sc->ts", self.columns, other.columns.conj())
        if not self.is_lookup and not other.is_lookup:
            return columns * self._product("tr,sr->ts", self.rows, other.rows.conj())
        if self.is_lookup and other.is_lookup:
            is_row = (self.rows >= 0) & (self.rows < self.size)
            is_same = (self.rows[:, None] == other.rows[None]) & is_row[:, None]
            return jnp.where(is_same, columns, 0)
        if self.is_lookup:
            return other.products_with(self).T.conj()
        is_row = (other.rows >= 0) & (other.rows < self.size)
        rows = self.rows[:, jnp.where(is_row, other.rows, 0)].astype(columns.dtype)
        return columns * jnp.where(is_row[None], rows, 0)

    def _product(self, axes, a, b):
        return jnp.einsum(
            axes, a, b, precision=self.precision, preferred_element_type=self.dtype
        )


def squared_norm(uses):
    """‖Σ_t a_t b_tᵀ‖² over the tokens of all ``uses`` of one parameter: a scalar."""
    if len(uses) == 1 and len(uses[0].rows) == 1 and uses[0].columns is not None:
        (use,) = uses
        columns = sum_of_squares(use.columns)
        if use.is_lookup:
            return jnp.where((use.rows >= 0) & (use.rows < use.size), columns, 0)[0]
        return sum_of_squares(use.rows) * columns
    if not _has_fewer_token_products(uses):
        return sum_of_squares(sum(use.matrix() for use in uses))
    total = 0
    for k, use in enumerate(uses):
        total += jnp.sum(use.products_with(use)).real
        for other in uses[:k]:
            total += 2 * jnp.sum(use.products_with(other)).real
    return jnp.maximum(total, 0)  # What cancels may leave less than nothing.


def _has_fewer_token_products(uses):
    if uses[0].columns is None:
        return False
    tokens = sum(len(use.rows) for use in uses)
    multiplied = sum(len(use.rows) for use in uses if not use.is_lookup)
    rows, columns = uses[0].size, uses[0].columns.shape[1]
    of_tokens = tokens**2 * (columns + (rows if multiplied else 1))
    return of_tokens < (multiplied + 1) * rows * columns


def sum_of_squares(array):
    """Σ |a|² in at least float32."""
    array = array.astype(accumulator_dtype(array.dtype))
    return jnp.sum((array * array.conj()).real)


def total(norms):
    """The sum of squared norms, in the widest of their dtypes."""
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return sum(norm.astype(widest) for norm in norms)


def norm_dtype(array):
    """The dtype of a squared norm of what has the dtype of ``array``."""
    return jnp.finfo(accumulator_dtype(array.dtype)).dtype
