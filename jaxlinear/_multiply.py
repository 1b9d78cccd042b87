"""The product of two arrays of the same dtype, with nothing left open in it."""

import contextlib

from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxlinear._cpu import cpu_form
from jaxlinear._open import platform_dependent


def multiply_arrays(a, b, contracted_axes, product, sharding, hint=""):
    """The product of two arrays as ``product`` says.

    ``hint`` is XLA's name for the gradient, by which ROCm's libraries know that they
    may multiply it in their alternative float16.
    """
    is_hinted = product.is_alternative_float16
    hinted = set_xla_metadata(**{hint: "true"}) if is_hinted else _UNHINTED
    a, b = a.astype(product.operand_dtype), b.astype(product.operand_dtype)

    def plain(a, b):
        with hinted:
            return lax.dot_general(
                a,
                b,
                (contracted_axes, ((), ())),
                precision=product.precision,
                preferred_element_type=product.preferred_element_type,
                out_sharding=sharding,
            )

    form = cpu_form(a, b, contracted_axes, product, sharding)
    if form is None:
        return plain(a, b)

    def on_cpu(a, b):
        return form(a, b).astype(product.preferred_element_type)

    # Resolved when lowering: one exported program serves every platform.
    return platform_dependent(a, b, cpu=on_cpu, default=plain)


_UNHINTED = contextlib.nullcontext()
