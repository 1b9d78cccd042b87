"""The arguments: which are parameters, which are examples, and what they must be."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr


class Arguments(NamedTuple):
    """How the loss is called."""

    fun: Any
    parameters: tuple[int, ...]
    examples: tuple[int, ...]
    is_one_parameter: bool
    keep_batch_dim: bool
    has_aux: bool

    @staticmethod
    def of(fun, argnums, batch_argnums, keep_batch_dim, has_aux=False):
        parameters, examples = _places(argnums), _places(batch_argnums)
        places = *parameters, *examples
        if not parameters or not examples or len({*places}) < len(places):
            raise ValueError(
                "`batch_argnums` must be other arguments than `argnums`, each of them"
                f" once and of both at least one, got {batch_argnums!r} and {argnums!r}"
            )
        is_one = not isinstance(argnums, (tuple, list))
        return Arguments(fun, parameters, examples, is_one, keep_batch_dim, has_aux)

    def given(self, args, kwargs):
        most = max(*self.parameters, *self.examples)
        least = min(*self.parameters, *self.examples)
        if most >= len(args) or least < 0:
            raise ValueError(
                "`argnums` and `batch_argnums` must be places of the positional"
                f" arguments, 0 to {len(args) - 1}, got {least if least < 0 else most}"
            )
        parameters = [args[k] for k in self.parameters]
        tree = parameters[0] if self.is_one_parameter else tuple(parameters)
        _check_parameters(tree)
        batch = [jax.tree.map(jnp.asarray, args[k]) for k in self.examples]
        _check_batch(batch)
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
        axes, axes_of_leaves = _axes(leaves, batch)
        leaves = [_cast(leaf, axes) for leaf in leaves]

        def loss(leaves, example):
            every = [*args]
            tree = structure.unflatten(leaves)
            parameters = [tree] if self.is_one_parameter else tree
            if self.keep_batch_dim:
                example = jax.tree.map(lambda a: a[None], example)
            places = *self.parameters, *self.examples
            for k, value in zip(places, (*parameters, *example), strict=True):
                every[k] = value
            return self._checked(self.fun(*every, **kwargs))

        return Given(loss, leaves, structure, batch, axes, axes_of_leaves)

    def _checked(self, result):
        """The loss of one example, and what else the function returns."""
        aux = None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                got = type(result).__name__
                raise TypeError(f"`fun` must return a pair with `has_aux`, got {got}")
            result, aux = result
        got = f"{jnp.result_type(result)}{[*jnp.shape(result)]}"
        if jnp.shape(result) or not jnp.issubdtype(
            jnp.result_type(result), jnp.floating
        ):
            raise TypeError(
                f"`fun` must return a real scalar for one example, got {got}"
            )
        return jnp.asarray(result), aux


class Given(NamedTuple):
    """One call.

    Attributes:
      loss: of the leaves and one example, with what else the function returns.
      leaves: the parameters. Inside ``shard_map`` they vary over the axes of the batch,
        so that a cotangent is that of an example and not a sum over devices.
      tree: that of the parameters.
      batch: the arguments that are examples.
      axes: inside ``shard_map`` those of the mesh over which the batch varies.
      axes_of_leaves: those over which the parameters do: they are parts.
    """

    loss: Any
    leaves: list[jax.Array]
    tree: Any
    batch: list[Any]
    axes: tuple[str, ...]
    axes_of_leaves: list[tuple[str, ...]]

    @property
    def size(self):
        return jax.tree.leaves(self.batch)[0].shape[0]

    def check_padding(self, is_padding_example):
        if is_padding_example is None:
            return
        found = jnp.shape(is_padding_example), jnp.result_type(is_padding_example)
        if found != ((self.size,), jnp.bool_):
            raise ValueError(
                f"`is_padding_example` must be booleans ({self.size},), one for each"
                f" example, got {found[1]}{[*found[0]]}"
            )

    def over_devices(self, norms):
        """The squared norms of whole parameters, from those of their parts."""
        return [
            lax.psum(norm, axes) if axes else norm
            for norm, axes in zip(norms, self.axes_of_leaves, strict=True)
        ]

    def summed_over_devices(self, grads):
        """The gradients of parameters that do not vary as the batch does."""
        return [lax.psum(g, self.axes) if self.axes else g for g in grads]


def _places(argnums):
    try:
        return tuple(map(operator.index, argnums))
    except TypeError:
        return (operator.index(argnums),)


def _check_parameters(tree):
    if not jax.tree.leaves(tree):
        raise ValueError("the arguments of `argnums` must have an array")
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the arguments of `argnums` must be real and floating, got {dtype} at"
                f" {keystr(path) or 'their root'}"
            )


def _check_batch(batch):
    shapes = {
        keystr(path): jnp.shape(a) for path, a in jax.tree.leaves_with_path(batch)
    }
    if not shapes:
        raise ValueError("the arguments of `batch_argnums` must have an array")
    if () in shapes.values() or len({s[0] for s in shapes.values()}) > 1:
        raise ValueError(
            "the arrays of `batch_argnums` must have the same first axis, that of the"
            f" examples, got shapes {', '.join(map(str, shapes.values()))}"
        )
    if 0 in {s[0] for s in shapes.values()}:
        raise ValueError("the arrays of `batch_argnums` must have one example at least")


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


def _axes(leaves, batch):
    """The axes of a mesh over which the batch varies, and over which each leaf does."""
    of_batch = frozenset().union(*map(_varying, jax.tree.leaves(batch)))
    of_leaves = [*map(_varying, leaves)]
    if common := of_batch & frozenset().union(*of_leaves):
        raise ValueError(
            "inside `shard_map` the parameters must not vary over an axis over which"
            f" the examples do, got {', '.join(map(repr, sorted(common)))}: split them"
            " over another axis, or leave the partitioning to `jax.jit`"
        )
    return tuple(sorted(of_batch)), [tuple(sorted(axes)) for axes in of_leaves]


def _cast(leaf, axes):
    return lax.pcast(leaf, axes, to="varying") if axes else leaf
