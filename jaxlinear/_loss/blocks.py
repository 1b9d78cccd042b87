"""Walks over an axis of arrays in blocks, whose size depends on the platform."""

from functools import partial

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
    """A block of an array or of None."""
    if array is None:
        return None
    return lax.dynamic_slice_in_dim(array, first, size, axis)


def put(array, first, part, axis=0):
    """``array`` with ``part`` in the place of one of its blocks, or None."""
    if array is None:
        return None
    return lax.dynamic_update_slice_in_dim(array, part, first, axis)


def vocabulary_block(size):
    """How much of a vocabulary is computed at once: about a 32nd, if that is not little."""
    return min(size, max(1024, -(-size // (32 * _LANES)) * _LANES))


_LANES = 128  # A TPU pads the last axis of an array to a multiple of this.


def by_platform(function, *arrays):
    """``function(rows of a block, *arrays)`` with as many as suit the platform.

    The weight gradient is read and written for each block. That takes longer than its
    product on an accelerator with fewer rows than a few thousand. A CPU computes longer,
    and has its logits in a cache if they are few.
    """
    ROWS = {"cpu": 256, "default": 2048}
    forms = {p: partial(function, rows) for p, rows in ROWS.items()}
    if is_open():
        return forms["default"](*arrays)
    return lax.platform_dependent(*arrays, **forms)
