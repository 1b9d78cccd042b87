"""What a device rounds in a product without being asked: its operands, and Y."""

from typing import Any, NamedTuple

from jax.typing import DTypeLike


class Rounding(NamedTuple):
    """How a device computes a product.

    ``operands`` is the format to which it rounds them, and ``roundoff`` the unit
    roundoff of that, or 0 where it keeps all bits. It ``may_truncate`` if it may cut
    bits off instead. ``is_y_rounded_before_bias`` if our layer does so there.
    """

    operands: str
    roundoff: float
    may_truncate: bool
    is_y_rounded_before_bias: bool


def rounding(device: Any, dtype: DTypeLike, precision: str | None = None) -> Rounding:
    """That of operands in ``dtype`` at the default precision, or at ``"highest"``.

    What is rounded at the default precision, `jax.lax.Precision` says: on TPUs operands
    in float32 to bfloat16, on GPUs that have it to TensorFloat32. These are NVIDIA's
    from compute capability 8.0 on: of AMD's libraries XLA asks for float32. How a GPU
    comes to the 10 bits of TensorFloat32 is not said. For float16 as well a TPU's
    compiler plans one pass in bfloat16, and three at the highest precision.
    """
    is_gpu = device.platform in ("gpu", "cuda", "rocm")
    if precision is None:
        if device.platform == "tpu" and dtype in ("float32", "float16"):
            return Rounding("bfloat16", 2**-8, False, is_gpu)
        if is_gpu and dtype == "float32" and _has_tensorfloat32(device):
            return Rounding("TensorFloat32", 2**-11, True, is_gpu)
    return Rounding(str(dtype), 0.0, False, is_gpu)


def _has_tensorfloat32(device):
    # "9.0" on an NVIDIA H100, "gfx942" on an AMD MI300.
    major = device.compute_capability.split(".")[0]
    return major.isdecimal() and int(major) >= 8
