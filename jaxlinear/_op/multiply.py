"""The product of two arrays; only its form on a CPU is still open."""

import contextlib
from typing import NamedTuple

from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._op.by_platform import by_platform, visible_by_platform
from jaxlinear._op.cpu import Call, has_own_form, multiply_on_cpu
from jaxlinear._plain import dot_general
from jaxlinear._product import Product


def multiply_arrays(a, b, contracted_axes, product, sharding, hint=""):
    """The product of two arrays that are its operands, as ``product`` says.

    ``hint`` is XLA's name for the gradient, by which ROCm's libraries know that they
    may multiply it in their alternative float16.
    """
    hinted = hint if product.is_alternative_float16 else ""
    form = ArrayProduct(contracted_axes, product, sharding, hinted)
    if not has_own_form(a, b, contracted_axes, product.precision, sharding):
        return form.plain(a, b)
    # A policy saves a forward product, never one of the backward pass.
    chosen = by_platform if hint else visible_by_platform
    return chosen(form, a, b)


class ArrayProduct(NamedTuple):
    contracted_axes: tuple[tuple[int, ...], tuple[int, ...]]
    product: Product
    sharding: NamedSharding | PartitionSpec | None
    hint: str = ""

    platforms = ("cpu",)

    def plain(self, a, b):
        hinted = set_xla_metadata(**{self.hint: "true"}) if self.hint else _UNHINTED
        with hinted:
            return dot_general(
                a,
                b,
                (self.contracted_axes, ((), ())),
                precision=self.product.precision,
                preferred_element_type=self.product.preferred_element_type,
                out_sharding=self.sharding,
            )

    def on(self, platform, is_alone, a, b):
        if platform != "cpu":
            return self.plain(a, b)
        call = Call(
            contracted_axes=self.contracted_axes,
            precision=self.product.precision,
            sharding=self.sharding,
            result_dtype=self.product.preferred_element_type,
            is_alone=is_alone,
        )
        return multiply_on_cpu(a, b, call)


_UNHINTED = contextlib.nullcontext()
