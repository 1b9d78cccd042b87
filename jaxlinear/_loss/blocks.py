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
    """How many rows a block has, and whether its classes are in blocks too."""

    rows: int
    splits_classes: bool

    def classes(self, size):
        return vocabulary_block(size) if self.splits_classes else size


_BLOCKS = {"cpu": Blocks(512, True), "default": Blocks(2048, False)}


def in_blocks_of_the_platform(function, *arrays):
    """``function(blocks, *arrays)`` with the `Blocks` that suit the platform.

    The weight gradient is read and written for each block of rows. On an accelerator
    that takes longer than its product, unless there are some thousand rows, and it
    computes a large block faster than many small ones. On a CPU the product takes
    longer: there fewer logits are kept, and no copy of the weight in another dtype.
    """
    forms = {p: partial(function, blocks) for p, blocks in _BLOCKS.items()}
    if is_open():
        return forms["default"](*arrays)
    return lax.platform_dependent(*arrays, **forms)
