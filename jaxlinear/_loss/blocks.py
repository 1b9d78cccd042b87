"""Walks over an axis of arrays in blocks, whose size depends on the platform."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._every_mode.open import is_open


def walk(body, carry, length, size):
    """``carry`` after ``body(carry, first, size)`` for each block of ``length`` places.

    The last block has what is left, so nothing is padded. If it is differentiated, each
    block is computed again.
    """
    body = jax.checkpoint(body, prevent_cse=False, static_argnums=(2,))
    whole = length - length % size
    if whole > size:
        starts = jnp.arange(0, whole, size, dtype=jnp.int32)
        carry, _ = lax.scan(
            lambda c, first: (body(c, first, size), None), carry, starts
        )
    elif whole:
        carry = body(carry, jnp.int32(0), size)
    rest = length - whole
    return body(carry, jnp.int32(whole), rest) if rest else carry


def block(array, first, size, axis=0):
    """A block of an axis of an array, or None."""
    if array is None:
        return None
    return lax.dynamic_slice_in_dim(array, first, size, axis)


def put(array, first, part, axis=0):
    """``array`` with ``part`` in the place of one of its blocks, or None."""
    if array is None:
        return None
    return lax.dynamic_update_slice_in_dim(array, part, first, axis)


def add(array, first, part):
    """``array`` with ``part`` added to one of its blocks, or None."""
    if array is None:
        return None
    return put(array, first, block(array, first, part.shape[0]) + part)


def vocabulary_block(size):
    """How many classes are computed at once: about a 32nd, but 1,024 at least."""
    return min(size, max(1024, -(-size // (32 * _LANES)) * _LANES))


_LANES = 128  # A TPU pads the last axis of an array to a multiple of this.


class Blocks(NamedTuple):
    """How many rows a block has at most, and whether its classes are in blocks too."""

    rows: int
    splits_classes: bool

    def classes(self, size):
        return vocabulary_block(size) if self.splits_classes else size


def _of_cpu(features):
    """The product takes longest: few logits, and no copy of the weight as operand."""
    return Blocks(512, splits_classes=True)


def _of_accelerator(features):
    """The weight gradient is read and written for each block of rows.

    That is as much as the logits of twice as many rows as features. More than 2,048
    rows are not needed to keep a device busy. Nor are all classes too many for it.
    """
    rows = min(max(2 * features, 256), 2048)
    return Blocks(rows, splits_classes=False)


def in_blocks_of_the_platform(function, features, *arrays):
    """``function(blocks, *arrays)`` with the `Blocks` that suit the platform."""
    of_accelerator = partial(function, _of_accelerator(features))
    if is_open():
        return of_accelerator(*arrays)
    of_cpu = partial(function, _of_cpu(features))
    return lax.platform_dependent(*arrays, cpu=of_cpu, default=of_accelerator)
